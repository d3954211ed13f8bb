"""Jobs in processes that are noticed when they die, and that die with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.quiet import hide_foreign_warnings, hide_reader_warnings


def run_jobs(function: Callable, jobs: list[tuple], num_processes: int) -> Generator:
    """`function(*job)` of every job, as they are done; close the iterator to cancel those not begun.

    Args:
        num_processes: 0 works in this process.

    Raises:
        BrokenProcessPool: the system killed a worker (multiprocessing.Pool would wait for ever).
    """
    if num_processes == 0 or not jobs:
        yield from (function(*job) for job in jobs)
        return
    executor = ProcessPoolExecutor(
        min(num_processes, len(jobs)), multiprocessing.get_context("spawn"), initializer=_begin
    )
    try:
        for future in as_completed([executor.submit(function, *job) for job in jobs]):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def killed_workers(place: Path | str) -> Iterator[None]:
    """Say in one line that the system killed a worker.

    Args:
        place: what was worked on.

    Raises:
        UserError: in place of BrokenProcessPool.
    """
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            f"{place}: a preprocessing worker was killed, probably for want of memory: run the same command again, with"
            " a smaller -np; what is done is kept"
        ) from None


def _begin() -> None:
    hide_foreign_warnings()
    hide_reader_warnings()
    end_with_parent()


def end_with_parent() -> None:
    """In a process of multiprocessing's: a parent that was killed ends this one.

    Else it would wait for ever, or write beside the next run. It may be called as often as one likes.
    """
    if multiprocessing.parent_process() is not None:
        _watch_parent(os.getpid())


@lru_cache  # what is forked has the cache of its parent, and another number
def _watch_parent(process: int) -> None:
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
