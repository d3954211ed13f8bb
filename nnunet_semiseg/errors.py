"""Errors that the user can fix, and how they are shown."""

from __future__ import annotations

import sys
from types import TracebackType


class UserError(ValueError):
    """An error that the user can fix. It has one line for each problem: which file, what is wrong, how to fix it."""


MOST_LINES = 30
"""At most this number of lines is printed for one error. If 500 images have the same fault, the first lines show it."""


def report(error: Exception) -> None:
    """Print the lines of an error to stderr.

    If there are very many: the first ones, how many are not shown, and the last one.
    """
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


# nnU-Net's own commands do not pass through ours. This hook shows errors of our trainers in nnUNetv2_train, too.
_previous, sys.excepthook = sys.excepthook, _excepthook
