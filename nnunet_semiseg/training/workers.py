"""End the processes that load data, and report their errors, when a training ends early."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

from nnunet_semiseg.errors import UserError

DEAD = "background workers are no longer alive"
"""A part of the error that batchgenerators raises when one of its processes was killed or could not load a case."""

THREAD = "results_loop"
"""The thread of batchgenerators that fails when one of its processes fails. The main thread reports this error, too."""


@contextlib.contextmanager
def quiet_loaders(reasons: Any) -> Iterator[None]:
    """Replace the tracebacks of batchgenerators by one line when a process that loads data has ended.

    Args:
        reasons: a queue with the errors of these processes, see `ReadableCases`.

    Raises:
        UserError: a process was killed, or failed. Other errors are not changed.
    """
    before = threading.excepthook
    threading.excepthook = lambda args: None if THREAD in getattr(args.thread, "name", "") else before(args)
    try:
        yield
    except RuntimeError as error:
        if DEAD not in str(error):
            raise
        if not reasons.empty():
            raise UserError(reasons.get()) from None
        raise UserError(
            "a process that loads the data has ended: it was killed, often because memory ran out (nnUNet_n_proc_DA"
            " sets the number of these processes), or it failed (its message is above): continue with --c"
        ) from None
    finally:
        threading.excepthook = before


def stop(loader) -> None:
    """End the processes and the thread of one of nnU-Net's loaders, if there are any."""
    if hasattr(loader, "_finish"):
        with contextlib.redirect_stdout(io.StringIO()):  # as nnU-Net does
            loader._finish()
