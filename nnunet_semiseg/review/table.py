"""The table of a review: one row for each case, in the order of the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from nnunet_semiseg.review import lists, signs
from nnunet_semiseg.review.calibration import Calibration, calibrate


@dataclass(frozen=True)
class Reviewed:
    """What is known about a case.

    Attributes:
        estimates: for each estimate (see `estimates.ESTIMATES`) its value for each class.
        features: the features of the encoder.
        dice: for each class the true Dice, if the case is labelled and no member has seen it.
    """

    case: str
    estimates: dict[str, dict[str, float]]
    signs: signs.Signs
    features: list[float]
    is_volume: bool
    dice: dict[str, float] | None = None
    ranked_by: dict[str, float] = field(default_factory=dict)
    """For each class, the value of the estimate by which cases are ranked."""


@dataclass
class Table:
    """What `review.html` and `cases.csv` show.

    Attributes:
        rows: columns `rank`, `case`, `dice` (estimated), `dice CLASS`, `reasons`, and the mean of every estimate.
        sentence: a sentence that says whether the estimates are calibrated, and how well.
        purpose: what the list is for (`--for`).
    """

    rows: pd.DataFrame
    classes: list[str]
    sentence: str
    is_calibrated: bool
    purpose: str


def tabulate(
    reviewed: Sequence[Reviewed], labeled_cases: Sequence[Reviewed], purpose: str, channels: Sequence[str]
) -> Table:
    """Make the table of these cases.

    A missing class that all labelled cases have counts as a Dice of 0, because members may also agree on a wrong
    result.

    Args:
        labeled_cases: at least one labelled case.
    """
    known = [case for case in labeled_cases if case.dice is not None]
    calibration, sentence = calibrate([c.ranked_by for c in known], [c.dice or {} for c in known])
    unit = "ml" if any(c.is_volume for c in labeled_cases) else "cm2"
    usual = signs.Usual.of([c.signs for c in labeled_cases], unit)
    little = signs.least_agreed({c.case: c.estimates.get("agreement", {}) for c in reviewed})
    reasons = {c.case: [*signs.reasons(c.signs, usual, channels), *little[c.case]] for c in reviewed}
    dices = {c.case: _dices(c, usual, calibration) for c in reviewed}
    means = {case: float(np.mean(list(of.values()))) for case, of in dices.items()}
    if purpose == "labelling":
        order = lists.for_labelling(
            means, {c.case: _features(c) for c in reviewed}, [_features(c) for c in labeled_cases]
        )
    elif purpose == "random":
        order = lists.at_random(list(means))
    else:
        order = lists.for_correction(means, reasons)
    by_name = {c.case: c for c in reviewed}
    rows = [
        {
            "rank": rank,
            "case": case,
            "dice": means[case],
            **{f"dice {name}": dice for name, dice in dices[case].items()},
            "reasons": "; ".join(reasons[case]),
            **{name: float(np.mean(list(of.values()))) for name, of in by_name[case].estimates.items()},
        }
        for rank, case in enumerate(order, 1)
    ]
    return Table(pd.DataFrame(rows), list(next(iter(dices.values()))), sentence, calibration is not None, purpose)


def _dices(case: Reviewed, usual: signs.Usual, calibration: Calibration | None) -> dict[str, float]:
    missing = usual.missing(case.signs)
    told = {n: calibration(n, e) if calibration else e for n, e in case.ranked_by.items()}
    return {name: 0.0 if name in missing else dice for name, dice in told.items()}


def _features(case: Reviewed) -> list[float]:
    """The features of the encoder. If there are none, the volumes and the intensities of the case."""
    if case.features:
        return case.features
    return [*np.log1p(list(case.signs.volumes.values())), *np.ravel(case.signs.intensities)]
