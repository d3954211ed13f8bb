"""Errors that the user can fix, and how they reach him."""

from __future__ import annotations

import sys
from types import TracebackType


class UserError(ValueError):
    """Something the user can fix. One line for each problem: which file, what is wrong, how to fix it."""


def report(error: Exception) -> None:
    """The lines of an error on stderr."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, UserError):
        report(error)
    else:
        _previous(kind, error, traceback)


# Not all roads lead through our own command: what a trainer refuses ends nnUNetv2_train.
_previous, sys.excepthook = sys.excepthook, _excepthook
