"""Sides that texts name (left, upper, ...), and how they change when an image is flipped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, product

import torch

VERTICAL, HORIZONTAL = SIDES = (0, 1)

HORIZONTAL_WORDS = ("left", "right"), ("leftmost", "rightmost"), ("leftward", "rightward")
"""The words for left and right that the pre-training exchanges. `AMVLMTrainer` has settings for them."""

WORD = r"[^\W_]+"
"""A pattern for a word. It also finds the parts of kidney_left."""

SidePairs = tuple[Sequence[tuple[str, ...]], Sequence[tuple[str, ...]]]
"""Pairs of words that are exchanged when an image is flipped: first the vertical pairs, then the horizontal pairs."""

Flip = tuple[bool, bool]
"""Whether an image is flipped vertically, and whether horizontally."""


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


@dataclass(frozen=True)
class NamedSides:
    """The sides that the texts of a training name, and which flips can be repeated in the texts.

    Attributes:
        axes: for each named side its axes of a patch. A flip along these axes makes a text false.
        swapped: the named sides of the flips after which the texts are true again, because words are exchanged.
        pairs: the words that are exchanged.
    """

    axes: dict[int, tuple[int, ...]]
    swapped: tuple[int, ...]
    pairs: SidePairs

    @classmethod
    def of(cls, texts: Iterable[str], pairs: SidePairs, plans: dict, n_dims: int, swap: bool) -> NamedSides:
        """Find the sides that texts name.

        Args:
            n_dims: the number of spatial axes of a patch.
            swap: whether flips exchange words. In volumes no flip exchanges vertical words, see `axes_of_sides`.
        """
        named, axes = named_sides(texts, pairs), axes_of_sides(plans, n_dims)
        # a slice may lack the axis of left and right: then it cannot be flipped along it
        exchanged = [bool(axes[side]) and (side == HORIZONTAL or is_flat(plans)) for side in (VERTICAL, HORIZONTAL)]
        swapped = tuple(side for side in named if swap and exchanged[side])
        return cls({side: axes[side] for side in named}, swapped, pairs)

    @property
    def flips(self) -> list[Flip]:
        """All combinations of the vertical and horizontal flips that exchange words. The first one is no flip."""
        vertical, horizontal = ((False, True) if side in self.swapped else (False,) for side in SIDES)
        return list(product(vertical, horizontal))

    def exchange(self, texts: Iterable[str], flip: Flip) -> list[str]:
        """The texts of an image after a flip."""
        return [exchange(text, flip, self.pairs) for text in texts]

    def axes_of(self, flip: Flip) -> list[int]:
        """The axes of a patch that a flip is along."""
        return [axis for side in SIDES if flip[side] for axis in self.axes[side]]

    def draw_flip(self) -> Flip:
        """Draw whether this batch is flipped vertically, and whether horizontally.

        A flip also exchanges words in its texts, such as left and right.
        """
        if not self.swapped:
            return False, False
        drawn = torch.rand(2) < 0.5
        vertical, horizontal = (bool(drawn[side]) and side in self.swapped for side in SIDES)
        return vertical, horizontal
