"""Flips and right-angle turns between the view of the teacher and that of the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isclose

import torch
from torch import Tensor

SAME_SPACING = 0.1
"""Two axes of equal size can be turned into each other if their spacings differ by at most this share."""


@dataclass(frozen=True)
class Turn:
    """Flips along some axes, then quarter turns in one plane. The shape does not change.

    Attributes:
        flips: the spatial axes that are flipped, counted from 0.
        plane: the two spatial axes of the turn. They have the same size.
        quarters: the number of turns by 90 degrees.
    """

    flips: tuple[int, ...] = ()
    plane: tuple[int, int] = (0, 1)
    quarters: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Turn an image, logits or a label (B, C, *S)."""
        x = x.flip([axis + 2 for axis in self.flips]) if self.flips else x
        a, b = self.plane
        return x.rot90(self.quarters, (a + 2, b + 2)).contiguous() if self.quarters else x


NO_TURN = Turn()


def draw_turn(axes: Sequence[int], planes: Sequence[tuple[int, int]]) -> Turn:
    """Draw a turn at random: each axis is flipped with probability 1/2; one plane is turned by 0 to 3 quarters.

    The random numbers are made on the CPU, so that no step waits for the GPU.
    """
    flips = tuple(axis for axis in axes if torch.rand(()) < 0.5)
    if not planes:
        return Turn(flips)
    plane = planes[int(torch.randint(len(planes), ()))]
    return Turn(flips, plane, int(torch.randint(4, ())))


def planes_to_turn_in(
    axes: Sequence[int], patch_size: Sequence[int], spacing: Sequence[float]
) -> list[tuple[int, int]]:
    """The pairs of axes along which a patch has the same number of voxels and (nearly) the same spacing.

    Args:
        axes: the axes that may be flipped. If texts name sides (left, upper), there are none, and nothing is turned.
        patch_size, spacing: the values of the plans, in the same order of axes.
    """
    return [
        (a, b)
        for a, b in combinations(sorted(axes), 2)
        if patch_size[a] == patch_size[b] and isclose(spacing[a], spacing[b], rel_tol=SAME_SPACING)
    ]
