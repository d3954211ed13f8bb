"""Sides that texts name (left, upper, ...), and what flipping an image makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain

VERTICAL, HORIZONTAL = SIDES = (0, 1)

WORD = r"[^\W_]+"
"""in kidney_left, too"""

SidePairs = tuple[Sequence[tuple[str, ...]], Sequence[tuple[str, ...]]]
"""pairs of words that change places when an image is flipped: the vertical ones, and the horizontal ones"""


def named_sides(texts: Iterable[str], pairs: SidePairs) -> list[int]:
    """Which sides texts speak of, of VERTICAL and HORIZONTAL."""
    words = set(re.findall(WORD, " ".join(texts).lower()))
    return [side for side in SIDES if words & {word.lower() for word in chain(*pairs[side])}]


def is_flat(plans: dict) -> bool:
    """Whether the images are 2d; nnU-Net reads them as volumes of one slice."""
    return plans["original_median_shape_after_transp"][list(plans["transpose_forward"]).index(0)] == 1


def axes_of_sides(plans: dict, n_dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a patch that vertical words, and those that horizontal ones are about.

    nnU-Net reads images as (z, y, x), and then transposes them by the plans. Left and right are along x; upper and
    lower of a 2d image along y, of a volume along z or (anterior, posterior) y: which one is meant nobody knows.
    """
    order = list(plans["transpose_forward"])
    first = len(order) - n_dims  # the first axis of a volume is not in a 2d patch
    sides = ((1,) if is_flat(plans) else (0, 1)), (2,)
    return tuple(tuple(sorted(order.index(a) - first for a in axes if order.index(a) >= first)) for axes in sides)


def exchange(text: str, flip: Sequence[bool], pairs: SidePairs) -> str:
    """The text of a flipped image: the words of each pair change places along a flipped axis."""
    other = {}
    for flipped, words in zip(flip, pairs, strict=True):
        if flipped:
            for a, b in words:
                other |= {a.lower(): b, b.lower(): a}

    def exchanged(match: re.Match) -> str:
        word = other.get(match[0].lower(), match[0])
        return word.capitalize() if match[0][0].isupper() else word

    return re.sub(WORD, exchanged, text)
