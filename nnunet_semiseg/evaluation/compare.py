"""`nnunet_semiseg compare`: train what is missing, predict, evaluate, report."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_semiseg.config import PLANS_KEY
from nnunet_semiseg.data.unlabeled import labeled_images
from nnunet_semiseg.discovery import check_trainer
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.metrics import evaluate_folder
from nnunet_semiseg.evaluation.runs import RECORD, Run, unequal_conditions
from nnunet_semiseg.files import dataset_folder, read_dataset_json, read_json, write_json
from nnunet_semiseg.planning import NUM_FOLDS


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is compared.

    Attributes:
        dataset: number or name.
        fold: a number, or `all`.
        trainers: the first is the baseline.
        seeds: how many runs of each trainer, with the seeds 0, 1, ...; None: one, with what the plans say.
        labeled: sizes of the labelled set, None for all labels; without any, the set is what it is.
        curve: trainers that are trained at every size; the others at the first alone. None: all of them.
        upper_bound: a dataset with all the labels, for the baseline's trainer.
        noise: standard deviations of noise on the normalised test images.
        gpus: the numbers of those that train and predict at the same time; none: the one that `device` means.
        tolerance: of the normalised surface distance, in mm.
        num_processes: for the evaluation.
    """

    dataset: int | str
    configuration: str
    fold: str
    trainers: Sequence[str]
    plans: str = "nnUNetSemiSegPlans"
    seeds: int | None = None
    labeled: Sequence[int | None] = ()
    curve: Sequence[str] | None = None
    upper_bound: int | str | None = None
    noise: Sequence[float] = ()
    device: str = "cuda"
    gpus: Sequence[int] = ()
    mirroring: bool = True
    tolerance: float = 2.0
    num_processes: int = 2

    @property
    def main_size(self) -> int | None:
        """The size of the labelled set that tables and pictures are about; the others are points of the curve."""
        return self.labeled[0] if self.labeled else None


@dataclass(frozen=True)
class TestSet:
    """Images with references: `imagesTs` and `labelsTs`, or a fold's validation cases.

    Attributes:
        images: the channels' files of every case.
        references: the folder of the reference labels.
        is_validation: nnU-Net has predicted these cases at the end of the training.
        labels: as in dataset.json.
        reader: nnU-Net's, for images and labels.
    """

    images: dict[str, list[str]]
    references: Path
    is_validation: bool
    labels: dict
    file_ending: str
    reader: type


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


# ----------------------------------------------------------------------------------------------------- what to compare


def check_numbers(request: Request) -> None:
    """Raises UserError for numbers that make no sense, before hours of work."""
    for sigma in request.noise:
        if not (math.isfinite(sigma) and sigma > 0):
            raise UserError(f"--noise {sigma:g}: give numbers above 0; without noise is always among them")
    if not (math.isfinite(request.tolerance) and request.tolerance > 0):
        raise UserError(f"--tolerance {request.tolerance:g}: give a number of mm above 0")
    for size in request.labeled:
        if size is not None and size < 1:
            raise UserError(f"--labeled {size}: give numbers from 1 on, or all")


def check_sizes(request: Request, run: Run) -> None:
    """Raises UserError where the labelled set has fewer cases than `--labeled` asks for, or where all is not all."""
    if not request.labeled:
        return
    preprocessed = dataset_folder("nnUNet_preprocessed", request.dataset)
    plans = read_json(preprocessed / f"{request.plans}.json", "plan first, or name other plans with -p")
    fixed = plans.get(PLANS_KEY, {}).get("num_labeled")
    if None in request.labeled and fixed is not None:
        mend = "--set num_labeled=null first"
        raise UserError(f"--labeled all: the plans {request.plans} say num_labeled={fixed}: {mend}")
    raw = dataset_folder("nnUNet_raw", request.dataset)
    cases = labeled_images(raw, read_dataset_json(raw))
    if request.fold != "all":
        cases = [case for case in find_splits(preprocessed, cases)[int(request.fold)]["train"] if case in cases]
    largest = max((size for size in request.labeled if size is not None), default=0)
    if largest > len(cases):
        raise UserError(f"--labeled {largest}: fold {request.fold} of {run.dataset} has {len(cases)} labelled cases")


def find_splits(preprocessed: Path, cases: Iterable[str]) -> list[dict]:
    """nnU-Net's folds; before the first training those that it will draw."""
    file, cases = preprocessed / "splits_final.json", sorted(cases)
    if file.is_file() or len(cases) < NUM_FOLDS:
        return read_json(file, "plan first with nnunet_semiseg plan_and_preprocess")
    return generate_crossval_split(cases)


def make_runs(request: Request) -> tuple[list[Run], list[Run]]:
    """The compared runs and those of the upper bound.

    Raises:
        UserError: a trainer that does not exist or is named twice, no such dataset, seeds or sizes that make no sense.
    """
    for trainer in request.trainers:
        check_trainer(trainer)
    for name, values in (
        ("--trainers", request.trainers), ("--labeled", request.labeled), ("--curve", request.curve or ()),
        ("--noise", request.noise), ("--gpus", request.gpus),
    ):  # fmt: skip
        if len(set(values)) < len(values):
            raise UserError(f"{name}: {' '.join(map(str, values))}: name each once")
    if request.seeds is not None and request.seeds < 1:
        raise UserError(f"--seeds {request.seeds}: give at least 1")
    if not (request.fold == "all" or request.fold.isdecimal()):
        raise UserError(f"-f {request.fold}: give the number of a fold, or all")
    for trainer in request.curve or ():
        if trainer not in request.trainers or len(request.labeled) < 2:
            raise UserError(f"--curve {trainer}: name some of --trainers, and several sizes with --labeled")
    seeds = [None] if request.seeds is None else range(request.seeds)

    def make(dataset: int | str, trainers: Iterable[str], sizes: Iterable[int | None]) -> list[Run]:
        name = dataset_folder("nnUNet_preprocessed", dataset).name
        shared = name, request.configuration, request.fold
        return [Run(*shared, t, request.plans, seed, size) for size in sizes for t in trainers for seed in seeds]

    runs = make(request.dataset, request.trainers, [request.main_size])
    runs += make(request.dataset, request.trainers if request.curve is None else request.curve, request.labeled[1:])
    upper_bound = [] if request.upper_bound is None else make(request.upper_bound, request.trainers[:1], [None])
    if set(upper_bound) & set(runs):
        raise UserError(f"--upper-bound {request.upper_bound}: is among the compared runs already: leave it out")
    return runs, upper_bound


def find_test_set(request: Request, run: Run) -> TestSet:
    """The test set, if there is one with references, else the fold's validation cases.

    Raises:
        UserError: neither; a reference without an image; noise without a test set.
    """
    raw = dataset_folder("nnUNet_raw", request.dataset)
    preprocessed = dataset_folder("nnUNet_preprocessed", request.dataset)
    dataset_json = read_dataset_json(raw)
    ending = dataset_json["file_ending"]
    plans = read_json(preprocessed / f"{request.plans}.json", "plan first, or name other plans with -p")
    if request.configuration not in plans["configurations"]:
        raise UserError(f"-c {request.configuration}: {request.plans} has {' and '.join(plans['configurations'])}")
    about = dataset_json["labels"], ending, PlansManager(plans).image_reader_writer_class

    def cases_of(folder: Path) -> dict[str, list[str]]:
        lists = create_lists_from_splitted_dataset_folder(str(folder), ending) if folder.is_dir() else []
        return {Path(files[0]).name[: -len(ending) - 5]: files for files in lists}

    references = sorted(file.name[: -len(ending)] for file in (raw / "labelsTs").glob(f"*{ending}"))
    if references:
        images = cases_of(raw / "imagesTs")
        for case in references:
            if case not in images:
                raise UserError(f"{raw / 'labelsTs' / case}{ending}: no image {case}_0000{ending} in imagesTs: add it")
        return TestSet({case: images[case] for case in references}, raw / "labelsTs", False, *about)
    if request.noise:
        raise UserError(f"--noise: needs a test set, and {raw / 'labelsTs'} has no *{ending}")
    if request.fold == "all":
        raise UserError(
            f"{raw / 'labelsTs'}: no *{ending}, and fold all has no validation cases of its own: add imagesTs and"
            f" labelsTs, or compare a numbered fold with -f"
        )
    images = cases_of(raw / "imagesTr")
    splits = find_splits(preprocessed, images)
    if int(request.fold) >= len(splits) or not splits[int(request.fold)]["val"]:
        raise UserError(f"{preprocessed / 'splits_final.json'}: no validation cases for fold {request.fold}")
    cases = sorted(splits[int(request.fold)]["val"])
    for case in cases:
        if case not in images:
            raise UserError(f"{preprocessed / 'splits_final.json'}: case {case} has no image in {raw / 'imagesTr'}")
    return TestSet({case: images[case] for case in cases}, preprocessed / "gt_segmentations", True, *about)


def check_disjoint(test_set: TestSet, upper_bound: Run) -> None:
    """Raises UserError where the upper bound is trained on a test case."""
    raw = dataset_folder("nnUNet_raw", upper_bound.dataset)
    held_out: Iterable[str] = ()
    if test_set.is_validation:  # its own fold may hold them out, too
        preprocessed = dataset_folder("nnUNet_preprocessed", upper_bound.dataset)
        splits = find_splits(preprocessed, labeled_images(raw, read_dataset_json(raw)))
        held_out = splits[int(upper_bound.fold)]["val"] if int(upper_bound.fold) < len(splits) else ()
    for case in set(test_set.images) - set(held_out):
        for folder in ("imagesTr", "imagesUn"):
            if any((raw / folder).glob(f"{case}_0000.*")):
                raise UserError(f"--upper-bound: test case {case} is in {raw / folder}: take it out, and train again")


def find_devices(request: Request) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES for each of the processes at a time; '' leaves it as it is.

    Raises:
        UserError: a GPU that is not there.
    """
    if request.gpus and request.device != "cuda":
        raise UserError(f"--gpus {' '.join(map(str, request.gpus))}: only with -device cuda")
    count = torch.cuda.device_count()
    if request.device == "cuda" and not count:
        raise UserError("-device cuda: there is no GPU: use -device cpu")
    for gpu in request.gpus:
        if not 0 <= gpu < count:
            raise UserError(f"--gpus {gpu}: no such GPU: there are {count}, numbered from 0")
    # numbers are those that this process sees: of the GPUs that it was given
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return [names[gpu].strip() for gpu in request.gpus] or [""]


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
        run: run.validation if test_set.is_validation else predictions_folder(run, 0.0, output)
        for run in everything
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
