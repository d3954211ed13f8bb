"""`nnunet_semiseg compare`: train what is missing, predict, evaluate, report."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.metrics import evaluate_folder
from nnunet_semiseg.evaluation.request import (
    Request,
    TestSet,
    check_disjoint,
    check_numbers,
    check_sizes,
    find_devices,
    find_test_set,
    make_runs,
)
from nnunet_semiseg.files import write_json
from nnunet_semiseg.runs import RECORD, Run, unequal_conditions


@dataclass(frozen=True)
class Results:
    """All that the report shows.

    Attributes:
        runs: the compared ones; the upper bound's are apart.
        scores: a row for each `run` (its index in `everything`), `noise`, `case` and `label`, with the metrics.
        warnings: what is not the same for all and ought to be.
        predictions: each run's folder, without noise.
    """

    request: Request
    runs: list[Run]
    upper_bound: list[Run]
    test_set: TestSet
    scores: pd.DataFrame
    warnings: list[str]
    predictions: dict[Run, Path]

    @property
    def everything(self) -> list[Run]:
        return [*self.runs, *self.upper_bound]


@dataclass(frozen=True)
class Job:
    """Work for a process of its own: the arguments of a function of `worker.py`."""

    name: str
    title: str
    content: dict


def compare(request: Request, output: str | Path | None = None, run: bool = False) -> Path:
    """Compare trainers on one dataset.

    Args:
        output: where predictions, logs and the report go; by default below the dataset's results.
        run: train what is not trained.

    Returns:
        The report, a page of HTML.

    Raises:
        UserError: wrong use; a run that is not trained, without `run`; a training or prediction that failed.
    """
    from nnunet_semiseg.evaluation.report import write_report

    check_numbers(request)
    runs, upper_bound = make_runs(request)
    test_set = find_test_set(request, runs[0])
    check_sizes(request, runs[0])
    if upper_bound:
        check_disjoint(test_set, upper_bound[0])
    devices = find_devices(request)
    everything = [*runs, *upper_bound]
    # a test set needs no validation: it may have been interrupted, or be of another checkpoint
    missing = [r for r in everything if not (r.is_validated if test_set.is_validation else r.is_trained)]
    if missing and not run:
        names = "; ".join(r.title for r in missing)
        what, file = "not trained", missing[0].checkpoint
        if missing[0].is_trained:
            what, file = "not validated with the last checkpoint", missing[0].validation / "summary.json"
        raise UserError(f"{what}: {names} (no {file}): train with nnUNetv2_train, or add --run")
    for r in missing:
        r.write_plans()

    if output is None:
        output = runs[0].model_folder.parent / "comparison" / f"{runs[0].configuration}__fold_{request.fold}"
    output = Path(output).absolute()
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    do_all([training_job(r, request.device) for r in missing], devices, logs)
    if not test_set.is_validation:
        jobs = [
            prediction_job(r, noise, request, test_set, output)
            for r in everything
            for noise in noise_levels(request, r, upper_bound)
        ]
        do_all([job for job in jobs if not is_predicted(job, test_set)], devices, logs)
    return write_report(collect(request, runs, upper_bound, test_set, output), output)


# ----------------------------------------------------------------------------------------------- training, prediction


def training_job(run: Run, device: str) -> Job:
    content = {"job": "train", "words": run.train_command(device), "folder": str(run.folder)}
    return Job(f"train_{run.dataset}_{run.name}", f"training {run.title} ({run.dataset})", content)


def prediction_job(run: Run, noise: float, request: Request, test_set: TestSet, output: Path) -> Job:
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


def noise_levels(request: Request, run: Run, upper_bound: Sequence[Run]) -> tuple[float, ...]:
    """Of a run's predictions; only those that the report shows."""
    noisy = run in upper_bound or run.num_labeled == request.main_size
    return (0.0, *request.noise) if noisy else (0.0,)


def predictions_folder(run: Run, noise: float, output: Path) -> Path:
    suffix = f"__noise{noise:g}" if noise else ""
    return output / "predictions" / f"{run.dataset}__{run.name}__fold_{run.fold}{suffix}"


def is_predicted(job: Job, test_set: TestSet) -> bool:
    """Whether the predictions are there, whole, of this checkpoint, these images and these settings."""
    folder = Path(job.content["output"])
    if not all((folder / f"{case}{test_set.file_ending}").is_file() for case in test_set.images):
        return False
    record = folder / RECORD
    return record.is_file() and json.loads(record.read_bytes())["settings"] == job.content["settings"]


def signature(file: Path) -> list:
    about = file.stat()
    return [file.name, about.st_size, about.st_mtime_ns]


def do_all(jobs: list[Job], devices: list[str], logs: Path) -> None:
    """Each job in its own process, as many at a time as there are devices; what they print goes to `logs`.

    Raises:
        UserError: jobs that failed, one line each, when all the others are done.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)
    running: set[subprocess.Popen] = set()

    def do(job: Job) -> str | None:
        device = free.get()
        try:
            return do_one(job, device, logs, running)
        finally:
            free.put(device)

    pool = ThreadPoolExecutor(len(devices))
    futures = {pool.submit(do, job): job for job in jobs}
    try:
        problems = [f"{futures[f].title}: {line}" for f in as_completed(futures) if (line := f.result())]
    finally:  # interrupted: the workers end when their stdin does
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.stdin.close()
    if problems:
        raise UserError("\n".join(problems))


def do_one(job: Job, device: str, logs: Path, running: set[subprocess.Popen]) -> str | None:
    """Returns what went wrong."""
    print(f"{job.title} ...", flush=True)
    log, file = logs / f"{job.name}.txt", logs / f"{job.name}.json"
    write_json(job.content, file)
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}) | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "nnunet_semiseg.evaluation.worker", str(file)]
    with open(log, "ab") as printed:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=printed, stderr=printed, start_new_session=True
        )
        running.add(process)
        process.wait()
        running.discard(process)
    if process.returncode == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'failed'} (exit status {process.returncode}; all it printed: {log})"


# ---------------------------------------------------------------------------------------------------------- evaluation


def collect(request: Request, runs: list[Run], upper_bound: list[Run], test_set: TestSet, output: Path) -> Results:
    everything = [*runs, *upper_bound]
    folders = {
        run: run.validation if test_set.is_validation else predictions_folder(run, 0.0, output) for run in everything
    }
    tables = []
    for i, run in enumerate(everything):
        for noise in noise_levels(request, run, upper_bound):
            folder = predictions_folder(run, noise, output) if noise else folders[run]
            print(f"evaluating {run.title}{f', noise {noise:g}' if noise else ''} ({run.dataset})", flush=True)
            cache = output / "scores" / f"{predictions_folder(run, noise, output).name}.json"
            rows = evaluate(folder, test_set, request, cache)
            tables.append(pd.DataFrame(rows).assign(run=i, noise=noise))
    scores, warnings = pd.concat(tables, ignore_index=True), unequal_conditions(runs, upper_bound)
    return Results(request, runs, upper_bound, test_set, scores, warnings, folders)


def evaluate(folder: Path, test_set: TestSet, request: Request, cache: Path) -> list[dict]:
    """`evaluate_folder`, remembered until a file or the tolerance changes."""
    ending = test_set.file_ending
    files = [place / f"{case}{ending}" for place in (folder, test_set.references) for case in test_set.images]
    key = {
        "tolerance": request.tolerance,
        "labels": test_set.labels,
        "files": [signature(file) for file in files if file.is_file()],
    }
    if cache.is_file() and (known := json.loads(cache.read_bytes()))["key"] == key:
        return known["rows"]
    rows = evaluate_folder(
        folder, test_set.references, test_set.labels, ending, test_set.reader, request.tolerance,
        cases=test_set.images, num_processes=request.num_processes,
    )  # fmt: skip
    cache.parent.mkdir(exist_ok=True)
    write_json({"key": key, "rows": rows}, cache)
    return rows
