"""Pseudo-labels of a teacher and of other models' masks: who is believed where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def join_masks(
    decision: Tensor, p: Tensor, masks: Tensor, weights: Tensor, unsure: float, regions: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The pseudo-label of a teacher and of masks, and how much each voxel of it counts.

    A mask votes for its class with the weight of that class. Its background is a vote against the classes it is good
    at: for what the teacher finds most likely among background and the classes of weight 0. That vote has the least
    weight of the classes it is good at. A class of weight 0 in a mask, and a place it does not know, are no vote.

    Where the teacher is unsure, the class with most votes is the label; elsewhere, and without a vote, it is the
    teacher's decision. A voxel counts with all votes for its label, and with 1 more where the teacher decided the
    same. So masks teach where they agree with the teacher and where it is unsure, and only that.

    Args:
        decision: the teacher's, as `hard_pseudo_label` returns it.
        p: its probabilities (B, heads, *S).
        masks: (B, K, *S) of K other models, values of the dataset; -1 where a mask is not known.
        weights: (K, heads), of each model and class or region, in 0 to 1; the background's are not looked at.
        unsure: the teacher is where the probability of its decision is less than this.
        regions: values of each region (n,), where the heads are regions; each is then decided on its own, by yes and
            no, and a voxel counts with the mean over them.

    Returns:
        The label, in the form of the decision; what voxels count, (B, 1, *S), at least 1 without a vote.
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
