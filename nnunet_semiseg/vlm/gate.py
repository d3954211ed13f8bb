"""How far text masks can be trusted: measured on labelled cases, by which they are then used, or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

CANDIDATES = 50
"""thresholds that are tried: evenly spaced, and as many quantiles"""


MOST = 16
"""cases that are looked at"""


@dataclass(frozen=True)
class Example:
    """A labelled image; of a volume the slice that shows most of the labels.

    Attributes:
        image: (C, H, W), as nnU-Net has normalised it.
        labels: (K, H, W), bool.
        known: (H, W), False at the ignore label.
    """

    case: str
    image: np.ndarray
    labels: np.ndarray
    known: np.ndarray


def examples_of(data, cases: Sequence[str], labels: Sequence, ignore_label: int | None) -> list[Example]:
    """Up to 16 of the cases, spread over all of them.

    Args:
        data: nnU-Net's preprocessed cases.
        labels: the value of each class, or the values of each region.
    """
    examples = []
    for case in cases[:: max(math.ceil(len(cases) / MOST), 1)]:
        image, label = data.load_case(case)[:2]
        label = np.asarray(label[:])[0]
        known = np.ones_like(label, bool) if ignore_label is None else label != ignore_label
        i = int(((label > 0) & known).sum((1, 2)).argmax())
        of_classes = np.stack([np.isin(label[i], values) for values in labels])
        examples.append(Example(case, np.array(image[:, i], dtype=np.float32), of_classes, known[i]))
    return examples


@dataclass(frozen=True)
class Quality:
    """Of the masks of one class.

    Attributes:
        area: under the ROC curve, a mean over cases; 0.5 is chance, nan where no case shows the class.
        threshold: above which a mask has the highest mean Dice with the labels, and that Dice.
    """

    area: float
    threshold: float
    dice: float


def measure(masks: Sequence[np.ndarray], labels: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> Quality:
    """How well masks of one class find its labels.

    Args:
        masks: of each case (*S), in 0 to 1.
        labels: of each case (*S), bool. Cases that show nothing of the class, or nothing else, do not count.
        known: of each case (*S), False where the label is not known.
    """
    pairs = [(m[k].ravel(), y[k].ravel()) for m, y, k in zip(masks, labels, known, strict=True)]
    pairs = [(m, y) for m, y in pairs if y.any() and not y.all()]
    if not pairs:
        return Quality(float("nan"), 0.5, float("nan"))
    values = np.concatenate([m for m, _ in pairs])
    even = np.linspace(values.min(), values.max(), CANDIDATES, endpoint=False)
    thresholds = np.unique(np.r_[even, np.quantile(values, np.linspace(0, 1, CANDIDATES, endpoint=False))])
    scores = np.mean([[dice(m > t, y) for t in thresholds] for m, y in pairs], axis=0)
    best = int(scores.argmax())
    area = float(np.mean([roc_auc_score(y, m) for m, y in pairs]))
    return Quality(area, float(thresholds[best]), float(scores[best]))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |a and b| / (|a| + |b|) of bool arrays; b has a voxel."""
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
