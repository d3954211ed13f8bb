"""From agreement to Dice: what labelled cases that the model has not seen teach about its estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 4
"""cases: with fewer, a line through them says nothing"""


@dataclass(frozen=True)
class Line:
    """Dice = offset + slope * estimate, within 0 and 1; the slope is 0 or more."""

    offset: float
    slope: float

    @classmethod
    def fit(cls, estimates: Sequence[float], dices: Sequence[float]) -> Line:
        """By least squares; a level one where the estimates are all alike, or say the opposite of the truth."""
        x, y = np.asarray(estimates, float), np.asarray(dices, float)
        spread = ((x - x.mean()) ** 2).sum()
        slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / spread)) if spread > 1e-12 else 0.0
        return cls(float(y.mean() - slope * x.mean()), slope)

    def __call__(self, estimate: float) -> float:
        return float(np.clip(self.offset + self.slope * estimate, 0, 1))


@dataclass(frozen=True)
class Calibration:
    """Lines of the classes, and how far they are off.

    Attributes:
        lines: by class.
        cases: how many labelled cases they are made of.
        error: the mean absolute error of the Dice of a class, each case told by a line through the others.
    """

    lines: dict[str, Line]
    cases: int
    error: float

    def __call__(self, name: str, estimate: float) -> float:
        return self.lines[name](estimate)


def calibrate(
    estimates: Sequence[dict[str, float]], dices: Sequence[dict[str, float]]
) -> tuple[Calibration | None, str]:
    """A calibration, judged by leaving one case out, or None; and a sentence that says so.

    Args:
        estimates, dices: of each labelled case that the model has not seen, by class.
    """
    n = len(estimates)
    if n < FEWEST:
        kept = "one labelled case was" if n == 1 else f"{n or 'no'} labelled cases were"
        return None, (
            f"Not calibrated: {kept} kept from all members, and {FEWEST} are needed. Estimates rank cases; they are no"
            " Dice."
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
        f"Calibrated on {n} labelled cases that no member was trained on: told from the others, a class's Dice was off"
        f" by {error:.3f} on average."
    )
    return Calibration(lines, n, error), sentence
