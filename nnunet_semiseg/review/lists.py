"""Sort cases. For correction, those that are probably wrong come first; for labelling, those that teach the most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def for_correction(dices: Mapping[str, float], reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """Sort by the estimated Dice, the lowest first. Of two equal cases, the one with more reasons comes first."""
    return sorted(dices, key=lambda case: (dices[case], -len(reasons[case]), case))


def for_labelling(
    dices: Mapping[str, float], features: Mapping[str, Sequence[float]], labeled_features: Sequence[Sequence[float]]
) -> list[str]:
    """Choose one case after the other: the one with the largest product of uncertainty and distance to earlier ones.

    The uncertainty is 1 minus the estimated Dice. The distance is that to the nearest labelled case or earlier case of
    the list, between features that are standardised over all cases. So the first cases are neither many of one kind nor
    outliers on which all members agree.

    Args:
        features: the features of each case. All have the same length.
        labeled_features: the features of labelled cases. There may be none.

    Returns:
        All cases, the first chosen one first.
    """
    cases = sorted(dices)
    every = np.array([*(features[case] for case in cases), *labeled_features], float)
    every = (every - every.mean(0)) / np.where(every.std(0) > 0, every.std(0), 1)
    points, known = every[: len(cases)], every[len(cases) :]
    uncertainty = np.array([1 - dices[case] for case in cases])
    nearest = np.full(len(cases), 1.0)
    if len(known):
        nearest = np.linalg.norm(points[:, None] - known[None], axis=2).min(1)
    left, order = list(range(len(cases))), []
    while left:
        best = max(left, key=lambda i: (uncertainty[i] * nearest[i], uncertainty[i]))
        order.append(cases[best])
        left.remove(best)
        distance = np.linalg.norm(points - points[best], axis=1)
        nearest = np.minimum(nearest, distance) if len(known) or len(order) > 1 else distance
    return order


def at_random(cases: Sequence[str], seed: int = 0) -> list[str]:
    """All cases in a random order that depends only on their names and the seed."""
    return [str(case) for case in np.random.default_rng(seed).permutation(sorted(cases))]
