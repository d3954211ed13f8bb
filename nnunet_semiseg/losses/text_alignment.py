"""CSA, which draws the features of a class to its text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def category_alignment_loss(features: Tensor, probs: Tensor, text: Tensor) -> Tensor:
    """CSA: mean over classes, samples and the d channels of (F_t^k - v_k)^2, v_k = sum(F_v y_k) / sum(y_k).

    Source: Text-SemiSeg, category-aware semantic alignment. The published code normalises along the width axis
    instead of the channels and averages over all voxels; we follow the paper there. The mean over channels is the
    code's: the paper's sum would be d times as much. The text gets no gradient: towards features that say nothing yet
    the classes' texts would all move to the same place.

    Args:
        features: (B, d, *s), float32, F_v, normalised over d.
        probs: (B, K, *S), float32 probabilities, brought to the features' grid s by averaging.
        text: (K, d), float32, F_t, normalised over d.
    """
    with torch.autocast(features.device.type, enabled=False):  # sums over thousands of voxels
        weights = F.interpolate(probs, size=features.shape[2:], mode="area").flatten(2)
        sums = torch.einsum("bdn,bkn->bkd", features.flatten(2), weights)
        prototypes = sums / weights.sum(2, keepdim=True).clamp_min(1e-6)
        return F.mse_loss(prototypes, text.detach().expand_as(prototypes))
