"""Estimate how good a prediction is without its label, from its probabilities and the members of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_semiseg.data.agreement import pairwise_dice

Labels = Mapping[str, int | Sequence[int]]

ESTIMATES = {
    "combined": "agreement times expected",
    "agreement": "mean Dice of all pairs of members",
    "expected": "Dice that is expected from the probabilities",
    "certainty": "mean probability of the class where it was predicted",
}
"""The key of each estimate and what it means. By default the first one ranks the cases; with one member `expected`
does, because the two before it need several."""


def classes_of(labels: Labels) -> dict[str, int | Sequence[int]]:
    """The classes or regions of dataset.json, without the background and the ignore label."""
    return {name: value for name, value in labels.items() if name not in ("background", "ignore")}


def agreement(masks: Sequence[np.ndarray], labels: Labels) -> dict[str, float]:
    """For each class the mean Dice over all pairs of masks, 0 to 1. It is 1 if all agree that the class is missing.

    Zenk et al. (Medical Image Analysis 101, 2025) compared ways to find failed segmentations on several data sets. The
    pairwise Dice of an ensemble was the best of them.

    Args:
        masks: label maps (*S) of at least two members.
    """
    classes = classes_of(labels)
    dice = np.nan_to_num(pairwise_dice(masks, list(classes.values())), nan=1.0)
    return dict(zip(classes, dice.tolist(), strict=True))


def expected_dice(mask: np.ndarray, probabilities: Mapping[str, np.ndarray], labels: Labels) -> dict[str, float]:
    """For each class 2 sum(p m) / (sum(p) + sum(m)).

    This is the Dice of the mask m if the probabilities p were the truth.

    If a class was not predicted, the result is 1 minus the largest probability of the class.
    """
    found = {}
    for name, label in classes_of(labels).items():
        m, p = np.isin(mask, label), probabilities[name]
        found[name] = float(2 * p[m].sum() / (p.sum() + m.sum()) if m.any() else 1 - p.max())
    return found


def certainty(mask: np.ndarray, probabilities: Mapping[str, np.ndarray], labels: Labels) -> dict[str, float]:
    """For each class, the mean probability where it was predicted. If it was not, 1 minus its largest probability."""
    found = {}
    for name, label in classes_of(labels).items():
        m, p = np.isin(mask, label), probabilities[name]
        found[name] = float(p[m].mean() if m.any() else 1 - p.max())
    return found


def uncertainty_map(probabilities: np.ndarray, regions: bool) -> np.ndarray:
    """For each voxel, the entropy of its probabilities in per cent of the largest possible entropy: (*S), uint8.

    Args:
        probabilities: (K, *S), of all classes with the background; or of regions, then the most uncertain region
            of a voxel counts.
    """
    p = np.clip(probabilities, 1e-7, 1)
    if regions:
        q = np.clip(1 - probabilities, 1e-7, 1)
        entropy = (-(p * np.log(p) + q * np.log(q)) / np.log(2)).max(0)
    else:
        entropy = -(p * np.log(p)).sum(0) / np.log(len(p))
    return np.round(100 * entropy.clip(0, 1)).astype(np.uint8)
