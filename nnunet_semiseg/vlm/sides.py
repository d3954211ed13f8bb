"""Sides that texts name (left, upper, ...), and how they change when an image is flipped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain

VERTICAL, HORIZONTAL = SIDES = (0, 1)

HORIZONTAL_WORDS = ("left", "right"), ("leftmost", "rightmost"), ("leftward", "rightward")
"""The words for left and right that the pre-training exchanges. `AMVLMTrainer` has settings for them."""

WORD = r"[^\W_]+"
"""A pattern for a word. It also finds the parts of kidney_left."""

SidePairs = tuple[Sequence[tuple[str, ...]], Sequence[tuple[str, ...]]]
"""Pairs of words that are exchanged when an image is flipped: first the vertical pairs, then the horizontal pairs."""


def named_sides(texts: Iterable[str], pairs: SidePairs) -> list[int]:
    """The sides that texts name: VERTICAL, HORIZONTAL or both."""
    words = set(re.findall(WORD, " ".join(texts).lower()))
    return [side for side in SIDES if words & {word.lower() for word in chain(*pairs[side])}]


def is_flat(plans: dict) -> bool:
    """Whether the images are 2d. nnU-Net reads these as volumes of one slice."""
    return plans["original_median_shape_after_transp"][list(plans["transpose_forward"]).index(0)] == 1


def axes_of_sides(plans: dict, n_dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a patch that vertical words mean, and the axes that horizontal words mean.

    nnU-Net reads images as (z, y, x) and then transposes them as the plans say. Left and right are along x. Upper and
    lower are along y in a 2d image. In a volume they may be along z, or along y (anterior and posterior); the words do
    not say which.
    """
    order = list(plans["transpose_forward"])
    first = len(order) - n_dims  # a 2d patch does not have the first axis of a volume
    sides = ((1,) if is_flat(plans) else (0, 1)), (2,)
    return tuple(tuple(sorted(order.index(a) - first for a in axes if order.index(a) >= first)) for axes in sides)


def exchange(text: str, flip: Sequence[bool], pairs: SidePairs) -> str:
    """Change a text for a flipped image: for each flipped axis, the words of each pair are exchanged."""
    other = {}
    for flipped, words in zip(flip, pairs, strict=True):
        if flipped:
            for a, b in words:
                other |= {a.lower(): b, b.lower(): a}

    def exchanged(match: re.Match) -> str:
        word = other.get(match[0].lower(), match[0])
        return word.capitalize() if match[0][0].isupper() else word

    return re.sub(WORD, exchanged, text)
