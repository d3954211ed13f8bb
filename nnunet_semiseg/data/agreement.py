"""How much several label maps of one image agree. A training uses this to leave out cases, a review to rank them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def pairwise_dice(masks: Sequence[np.ndarray], classes: Sequence[int | Sequence[int]]) -> np.ndarray:
    """For each class, the mean Dice over all pairs of masks, 0 to 1. It is NaN if no mask has the class.

    If both masks of a pair lack a class that another mask has, the two agree: their Dice is 1.

    Args:
        masks: at least two label maps (*S).
        classes: for each class its label; for a region its labels.
    """
    somewhere = np.logical_or.reduce([mask != 0 for mask in masks])
    inside = [mask[somewhere] for mask in masks]
    found = []
    for labels in classes:
        members = [np.isin(mask, labels) for mask in inside]
        dices = []
        for a, b in itertools.combinations(members, 2):
            total = np.count_nonzero(a) + np.count_nonzero(b)
            dices.append(2 * np.count_nonzero(a & b) / total if total else 1.0)
        found.append(np.mean(dices) if any(member.any() for member in members) else np.nan)
    return np.array(found)


def mean_agreement(
    masks: Sequence[np.ndarray],
    classes: Sequence[int | Sequence[int]],
    expected: Sequence[int | Sequence[int]] = (),
) -> float:
    """The mean of `pairwise_dice` over the classes that at least one mask has. It is 1 if there is no such class.

    Args:
        masks, classes: see `pairwise_dice`.
        expected: the classes that the image must have. They count, too: if no mask has such a class, its Dice is 0.
    """
    dice = pairwise_dice(masks, classes)
    dice[np.isnan(dice) & np.array([labels in expected for labels in classes])] = 0
    return float(np.nanmean(dice)) if np.isfinite(dice).any() else 1.0
