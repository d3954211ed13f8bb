"""nnU-Net's loss with deep supervision, for pseudo-labels and for a part of the voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.losses.segmentation import has_label, on_grid, soft_label_loss, weighted_loss


def finest_of(loss: nn.Module) -> nn.Module:
    """nnU-Net's loss for a single output, taken out of its deep supervision."""
    return loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss  # pyright: ignore[reportReturnType]


def pseudo_loss(loss: nn.Module, output, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """nnU-Net's loss towards a pseudo-label at full resolution. For coarser outputs the nearest voxels are taken.

    Args:
        loss: the loss of nnU-Net, with or without deep supervision.
        output: logits (B, heads, *S); with deep supervision a list of logits, from fine to coarse.
        target: as `hard_pseudo_label` returns it.
        weight: (B, 1, *S), at least 0, see `weighted_loss`. None: all voxels have the same weight.
    """

    def of_one(logits: Tensor) -> Tensor:
        if weight is None:
            return finest_of(loss)(logits, on_grid(target, logits))
        return weighted_loss(finest_of(loss), logits, on_grid(target, logits), on_grid(weight, logits))

    return _over_outputs(of_one, loss, output)


def soft_pseudo_loss(loss: nn.Module, output, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """`pseudo_loss` towards probabilities (B, heads, *S), with `soft_label_loss`.

    For coarser outputs the probabilities are averaged.
    """

    def of_one(logits: Tensor) -> Tensor:
        means = F.interpolate(target, logits.shape[2:], mode="area")
        return soft_label_loss(finest_of(loss), logits, means, None if weight is None else on_grid(weight, logits))

    return _over_outputs(of_one, loss, output)


def _over_outputs(of_one: Callable[..., Tensor], loss: nn.Module, output, *targets) -> Tensor:
    """Apply `of_one` to each output and its targets, and add the results with nnU-Net's weights of deep supervision."""
    if isinstance(loss, DeepSupervisionWrapper) and isinstance(output, (list, tuple)):
        return DeepSupervisionWrapper(of_one, loss.weight_factors)(output, *targets)
    return of_one(output, *targets)


def loss_where(loss: nn.Module, output, target, mask: Tensor, label_manager) -> Tensor:
    """nnU-Net's loss over those voxels of a mask that have a label. The mean is taken over these voxels only.

    Args:
        loss: the loss of nnU-Net, with or without deep supervision.
        output: logits; with deep supervision a list of logits, from fine to coarse.
        target: as nnU-Net's losses take it: a tensor, or a list if the output is a list. A single tensor at full
            resolution is allowed in both cases, as in `pseudo_loss`.
        mask: (1 or B, 1, *S), bool, at full resolution.
        label_manager: the `LabelManager` of nnU-Net.
    """

    def of_one(logits: Tensor, target: Tensor) -> Tensor:
        known = has_label(target, label_manager)
        weight = (on_grid(mask, logits) & known).float()
        target = target.masked_fill(~known, 0)
        return weighted_loss(finest_of(loss), logits, target, weight / weight.mean().clamp_min(1e-6))

    if isinstance(output, (list, tuple)) and isinstance(target, Tensor):
        target = [on_grid(target, logits) for logits in output]
    return _over_outputs(of_one, loss, output, target)


def mixed_loss(
    loss: nn.Module, output, target, pseudo_label: Tensor, is_labeled: Tensor, weight: float | Tensor, label_manager
) -> Tensor:
    """nnU-Net's loss with deep supervision for images with true labels in one part and pseudo-labels in the other.

    There is one Dice for the whole patch. With a Dice for each part, the Dice of a part without foreground would be of
    no use: nothing would keep the network from finding too much foreground there.

    Args:
        loss: the loss of nnU-Net, with or without deep supervision.
        output: logits, with deep supervision a list of logits, from fine to coarse.
        target: true labels, in the form that nnU-Net's losses take for this output.
        pseudo_label: at full resolution, in the form of `hard_pseudo_label`.
        is_labeled: (1 or B, 1, *S), bool, at full resolution: True where the true label is used.
        weight: how much a pseudo-labelled voxel counts, at least 0; a labelled one counts 1 and an ignored one 0.
            One number, or (B, 1, *S).
        label_manager: the `LabelManager` of nnU-Net.
    """

    def of_one(logits: Tensor, target: Tensor) -> Tensor:
        true = on_grid(is_labeled, logits)
        mixed = torch.where(true, target, on_grid(pseudo_label, logits).to(target))
        known = has_label(mixed, label_manager)
        of_pseudo = on_grid(weight, logits) if isinstance(weight, Tensor) else weight
        return weighted_loss(
            finest_of(loss), logits, mixed.masked_fill(~known, 0), torch.where(true, 1.0, of_pseudo) * known
        )

    return _over_outputs(of_one, loss, output, target)
