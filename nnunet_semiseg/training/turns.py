"""Flips and right-angle turns between what a teacher sees and what its student sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isclose

import torch
from torch import Tensor

SAME_SPACING = 0.1
"""axes whose spacings differ by no more than this share can be turned into each other"""


@dataclass(frozen=True)
class Turn:
    """A flip along some axes, and then quarter turns in one plane. Shapes stay as they are.

    Attributes:
        flips: spatial axes, from 0.
        plane: the two spatial axes of the turn, of the same size.
        quarters: how often 90 degrees; 0 for none.
    """

    flips: tuple[int, ...] = ()
    plane: tuple[int, int] = (0, 1)
    quarters: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """An image, logits or a label (B, C, *S), turned."""
        x = x.flip([axis + 2 for axis in self.flips]) if self.flips else x
        a, b = self.plane
        return x.rot90(self.quarters, (a + 2, b + 2)).contiguous() if self.quarters else x


def draw_turn(axes: Sequence[int], planes: Sequence[tuple[int, int]]) -> Turn:
    """Each axis is flipped in half of the draws; of the planes one is drawn, and in it 0 to 3 quarter turns.

    The draws are made on the CPU, so that no step waits for the GPU.
    """
    flips = tuple(axis for axis in axes if torch.rand(()) < 0.5)
    if not planes:
        return Turn(flips)
    plane = planes[int(torch.randint(len(planes), ()))]
    return Turn(flips, plane, int(torch.randint(4, ())))


def planes_to_turn_in(
    axes: Sequence[int], patch_size: Sequence[int], spacing: Sequence[float]
) -> list[tuple[int, int]]:
    """The pairs of these axes along which a patch has the same number of voxels of (nearly) the same size.

    Args:
        axes: those that may be flipped; where none may, because texts name sides, nothing is turned either.
        patch_size, spacing: of the plans, in the same order.
    """
    return [
        (a, b)
        for a, b in combinations(sorted(axes), 2)
        if patch_size[a] == patch_size[b] and isclose(spacing[a], spacing[b], rel_tol=SAME_SPACING)
    ]
