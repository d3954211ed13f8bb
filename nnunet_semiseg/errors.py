"""Errors that the user can fix, and how they reach him."""

from __future__ import annotations

import sys
from types import TracebackType


class UserError(ValueError):
    """Something the user can fix. One line for each problem: which file, what is wrong, how to fix it."""


MOST_LINES = 30
"""of one error: a fault that all of 500 images share is seen in the first"""


def report(error: Exception) -> None:
    """The lines of an error on stderr; of very many the first, how many follow, and the last, which may sum them up."""
    *lines, last = str(error).splitlines() or [""]
    if left := max(0, len(lines) + 1 - MOST_LINES):
        lines = [*lines[: MOST_LINES - 2], f"... and {left + 1} more like these"]
    for line in (*lines, last):
        print(f"error: {line}", file=sys.stderr)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, UserError):
        report(error)
    else:
        _previous(kind, error, traceback)


# Not all roads lead through our own command: what a trainer refuses ends nnUNetv2_train.
_previous, sys.excepthook = sys.excepthook, _excepthook
