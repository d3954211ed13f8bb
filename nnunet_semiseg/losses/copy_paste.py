"""Copy-paste of boxes between samples."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_semiseg.losses.segmentation import on_grid


def draw_box(x: Tensor, share: float, whole_first_axis: bool = False) -> Tensor:
    """(1, 1, *s), bool, True in a box at a random place with this share of each side of x (B, C, *s).

    Args:
        whole_first_axis: the box goes through all slices along the first axis.
    """
    box = torch.zeros((1, 1, *x.shape[2:]), dtype=torch.bool, device=x.device)
    sides = [n if whole_first_axis and not axis else round(share * n) for axis, n in enumerate(x.shape[2:])]
    starts = [int(torch.randint(n - side + 1, ())) for n, side in zip(x.shape[2:], sides, strict=True)]  # on the CPU
    box[(..., *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))] = True
    return box


def paste(box: Tensor, x: Tensor, into: Tensor) -> Tensor:
    """x within the box (1, 1, *S), the other around it; on a coarser grid the box is, too. Shape: (B, C, *s)."""
    return torch.where(on_grid(box, x), x, into)


def pairs(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first n samples, and for each of them another: the one before it, of the first the one behind the last."""
    x = x[: n + 1]
    return x[:n], x.roll(1, 0)[:n]
