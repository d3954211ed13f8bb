"""Turn an estimate of quality into an estimated Dice, with labelled cases that the model has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 4
"""The smallest number of cases: a line through fewer cases says nothing."""


@dataclass(frozen=True)
class Line:
    """A line: Dice = offset + slope * estimate, limited to 0 to 1. The slope is 0 or more."""

    offset: float
    slope: float

    @classmethod
    def fit(cls, estimates: Sequence[float], dices: Sequence[float]) -> Line:
        """Fit a line by least squares. If all estimates are equal, or the slope would be negative, the slope is 0."""
        x, y = np.asarray(estimates, float), np.asarray(dices, float)
        spread = ((x - x.mean()) ** 2).sum()
        slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / spread)) if spread > 1e-12 else 0.0
        return cls(float(y.mean() - slope * x.mean()), slope)

    def __call__(self, estimate: float) -> float:
        return float(np.clip(self.offset + self.slope * estimate, 0, 1))


@dataclass(frozen=True)
class Calibration:
    """A line for each class, and the error of the lines.

    Attributes:
        lines: the line of each class.
        cases: the number of labelled cases that they were fitted to.
        error: the mean absolute error of the estimated Dice of a class. For each case it is measured with a line
            through the other cases.
    """

    lines: dict[str, Line]
    cases: int
    error: float

    def __call__(self, name: str, estimate: float) -> float:
        return self.lines[name](estimate)


def calibrate(
    estimates: Sequence[dict[str, float]], dices: Sequence[dict[str, float]]
) -> tuple[Calibration | None, str]:
    """Make a calibration, and test it by leaving out one case at a time.

    Returns the calibration (None if there are fewer than `FEWEST` cases), and a sentence on it for `review.html`.

    Args:
        estimates, dices: the values by class, for each labelled case that the model has not seen.
    """
    n = len(estimates)
    if n < FEWEST:
        kept = "one labelled case was" if n == 1 else f"{n or 'no'} labelled cases were"
        return None, (
            f"Not calibrated: {kept} kept out of the training of all members, and {FEWEST} are needed. Estimates rank"
            " cases; they are not Dice values."
        )
    errors = []
    for name in estimates[0]:
        x, y = [e[name] for e in estimates], [d[name] for d in dices]
        for i in range(n):
            line = Line.fit(x[:i] + x[i + 1 :], y[:i] + y[i + 1 :])
            errors.append(abs(line(x[i]) - y[i]))
    lines = {name: Line.fit([e[name] for e in estimates], [d[name] for d in dices]) for name in estimates[0]}
    error = float(np.mean(errors))
    sentence = (
        f"Calibrated on {n} labelled cases that no member was trained on: predicted from the other cases, the Dice of a"
        f" class had an error of {error:.3f} on average."
    )
    return Calibration(lines, n, error), sentence
