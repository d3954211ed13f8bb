"""CSA, a loss that pulls the features of a class towards the features of its text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def category_alignment_loss(features: Tensor, probs: Tensor, text: Tensor) -> Tensor:
    """CSA: the mean over classes, samples and channels of (F_t^k - v_k)^2, with v_k = sum(F_v y_k) / sum(y_k).

    F_t^k is the text feature of class k, F_v are the features of the image, y_k are the probabilities of class k.

    Source: Text-SemiSeg, category-aware semantic alignment. The published code normalises along the width axis instead
    of the channels, and averages over all voxels; here we follow the paper. The mean over channels is from the code;
    the paper's sum would be d times as large. The text gets no gradient. Otherwise the texts of all classes would move
    to the same place while the features do not say anything yet.

    Args:
        features: F_v, (B, d, *s), float32, normalised over d.
        probs: y, (B, K, *S), float32. They are averaged to the grid s of the features.
        text: F_t, (K, d), float32, normalised over d.
    """
    with torch.autocast(features.device.type, enabled=False):  # sums over thousands of voxels need float32
        weights = F.interpolate(probs, size=features.shape[2:], mode="area").flatten(2)
        sums = torch.einsum("bdn,bkn->bkd", features.flatten(2), weights)
        prototypes = sums / weights.sum(2, keepdim=True).clamp_min(1e-6)
        return F.mse_loss(prototypes, text.detach().expand_as(prototypes))
