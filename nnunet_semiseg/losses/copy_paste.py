"""Copy boxes from one sample and paste them into another."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_semiseg.losses.segmentation import on_grid


def draw_box(x: Tensor, share: float, whole_first_axis: bool = False) -> Tensor:
    """Draw a box at random: (1, 1, *s), bool, True inside. Its sides are this share of those of x (B, C, *s).

    Args:
        whole_first_axis: the box goes through all slices along the first axis.
    """
    box = torch.zeros((1, 1, *x.shape[2:]), dtype=torch.bool, device=x.device)
    sides = [n if whole_first_axis and not axis else round(share * n) for axis, n in enumerate(x.shape[2:])]
    starts = [int(torch.randint(n - side + 1, ())) for n, side in zip(x.shape[2:], sides, strict=True)]  # on the CPU
    box[(..., *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))] = True
    return box


def paste(box: Tensor, x: Tensor, into: Tensor) -> Tensor:
    """x inside the box (1, 1, *S), the other image around it, (B, C, *s). For a coarser grid the box is resampled."""
    return torch.where(on_grid(box, x), x, into)


def draw_mixing_box(x: Tensor, often: float) -> Tensor:
    """The box of CutMix, as AD-MT and TraCoCo draw it: its sides are sqrt(b) of the patch's, b from Beta(4, 4).

    Args:
        often: the probability that there is one; else it is empty.
    """
    side = torch.distributions.Beta(4.0, 4.0).sample().sqrt()
    return draw_box(x, float((torch.rand(()) < often) * side))


def cut_mix(x: Tensor, box: Tensor) -> Tensor:
    """Each sample of x (B, C, *S) with the box of the sample before it; the first has that of the last."""
    return paste(box, x.roll(1, 0), x)


def pairs(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first n samples, and for each another one: the one before it; for the first one, the one after the last."""
    x = x[: n + 1]
    return x[:n], x.roll(1, 0)[:n]
