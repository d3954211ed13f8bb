"""Measure on labelled cases how good text masks are. Only good masks are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logit
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

CANDIDATES = 50
"""How many thresholds are tried at equal distances. As many quantiles of the masks are tried, too."""
STEPS = 65
"""The number of mask values, from 0 to 1, for which the result of `evidence` is stored."""
SUREST = 0.01
"""With any mask value, a class has at least this probability, and at most 1 minus this."""
MOST = 16
"""The largest number of cases that are measured."""


@dataclass(frozen=True)
class Example:
    """A labelled image. For a volume it is the slice with the most labelled voxels.

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
    """Up to 16 labelled images, of cases at equal distances in the list.

    Args:
        data: nnU-Net's preprocessed cases.
        labels: the value of each class, or the values of each region.
        ignore_label: its value. None if there is none.
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
    """The quality of the masks of one class.

    Attributes:
        area: the area under the ROC curve, a mean over cases. 0.5 is chance; nan if no case counts (see `measure`).
        threshold: the threshold of the masks that has the highest mean Dice. 0.5 if no case counts.
        dice: the highest mean Dice. nan if no case counts.
    """

    area: float
    threshold: float
    dice: float


def measure(masks: Sequence[np.ndarray], labels: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> Quality:
    """Measure how well the masks of one class find its labels.

    Args:
        masks: the mask of each case, (*S), in 0 to 1.
        labels: the label of each case, (*S), bool. A case does not count if no pixel has the class, or if all pixels
            have it.
        known: a mask for each case, (*S), False where the label is not known.
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


def evidence(masks: Sequence[np.ndarray], labels: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> np.ndarray:
    """The evidence (65,) that mask values from 0 to 1 give for their class; see `with_evidence`.

    It is the logit of the class's share among the pixels with this value, minus the logit of its share among all
    pixels. By isotonic regression, a higher value never has less evidence. For masks without information the evidence
    is 0.

    Args:
        masks, labels, known: as in `measure`. All cases count.
    """
    values, truth = (np.concatenate([x[k].ravel() for x, k in zip(xs, known, strict=True)]) for xs in (masks, labels))
    share = float(truth.mean()) if truth.size else 0.0
    if not 0 < share < 1:
        return np.zeros(STEPS)
    fit = IsotonicRegression(y_min=SUREST, y_max=1 - SUREST, out_of_bounds="clip").fit(values, truth)
    return logit(fit.predict(np.linspace(0, 1, STEPS))) - logit(np.clip(share, SUREST, 1 - SUREST))


def with_evidence(p: Tensor, masks: Tensor, table: Tensor) -> Tensor:
    """Change a teacher's probabilities by masks: sigmoid(logit(p) + the evidence of the mask's value).

    This is Bayes' rule, if the errors of mask and teacher are independent.

    Args:
        p, masks: (B, H, W), in 0 to 1.
        table: the result of `evidence`, (65,). Between its values it is interpolated.
    """
    place = masks.clamp(0, 1) * (len(table) - 1)
    low = place.floor().long().clamp(max=len(table) - 2)
    found = torch.lerp(table[low], table[low + 1], place - low)
    return (p.float().logit(eps=1e-4) + found).sigmoid()


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """The Dice 2 |a and b| / (|a| + |b|) of two bool arrays. b must not be empty."""
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
