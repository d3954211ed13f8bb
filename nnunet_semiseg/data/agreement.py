"""How much several label maps of one image agree. Trainings leave out cases by this, and reviews rank them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def pairwise_dice(masks: Sequence[np.ndarray], classes: Sequence[int | Sequence[int]]) -> np.ndarray:
    """The mean Dice over all pairs of masks, of every class, 0 to 1; NaN where no mask has the class.

    In a pair that has not the class, though another pair has, the two agree: 1.

    Args:
        masks: label maps (*S), at least two.
        classes: labels, or regions that are several of them.
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


def mean_agreement(masks: Sequence[np.ndarray], classes: Sequence[int | Sequence[int]]) -> float:
    """The mean of `pairwise_dice` over the classes that a mask has; 1 where none has any."""
    dice = pairwise_dice(masks, classes)
    return float(np.nanmean(dice)) if np.isfinite(dice).any() else 1.0
