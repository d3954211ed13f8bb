"""Work that is done in separate processes: trainings and predictions; see `worker.py`."""

from __future__ import annotations

import queue
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.request import Request, TestSet
from nnunet_semiseg.evaluation.scores import signature
from nnunet_semiseg.evaluation.work import Process
from nnunet_semiseg.files import disk_errors, make_folder, only_one, read_json, write_json
from nnunet_semiseg.runs import RECORD, Run

PREDICT_AGAIN = "remove its folder to predict again"
SECONDS = 10
"""The number of seconds between two looks at the logs of trainings."""
LOGS, LOCK = "logs", "evaluation.lock"
"""Names in the folder of a report: the folder for the output of jobs, and the lock of the process that works there."""


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Make the folder of a report, and keep other processes out of it.

    Raises:
        BusyError: another process works there.
        DiskError: the disk is full or read-only.
    """
    with disk_errors(output):
        make_folder(output / LOGS)
        with only_one(output / LOCK, "works on this report"):
            yield


@dataclass(frozen=True)
class Job:
    """Work for a separate process.

    Attributes:
        name: the name of the job's files in the folder `logs`, without their ending.
        title: what messages call the job.
        content: the name (`job`) and the arguments of a function in `worker.py`, or a `command` of this package.
    """

    name: str
    title: str
    content: dict


def training_job(run: Run, device: str) -> Job:
    """The job that trains a run with `nnUNetv2_train` and the settings in its plans."""
    content = {"job": "train", "words": run.train_command(device), "folder": str(run.folder)}
    return Job(f"train_{run.dataset}_{run.name}", f"training {run.title} ({run.dataset})", content)


def prediction_job(run: Run, noise: float, request: Request, test_set: TestSet, output: Path) -> Job:
    """The job that predicts the test images. The noise is a standard deviation in units of the normalised intensity."""
    folder = predictions_folder(run, noise, output)
    images = list(test_set.images.values())
    signed = [run.checkpoint, *(Path(file) for files in images for file in files)]
    settings = {"mirroring": request.mirroring, "noise": noise, "files": [signature(file) for file in signed]}
    content = {
        "job": "predict",
        "model": str(run.model_folder),
        "fold": run.fold,
        "images": images,
        "output": str(folder),
        "device": request.device,
        "mirroring": request.mirroring,
        "noise": noise,
        "settings": settings,
    }
    suffix = f", noise {noise:g}" if noise else ""
    return Job(f"predict_{folder.name}", f"predicting with {run.title}{suffix} ({run.dataset})", content)


def predictions_folder(run: Run, noise: float, output: Path) -> Path:
    """The folder for the predictions of a run with this noise. Without noise, its name does not mention noise."""
    suffix = f"__noise{noise:g}" if noise else ""
    return output / "predictions" / f"{run.dataset}__{run.name}__fold_{run.fold}{suffix}"


def is_predicted(job: Job, test_set: TestSet) -> bool:
    """Whether the predictions are complete and belong to this checkpoint, these images and these settings."""
    folder = Path(job.content["output"])
    if not all((folder / f"{case}{test_set.file_ending}").is_file() for case in test_set.images):
        return False
    record = folder / RECORD
    return record.is_file() and read_json(record, PREDICT_AGAIN).get("settings") == job.content["settings"]


def do_all(jobs: list[Job], devices: list[str], logs: Path, start: Callable[..., Any] | None = None) -> None:
    """Run each job in its own process, as many at a time as there are devices. Their output goes to `logs`.

    On a terminal, a bar counts the jobs that are done and shows when the trainings that run now will end.

    Args:
        devices: see `find_devices`.
        start: a function that starts a job on a device and returns an object with `result()` and `cancel()`. By default
            it makes a `Process`.

    Raises:
        UserError: jobs failed, one line each. It is raised when all other jobs are done.
    """
    if not jobs:
        return
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)
    running: dict[Any, tuple[Path, int]] = {}  # the log of each job, and its size before the job started

    def do(job: Job) -> str | None:
        device = free.get()
        log = logs / f"{job.name}.txt"
        size = log.stat().st_size if log.exists() else 0
        print(f"{job.title} ... (all output: {log})", flush=True)
        work = (start or start_process)(job, device, logs)
        running[work] = log, size
        try:
            return work.result()
        finally:
            del running[work]
            free.put(device)

    pool = ThreadPoolExecutor(len(devices))
    futures = {pool.submit(do, job): job for job in jobs}
    waiting, problems = set(futures), []
    try:
        with tqdm(desc="Runs", total=len(jobs), disable=None) as bar:  # None: only where there is a terminal
            while waiting:
                done, waiting = wait(waiting, SECONDS, FIRST_COMPLETED)
                problems += [f"{futures[f].title}: {line}" for f in done if (line := f.result())]
                bar.update(len(done))
                if not bar.disable:
                    bar.set_postfix_str(max((expected_end(*log) for log in list(running.values())), default=""))
    finally:  # also if it is interrupted
        pool.shutdown(wait=False, cancel_futures=True)
        for work in list(running):
            work.cancel()
    if problems:
        raise UserError("\n".join(problems))


def expected_end(log: Path, start: int) -> str:
    """The last expected end that a training printed into its log after this number of bytes. '' if there is none."""
    printed = log.read_bytes()[start:] if log.exists() else b""
    ends = re.findall(r"expected end: .+(?=, in )", printed.decode(errors="replace"))
    return ends[-1] if ends else ""


def start_process(job: Job, device: str, logs: Path) -> Process:
    """Start a job as a child of this process."""
    return Process(command_of(job, logs), logs / f"{job.name}.txt", device)


def command_of(job: Job, logs: Path) -> list[str]:
    """The command that starts the process of a job: the job's own `command` of this package, or `worker.py`.

    The arguments for `worker.py` are written into a file in `logs`.
    """
    if "command" in job.content:
        return [sys.executable, "-m", "nnunet_semiseg.cli", *job.content["command"]]
    file = logs / f"{job.name}.json"
    write_json(job.content, file)
    return [sys.executable, "-m", "nnunet_semiseg.evaluation.worker", str(file)]
