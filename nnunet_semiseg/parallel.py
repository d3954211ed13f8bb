"""Run jobs in processes. The death of a process is noticed at once, and all processes end if their parent dies."""

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
from typing import Any

from tqdm import tqdm

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.quiet import hide_foreign_warnings, hide_reader_warnings

DELAY = 10
"""The number of seconds until a progress bar appears."""


def run_jobs(function: Callable, jobs: list[tuple], num_processes: int, what: str | None = None) -> Generator:
    """Yield the result of `function(*job)` for every job as soon as it is done.

    Close the iterator to cancel jobs that wait.

    Args:
        num_processes: with 0 this process does the work.
        what: the name of the progress bar. It appears on a terminal if the jobs take more than 10 seconds.

    Raises:
        BrokenProcessPool: the system killed a worker (multiprocessing.Pool would wait for ever).
    """
    results = _run(function, jobs, num_processes)
    yield from results if what is None else tqdm(results, what, len(jobs), delay=DELAY, disable=None)


def _run(function: Callable, jobs: list[tuple], num_processes: int) -> Generator:
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
def killed_workers(place: Path | str, option: str = "-np") -> Iterator[None]:
    """Turn the error of a killed worker into one line for the user.

    Args:
        place: what the workers worked on.
        option: the option of the command for the number of workers.

    Raises:
        UserError: replaces BrokenProcessPool.
    """
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            f"{place}: a worker was killed, probably because memory ran out: run the same command again, with a smaller"
            f" {option}"
        ) from None


def _begin() -> None:
    hide_foreign_warnings()
    hide_reader_warnings()
    end_with_parent()


def end_with_parent() -> None:
    """End this process when its parent is killed. It is called in a process of multiprocessing.

    Otherwise the process would wait for ever, or write while the next run does. It may be called several times.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        _watch(parent, os.getpid())


@lru_cache  # a forked process inherits the cache, but it has another number than its parent
def _watch(parent: Any, process: int) -> None:
    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
