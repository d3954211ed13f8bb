"""Combine the pseudo-labels of a teacher with the masks of other models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def join_masks(
    decision: Tensor, p: Tensor, masks: Tensor, weights: Tensor, unsure: float, regions: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The pseudo-label from a teacher and masks, and the weight of each voxel.

    A mask votes for its class with the weight of this class. A mask's background is a vote against the classes with a
    weight above 0: it votes for the background or a class of weight 0, whichever the teacher finds most probable. This
    vote has the smallest weight above 0. A class of weight 0 and a voxel that is not known (-1) give no vote.

    Where the teacher is unsure, the label is the class with the most votes. Elsewhere, and without a vote, it is the
    teacher's decision. The weight of a voxel is the sum of the votes for its label, plus 1 if the teacher has decided
    for it, too. So a mask has an effect only where it agrees with the teacher or where the teacher is unsure.

    Args:
        decision: the teacher's decision, as `hard_pseudo_label` returns it.
        p: the teacher's probabilities (B, heads, *S).
        masks: the masks of K models, (B, K, *S), with the values of the dataset. -1 where a mask is not known.
        weights: (K, heads), the weight of each model for each class or region, in 0 to 1. That of the background is
            not used.
        unsure: the teacher is unsure where the probability of its decision is below this.
        regions: the values of each region (n,), if the heads are regions. Then each region is decided separately, with
            yes or no, and the weight of a voxel is the mean over the regions.

    Returns:
        The label, in the form of the decision, and the weights of the voxels, (B, 1, *S). Without a vote a weight is 1.
    """
    if regions is not None:
        return _join_regions(decision, p, masks, weights, unsure, regions)
    votes = torch.zeros_like(p)
    for mask, weight in zip(masks.split(1, 1), weights, strict=True):
        good = weight > 0
        good[0] = False  # a mask's background says nothing of itself
        least = torch.where(good, weight, torch.inf).amin()
        others = p.masked_fill(good.view(-1, *[1] * (p.ndim - 2)), -1).argmax(1, keepdim=True)
        voted = torch.where(mask == 0, others, mask.clamp_min(0).long())
        counts = torch.where(mask == 0, torch.where(good.any(), least, 0.0), (weight * good)[voted])
        votes.scatter_add_(1, voted, counts.masked_fill(mask < 0, 0))
    decided = decision.long()
    most, best = votes.max(1, keepdim=True)
    label = torch.where((p.gather(1, decided) < unsure) & (most > 0), best, decided)
    return label.to(decision.dtype), votes.gather(1, label) + (label == decided)


def _join_regions(decision, p, masks, weights, unsure, regions) -> tuple[Tensor, Tensor]:
    heads = p.shape[1]
    decided, sums = decision[:, :heads], [torch.zeros_like(p), torch.zeros_like(p)]  # votes for no, and for yes
    for mask, weight in zip(masks.split(1, 1), weights, strict=True):
        inside = torch.cat([torch.isin(mask, r) for r in regions], 1)
        counts = weight.view(-1, *[1] * (p.ndim - 2)) * (mask >= 0)
        for answer, votes in enumerate(sums):
            votes += counts * (inside == answer)
    no, yes = sums
    sure = torch.where(decided, p, 1 - p) >= unsure
    label = torch.where(sure | (yes == no), decided, yes > no)
    counts = torch.where(label, yes, no) + (label == decided)
    return torch.cat((label, decision[:, heads:]), 1), counts.mean(1, keepdim=True)
