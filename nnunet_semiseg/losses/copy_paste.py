"""Copy boxes from one sample and paste them into another."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_semiseg.losses.segmentation import on_grid


def draw_box(x: Tensor, share: float, whole_first_axis: bool = False) -> Tensor:
    """Draw a box at a random place: (1, 1, *s), bool, True inside.

    The sides of the box are a given share of the sides of x (B, C, *s).

    Args:
        whole_first_axis: the box goes through all slices along the first axis.
    """
    box = torch.zeros((1, 1, *x.shape[2:]), dtype=torch.bool, device=x.device)
    sides = [n if whole_first_axis and not axis else round(share * n) for axis, n in enumerate(x.shape[2:])]
    starts = [int(torch.randint(n - side + 1, ())) for n, side in zip(x.shape[2:], sides, strict=True)]  # on the CPU
    box[(..., *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))] = True
    return box


def paste(box: Tensor, x: Tensor, into: Tensor) -> Tensor:
    """Paste the part of x in a box (1, 1, *S) into another image. Both are (B, C, *s).

    The box is resampled to their grid.
    """
    return torch.where(on_grid(box, x), x, into)


def draw_mixing_box(x: Tensor, often: float) -> Tensor:
    """Draw the box of CutMix in AD-MT and TraCoCo: (1, 1, *s), bool, True inside. All samples of x (B, C, *s) share it.

    The sides of the box are sqrt(b) times the sides of the patch, with b from Beta(4, 4).

    Args:
        often: the probability that there is a box. Otherwise the box is empty.
    """
    side = torch.distributions.Beta(4.0, 4.0).sample().sqrt()
    return draw_box(x, float((torch.rand(()) < often) * side))


def cut_mix(x: Tensor, box: Tensor) -> Tensor:
    """Paste into each sample of x (B, C, *S) a box of the sample before it.

    The first sample gets it from the last one.
    """
    return paste(box, x.roll(1, 0), x)


def pairs(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first n samples, and a partner for each: the sample before it.

    The partner of the first sample is the sample after the n-th one, or the n-th one itself if there are no more.
    """
    x = x[: n + 1]
    return x[:n], x.roll(1, 0)[:n]
