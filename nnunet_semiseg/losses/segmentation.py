"""Pseudo-labels in the form that nnU-Net's losses take targets."""

from __future__ import annotations

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def hard_pseudo_label(logits: Tensor, label_manager) -> Tensor:
    """The detached decision of a network, as a target for nnU-Net's loss.

    Args:
        logits: (B, heads, *S).
        label_manager: nnU-Net's; says whether the heads are classes (softmax) or regions (sigmoid).

    Returns:
        Classes: (B, 1, *S), int16, as nnU-Net's labels. Regions: (B, heads, *S), bool, with a last channel of False
        where the dataset has an ignore label (nothing in a pseudo-label is ignored).
    """
    if not label_manager.has_regions:
        return logits.argmax(1, keepdim=True).short()
    regions = logits > 0
    if label_manager.has_ignore_label:
        regions = torch.cat((regions, torch.zeros_like(regions[:, :1])), 1)
    return regions


def probabilities(logits: Tensor, label_manager) -> Tensor:
    """(B, heads, *S) logits to float32 probabilities: softmax over classes, or sigmoid per region."""
    return logits.float().sigmoid() if label_manager.has_regions else logits.float().softmax(1)


def entropy(p: Tensor, regions: bool) -> Tensor:
    """-sum p log p over classes, (B, 1, *S), or of each region and its complement, (B, heads, *S)."""
    if regions:
        return torch.special.entr(p) + torch.special.entr(1 - p)
    return torch.special.entr(p).sum(1, keepdim=True)


def has_label(target: Tensor, label_manager) -> Tensor:
    """(B, 1, *S), bool: False where a target, as nnU-Net's losses take it, has the ignore label."""
    if not label_manager.has_ignore_label:
        return torch.ones_like(target[:, :1], dtype=torch.bool)
    if label_manager.has_regions:
        return target[:, label_manager.num_segmentation_heads :][:, :1] < 0.5
    return target != label_manager.ignore_label


def confidence(p: Tensor, label_manager) -> Tensor:
    """The probability of the decision, (B, 1, *S), from probabilities (B, heads, *S); of regions the least one."""
    if label_manager.has_regions:
        return torch.maximum(p, 1 - p).amin(1, keepdim=True)
    return p.amax(1, keepdim=True)


def on_grid(target: Tensor, x: Tensor) -> Tensor:
    """A target (B, C, *S) on the grid of x (B, K, *s), by nearest neighbours, as nnU-Net brings labels there."""
    if target.shape[2:] == x.shape[2:]:
        return target
    return F.interpolate(target.float(), x.shape[2:], mode="nearest-exact").to(target.dtype)


def weighted_loss(loss, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """nnU-Net's Dice + CE with a weight for each voxel.

    Dice: each of its three sums over voxels is weighted. CE: weighted, then the mean over *all* voxels, so that a
    smaller weight is a smaller loss. Targets are not touched. A sample in which nothing counts has no loss.

    Args:
        loss: nnU-Net's `DC_and_CE_loss` or `DC_and_BCE_loss`, not wrapped for deep supervision.
        logits: (B, heads, *S).
        target: as `hard_pseudo_label` returns it.
        weight: (B, 1, *S), at least 0.
    """
    regions = isinstance(loss, DC_and_BCE_loss)
    if regions:
        target = target[:, : logits.shape[1]]  # without the channel of the ignore label
    ce = cross_entropy(logits, target, regions, weight)
    dice = loss.dc(logits, target, loss_mask=weight) + share_without_weight(loss, weight)
    return loss.weight_ce * ce + loss.weight_dice * dice


def cross_entropy(logits: Tensor, target: Tensor, regions: bool, weight: Tensor | None = None) -> Tensor:
    """The mean over voxels of the cross-entropy, or over regions of the binary one, each voxel times its weight.

    Args:
        logits: (B, heads, *S).
        target: as `hard_pseudo_label` returns it.
        weight: (B, 1, *S); None: 1.
    """
    if regions:
        return F.binary_cross_entropy_with_logits(logits, target[:, : logits.shape[1]].to(logits.dtype), weight)
    losses = F.cross_entropy(logits, target[:, 0].long(), reduction="none")
    return (losses if weight is None else losses * weight[:, 0]).mean()


def soft_label_loss(loss, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """nnU-Net's Dice + CE towards probabilities instead of labels; the least where the two are equal.

    nnU-Net's Dice is not: a network that is taught 0.4 everywhere does best with 1 everywhere. So its overlap, the sum
    of p t, is replaced by that of min(p, t), as in Wang et al., "Dice semimetric losses" (MICCAI 2023), which MONAI
    has. Towards hard labels this is nnU-Net's loss.

    Args:
        loss: nnU-Net's `DC_and_CE_loss` or `DC_and_BCE_loss`, not wrapped for deep supervision.
        logits, target: (B, heads, *S); the target gets no gradient.
        weight: (B, 1, *S), at least 0, see `weighted_loss`; None: every voxel counts alike.
    """
    from monai.losses.dice import DiceLoss  # takes seconds, and few methods need it

    target, dc = target.detach(), loss.dc
    weight = torch.ones_like(target[:, :1]) if weight is None else weight
    if isinstance(loss, DC_and_BCE_loss):
        ce = F.binary_cross_entropy_with_logits(logits, target, weight)
    else:
        ce = (F.cross_entropy(logits, target, reduction="none") * weight[:, 0]).mean()
    smooth = {"smooth_nr": dc.smooth, "smooth_dr": dc.smooth}
    dice = DiceLoss(dc.do_bg, batch=dc.batch_dice, soft_label=True, **smooth)
    return loss.weight_ce * ce + loss.weight_dice * (
        dice(weight * dc.apply_nonlin(logits), weight * target) - 1 + share_without_weight(loss, weight)
    )


def share_without_weight(loss, weight: Tensor) -> Tensor:
    """Of the samples, or with `batch_dice` of the batch: there nnU-Net's Dice is at its best by its smoothing alone."""
    counts = weight.flatten(1).any(1)
    if loss.dc.batch_dice:
        counts = counts.any()
        if loss.dc.ddp:  # the batch of all processes
            counts = AllGatherGrad.apply(counts.float()).any()
    return (~counts).float().mean()
