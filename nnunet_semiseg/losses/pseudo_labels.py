"""Pseudo-labels in the form that nnU-Net's losses take targets."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def hard_pseudo_label(logits: Tensor, label_manager) -> Tensor:
    """The detached decision of a network, as a target for nnU-Net's loss.

    Args:
        logits: (B, heads, *S).
        label_manager: nnU-Net's; says whether the heads are classes (softmax) or regions (sigmoid).

    Returns:
        Classes: (B, 1, *S), int64. Regions: (B, heads, *S), bool, with a last channel of False where the
        dataset has an ignore label (nothing in a pseudo-label is ignored).
    """
    if not label_manager.has_regions:
        return logits.argmax(1, keepdim=True)
    regions = logits > 0
    if label_manager.has_ignore_label:
        regions = torch.cat((regions, torch.zeros_like(regions[:, :1])), 1)
    return regions


def probabilities(logits: Tensor, label_manager) -> Tensor:
    """(B, heads, *S) logits to float32 probabilities: softmax over classes, or sigmoid per region."""
    return logits.float().sigmoid() if label_manager.has_regions else logits.float().softmax(1)
