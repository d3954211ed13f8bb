"""Pseudo-labels and probabilities from logits, and nnU-Net's loss with a weight for each voxel or with soft labels."""

from __future__ import annotations

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def hard_pseudo_label(logits: Tensor, label_manager) -> Tensor:
    """The decision of a network as a target for nnU-Net's loss. It has no gradient.

    Args:
        logits: (B, heads, *S).
        label_manager: the `LabelManager` of nnU-Net. It says whether the heads are classes (softmax) or regions
            (sigmoid).

    Returns:
        Classes: (B, 1, *S), int16, like nnU-Net's labels. Regions: (B, heads, *S), bool. If the dataset has an ignore
        label, there is one more channel, which is False (a pseudo-label has no ignored voxels).
    """
    if not label_manager.has_regions:
        return logits.argmax(1, keepdim=True).short()
    regions = logits > 0
    if label_manager.has_ignore_label:
        regions = torch.cat((regions, torch.zeros_like(regions[:, :1])), 1)
    return regions


def probabilities(logits: Tensor, label_manager) -> Tensor:
    """Turn logits (B, heads, *S) into float32 probabilities: softmax over classes, or a sigmoid for each region."""
    return logits.float().sigmoid() if label_manager.has_regions else logits.float().softmax(1)


def entropy(p: Tensor, regions: bool) -> Tensor:
    """The entropy -sum p log p over the classes, (B, 1, *S), of probabilities p (B, heads, *S).

    For regions it is the entropy of each region and its complement, (B, heads, *S).
    """
    if regions:
        return torch.special.entr(p) + torch.special.entr(1 - p)
    return torch.special.entr(p).sum(1, keepdim=True)


def divergence(p: Tensor, q: Tensor, regions: bool) -> Tensor:
    """The KL divergence KL(p || q) of probabilities (B, heads, *S).

    It is (B, 1, *S) for classes. For regions it is that of each region and its complement, (B, heads, *S).
    """

    def relative(p: Tensor, q: Tensor) -> Tensor:
        return p * (p.clamp_min(1e-8).log() - q.clamp_min(1e-8).log())

    if regions:
        return relative(p, q) + relative(1 - p, 1 - q)
    return relative(p, q).sum(1, keepdim=True)


def has_label(target: Tensor, label_manager) -> Tensor:
    """Find labelled voxels, (B, 1, *S), bool: False where the target of nnU-Net's losses has the ignore label."""
    if not label_manager.has_ignore_label:
        return torch.ones_like(target[:, :1], dtype=torch.bool)
    if label_manager.has_regions:
        return target[:, label_manager.num_segmentation_heads :][:, :1] < 0.5
    return target != label_manager.ignore_label


def confidence(p: Tensor, label_manager) -> Tensor:
    """The probability of the decision, (B, 1, *S), from probabilities (B, heads, *S).

    For regions it is the smallest over all regions.
    """
    if label_manager.has_regions:
        return torch.maximum(p, 1 - p).amin(1, keepdim=True)
    return p.amax(1, keepdim=True)


def disagree(a: Tensor, b: Tensor, label_manager) -> Tensor:
    """Find voxels where the decisions of two logits (B, heads, *S) differ, in any region: (B, 1, *S), bool."""
    a, b = (hard_pseudo_label(x, label_manager) for x in (a, b))
    return (a != b).any(1, keepdim=True)


def on_grid(target: Tensor, x: Tensor) -> Tensor:
    """Resample a target (B, C, *S) to the grid of x (B, K, *s), by nearest neighbours, as nnU-Net does with labels."""
    if target.shape[2:] == x.shape[2:]:
        return target
    return F.interpolate(target.float(), x.shape[2:], mode="nearest-exact").to(target.dtype)


def weighted_loss(loss, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """nnU-Net's Dice + CE with a weight for each voxel.

    Dice: each of its three sums over voxels has the weights. CE: each voxel is multiplied by its weight, then the mean
    is taken over *all* voxels, so that smaller weights give a smaller loss. Targets are not changed. A sample whose
    weights are all 0 has no loss.

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
    """The mean over all voxels of cross-entropy times weight. For regions it is binary, over voxels and regions.

    Args:
        logits: (B, heads, *S).
        target: as `hard_pseudo_label` returns it.
        weight: (B, 1, *S). None: all weights are 1.
    """
    if regions:
        return F.binary_cross_entropy_with_logits(logits, target[:, : logits.shape[1]].to(logits.dtype), weight)
    losses = F.cross_entropy(logits, target[:, 0].long(), reduction="none")
    return (losses if weight is None else losses * weight[:, 0]).mean()


def soft_label_loss(loss, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """nnU-Net's Dice + CE towards probabilities instead of labels. It is smallest if both are equal.

    nnU-Net's own Dice does not have this property: if the target is 0.4 everywhere, predicting 1 everywhere is best. So
    its overlap, the sum of p t, is replaced by the sum of min(p, t), as in Wang et al., "Dice semimetric losses"
    (MICCAI 2023). Towards hard labels this is nnU-Net's loss.

    Args:
        loss: nnU-Net's `DC_and_CE_loss` or `DC_and_BCE_loss`, not wrapped for deep supervision.
        logits, target: (B, heads, *S). The target gets no gradient.
        weight: (B, 1, *S), at least 0, see `weighted_loss`. None: all voxels have the same weight.
    """
    target, dc = target.detach(), loss.dc
    weight = torch.ones_like(target[:, :1]) if weight is None else weight
    if isinstance(loss, DC_and_BCE_loss):
        ce = F.binary_cross_entropy_with_logits(logits, target, weight)
    else:
        ce = (F.cross_entropy(logits, target, reduction="none") * weight[:, 0]).mean()
    # MONAI's DiceLoss(soft_label=True) is the same for one process, but it cannot add up the sums of several
    p, first = dc.apply_nonlin(logits), 0 if dc.do_bg else 1
    over = (0, *range(2, p.ndim)) if dc.batch_dice else tuple(range(2, p.ndim))
    sums = torch.stack([(weight * x)[:, first:].sum(over) for x in (torch.minimum(p, target), p, target)])
    if dc.ddp and dc.batch_dice:  # the batch is that of all processes
        sums = AllGatherGrad.apply(sums).sum(0)
    overlap, predicted, true = sums
    dice = ((2 * overlap + dc.smooth) / (predicted + true + dc.smooth).clamp_min(1e-8)).mean()
    return loss.weight_ce * ce + loss.weight_dice * (share_without_weight(loss, weight) - dice)


def share_without_weight(loss, weight: Tensor) -> Tensor:
    """The share of samples whose weights are all 0. With `batch_dice` the batch is one sample, so it is 1 or 0.

    The Dice of such a sample is 1, but only because of the smoothing.
    """
    counts = weight.flatten(1).any(1)
    if loss.dc.batch_dice:
        counts = counts.any()
        if loss.dc.ddp:  # the batch is that of all processes
            counts = AllGatherGrad.apply(counts.float()).any()
    return (~counts).float().mean()
