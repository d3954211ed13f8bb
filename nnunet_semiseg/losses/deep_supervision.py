"""nnU-Net's loss with deep supervision: towards pseudo-labels, and over a part of the voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.losses.segmentation import has_label, on_grid, soft_label_loss, weighted_loss


def finest_of(loss: nn.Module) -> nn.Module:
    """nnU-Net's loss for a single output, without deep supervision."""
    return loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss  # pyright: ignore[reportReturnType]


def pseudo_loss(loss: nn.Module, output, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """nnU-Net's loss towards one target at full resolution. For coarser outputs the target is resampled (nearest).

    Args:
        loss: nnU-Net's, with or without deep supervision.
        output: logits (B, heads, *S); with deep supervision a list of them, from fine to coarse.
        target: as `hard_pseudo_label` returns it.
        weight: (B, 1, *S), at least 0, see `weighted_loss`. None: all voxels have the same weight.
    """

    def of_one(logits: Tensor) -> Tensor:
        if weight is None:
            return finest_of(loss)(logits, on_grid(target, logits))
        return weighted_loss(finest_of(loss), logits, on_grid(target, logits), on_grid(weight, logits))

    return _over_outputs(of_one, loss, output)


def soft_pseudo_loss(loss: nn.Module, output, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """`pseudo_loss` towards probabilities (B, heads, *S): `soft_label_loss`. For coarser outputs they are averaged."""

    def of_one(logits: Tensor) -> Tensor:
        means = F.interpolate(target, logits.shape[2:], mode="area")
        return soft_label_loss(finest_of(loss), logits, means, None if weight is None else on_grid(weight, logits))

    return _over_outputs(of_one, loss, output)


def _over_outputs(of_one: Callable[[Tensor], Tensor], loss: nn.Module, output) -> Tensor:
    """The sum of `of_one` over the outputs, with the weights of nnU-Net's deep supervision if there are several."""
    if isinstance(loss, DeepSupervisionWrapper) and isinstance(output, (list, tuple)):
        return DeepSupervisionWrapper(of_one, loss.weight_factors)(output)
    return of_one(output)


def loss_where(loss: nn.Module, output, target, mask: Tensor, label_manager) -> Tensor:
    """nnU-Net's loss over the labelled voxels of a mask. The mean is taken over these voxels, not over all.

    Args:
        loss: nnU-Net's, with or without deep supervision.
        output: logits; with deep supervision a list of them, from fine to coarse.
        target: as nnU-Net's losses take it: a tensor, or a list if the output is one. Or one tensor at full resolution,
            as in `pseudo_loss`.
        mask: (1 or B, 1, *S), bool, at full resolution.
        label_manager: nnU-Net's.
    """

    def of_one(logits: Tensor, target: Tensor) -> Tensor:
        known = has_label(target, label_manager)
        weight = (on_grid(mask, logits) & known).float()
        target = target.masked_fill(~known, 0)
        return weighted_loss(finest_of(loss), logits, target, weight / weight.mean().clamp_min(1e-6))

    if not isinstance(output, (list, tuple)):
        return of_one(output, target)
    targets = [on_grid(target, x) for x in output] if isinstance(target, Tensor) else target
    weights = loss.weight_factors if isinstance(loss, DeepSupervisionWrapper) else None
    return DeepSupervisionWrapper(of_one, weights)(output, targets)


def mixed_loss(
    loss: nn.Module, output, target, pseudo_label: Tensor, is_labeled: Tensor, weight: float | Tensor, label_manager
) -> Tensor:
    """nnU-Net's loss with its deep supervision where an image has partly true labels and partly pseudo-labels.

    There is one Dice for the whole patch. With a Dice for each part, a part without foreground would have no useful
    Dice, and nothing would keep the network from finding too much foreground there.

    Args:
        loss: nnU-Net's, with or without deep supervision.
        output: logits, with deep supervision a list of them from fine to coarse.
        target: true labels, in the form that nnU-Net's losses take for this output.
        pseudo_label: at full resolution, in the form of `hard_pseudo_label`.
        is_labeled: (1 or B, 1, *S), bool, at full resolution: where the target holds.
        weight: how much a pseudo-labelled voxel counts, at least 0; a labelled one counts 1 and an ignored one 0.
            One number, or (B, 1, *S).
        label_manager: nnU-Net's.
    """

    def of_one(logits: Tensor, target: Tensor) -> Tensor:
        true = on_grid(is_labeled, logits)
        mixed = torch.where(true, target, on_grid(pseudo_label, logits).to(target))
        known = has_label(mixed, label_manager)
        of_pseudo = on_grid(weight, logits) if isinstance(weight, Tensor) else weight
        return weighted_loss(
            finest_of(loss), logits, mixed.masked_fill(~known, 0), torch.where(true, 1.0, of_pseudo) * known
        )

    if not isinstance(output, (list, tuple)):
        return of_one(output, target)
    weights = loss.weight_factors if isinstance(loss, DeepSupervisionWrapper) else None
    return DeepSupervisionWrapper(of_one, weights)(output, target)
