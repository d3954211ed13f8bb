"""The loaders' processes, when a training ends before its time."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from typing import Any

from nnunet_semiseg.errors import UserError

DEAD = "background workers are no longer alive"
"""what batchgenerators says of a process that was killed, or could not load a case"""

THREAD = "results_loop"
"""of batchgenerators: fails where one of its processes does, and the main thread says so, too"""


@contextlib.contextmanager
def quiet_loaders(reasons: Any) -> Iterator[None]:
    """One line in place of batchgenerators' tracebacks, where a loader's process has ended.

    Args:
        reasons: a queue with what they could not read; see `ReadableCases`.

    Raises:
        UserError: one of them was killed, or failed.
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
            "a process that loads the data has ended: killed, often for want of memory (nnUNet_n_proc_DA sets how many"
            " there are), or it failed (what it said is above): go on with --c"
        ) from None
    finally:
        threading.excepthook = before


def stop(loader) -> None:
    """End the processes and the thread of one of nnU-Net's loaders, if it has any."""
    if hasattr(loader, "_finish"):
        with contextlib.redirect_stdout(io.StringIO()):  # as nnU-Net does
            loader._finish()
