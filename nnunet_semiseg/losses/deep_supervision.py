"""nnU-Net's loss with its deep supervision, towards pseudo-labels and over parts of an image."""

from __future__ import annotations

from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.losses.segmentation import has_label, on_grid, soft_label_loss, weighted_loss


def finest_of(loss: nn.Module) -> nn.Module:
    """nnU-Net's loss for the full resolution alone."""
    return loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss  # pyright: ignore[reportReturnType]


def pseudo_loss(loss: nn.Module, output, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """nnU-Net's loss towards one target at full resolution; coarser outputs get its nearest neighbours.

    Args:
        loss: nnU-Net's, with or without deep supervision.
        output: logits (B, heads, *S), with deep supervision a list of them from fine to coarse.
        target: as `hard_pseudo_label` returns it.
        weight: (B, 1, *S), at least 0, see `weighted_loss`; None: every voxel counts alike.
    """

    def of_one(logits: Tensor) -> Tensor:
        if weight is None:
            return finest_of(loss)(logits, on_grid(target, logits))
        return weighted_loss(finest_of(loss), logits, on_grid(target, logits), on_grid(weight, logits))

    if isinstance(loss, DeepSupervisionWrapper) and isinstance(output, (list, tuple)):
        return DeepSupervisionWrapper(of_one, loss.weight_factors)(output)
    return of_one(output)


def soft_pseudo_loss(loss: nn.Module, output, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """`pseudo_loss` towards probabilities (B, heads, *S), see `soft_label_loss`; coarser outputs get their means."""

    def of_one(logits: Tensor) -> Tensor:
        on_its_grid = F.interpolate(target, logits.shape[2:], mode="area")
        return soft_label_loss(
            finest_of(loss), logits, on_its_grid, None if weight is None else on_grid(weight, logits)
        )

    if isinstance(loss, DeepSupervisionWrapper) and isinstance(output, (list, tuple)):
        return DeepSupervisionWrapper(of_one, loss.weight_factors)(output)
    return of_one(output)


def loss_where(loss: nn.Module, output, target, mask: Tensor, label_manager) -> Tensor:
    """nnU-Net's loss over the voxels of a mask that have a label: a mean over these, not over all.

    Args:
        loss: nnU-Net's, with or without deep supervision.
        output: logits, with deep supervision a list of them from fine to coarse.
        target: as nnU-Net's losses take it, of the same form; or one tensor at full resolution, as in `pseudo_loss`.
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
