"""How good a prediction is, told without its label: from what several members of an ensemble say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_semiseg.data.agreement import pairwise_dice

Labels = Mapping[str, int | Sequence[int]]

ESTIMATES = {
    "agreement": "mean Dice of all pairs of members",
    "expected": "Dice that the probabilities lead one to expect",
    "certainty": "mean probability of the class where it was predicted",
}
"""each estimate's key, and what it is; the first one where there are several members is what cases are ranked by"""


def classes_of(labels: Labels) -> dict[str, int | Sequence[int]]:
    """The classes or regions of dataset.json, without background and what is ignored."""
    return {name: value for name, value in labels.items() if name not in ("background", "ignore")}


def agreement(masks: Sequence[np.ndarray], labels: Labels) -> dict[str, float]:
    """The mean Dice over all pairs of masks, of every class, 0 to 1; 1 where all agree that a class is not there.

    Zenk et al. (Medical Image Analysis 101, 2025) compared ways to find failed segmentations on several data sets: the
    pairwise Dice of an ensemble was the best of them.

    Args:
        masks: label maps (*S) of at least two members.
    """
    classes = classes_of(labels)
    dice = np.nan_to_num(pairwise_dice(masks, list(classes.values())), nan=1.0)
    return dict(zip(classes, dice.tolist(), strict=True))


def expected_dice(mask: np.ndarray, probabilities: Mapping[str, np.ndarray], labels: Labels) -> dict[str, float]:
    """2 sum(p m) / (sum(p) + sum(m)) of every class: the Dice of the mask m with probabilities p taken for the truth.

    Where a class was not predicted it is 1 minus the largest probability of it.
    """
    found = {}
    for name, label in classes_of(labels).items():
        m, p = np.isin(mask, label), probabilities[name]
        found[name] = float(2 * p[m].sum() / (p.sum() + m.sum()) if m.any() else 1 - p.max())
    return found


def certainty(mask: np.ndarray, probabilities: Mapping[str, np.ndarray], labels: Labels) -> dict[str, float]:
    """The mean probability of every class where it was predicted, else 1 minus the largest one."""
    found = {}
    for name, label in classes_of(labels).items():
        m, p = np.isin(mask, label), probabilities[name]
        found[name] = float(p[m].mean() if m.any() else 1 - p.max())
    return found


def uncertainty_map(probabilities: np.ndarray, regions: bool) -> np.ndarray:
    """The entropy in per cent of the largest one there can be, (*S), uint8.

    Args:
        probabilities: (K, *S), of classes with the background, or of regions, of which the most uncertain one counts.
    """
    p = np.clip(probabilities, 1e-7, 1)
    if regions:
        q = np.clip(1 - probabilities, 1e-7, 1)
        entropy = (-(p * np.log(p) + q * np.log(q)) / np.log(2)).max(0)
    else:
        entropy = -(p * np.log(p)).sum(0) / np.log(len(p))
    return np.round(100 * entropy.clip(0, 1)).astype(np.uint8)
