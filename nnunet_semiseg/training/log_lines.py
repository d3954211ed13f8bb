"""Lines of the training log: the cases, the settings, and the time when the training will end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from statistics import median


def cases_line(num_labeled: int, num_unlabeled: int, num_validation: int) -> str:
    """The line with the numbers of labelled, unlabelled and validation cases."""
    return f"training cases: {num_labeled} labelled, {num_unlabeled} unlabelled; validation cases: {num_validation}"


def settings_line(settings) -> str:
    """The line with the settings that differ from their defaults."""
    changed = {f.name: v for f in fields(settings) if (v := getattr(settings, f.name)) != f.default}
    listed = ", ".join(f"{name}={value}" for name, value in changed.items())
    return f"settings that differ from the defaults: {listed or 'none'}"


def expected_end(durations: Sequence[float], left: int, now: datetime) -> str:
    """Predict when the training will end, if its epochs take as long as the last ten did.

    Args:
        durations: the durations of the epochs until now, in seconds.
        left: the number of epochs that are still to come.
    """
    time = timedelta(seconds=round(left * median(durations[-10:])))
    return f"expected end: {now + time:%Y-%m-%d %H:%M}, in {time}"
