"""Find what a comparison needs: runs, test set, GPUs. Wrong options are refused before any work begins."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_semiseg.data.image_problems import IMAGES_FOLDER
from nnunet_semiseg.data.labeled_cases import labeled_images
from nnunet_semiseg.data.preprocessed import check_labeled_data
from nnunet_semiseg.devices import check_device
from nnunet_semiseg.discovery import find_trainer
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.asked import Request
from nnunet_semiseg.files import dataset_folder
from nnunet_semiseg.planning import NUM_FOLDS
from nnunet_semiseg.runs import Run, is_fold
from nnunet_semiseg.schema import check_configuration, load_plans, read_dataset_json, read_splits
from nnunet_semiseg.settings.plans import PLANS_KEY


@dataclass(frozen=True)
class TestSet:
    """Images with references: `imagesTs` and `labelsTs`, or a fold's validation cases.

    Attributes:
        images: the files of every case, one for each channel.
        references: the folder of the reference labels.
        is_validation: True if these are validation cases, which nnU-Net predicts at the end of the training.
        labels: as in dataset.json.
        reader: nnU-Net's class that reads images and labels.
    """

    images: dict[str, list[str]]
    references: Path
    is_validation: bool
    labels: dict
    file_ending: str
    reader: type

    @property
    def title(self) -> str:
        """The number and the kind of the cases, in words."""
        cases = "case" if len(self.images) == 1 else "cases"
        return f"{len(self.images)} " + (f"validation {cases} of the fold" if self.is_validation else f"test {cases}")


def check_numbers(request: Request) -> None:
    """Raises UserError for numbers out of range, before hours of work."""
    for sigma in request.noise:
        if not (math.isfinite(sigma) and sigma > 0):
            raise UserError(f"--noise {sigma:g}: give numbers above 0; the test without noise is always done")
    if not (math.isfinite(request.tolerance) and request.tolerance > 0):
        raise UserError(f"--tolerance {request.tolerance:g}: give a number of mm above 0")
    for size in request.sizes:
        if size is not None and size < 1:
            raise UserError(f"--labeled {size}: give numbers of 1 or more, or all")


def check_sizes(request: Request, run: Run) -> None:
    """Raise UserError if `--labeled` asks for too many cases, or for `all` although the plans limit their number."""
    if not request.sizes:
        return
    preprocessed = dataset_folder("nnUNet_preprocessed", request.dataset)
    file = preprocessed / f"{request.plans}.json"
    plans = load_plans(file, "plan first, or name other plans with -p")
    fixed = plans.get(PLANS_KEY, {}).get("num_labeled")
    if None in request.sizes and fixed is not None:
        fix = f'remove "num_labeled" under "{PLANS_KEY}" in {file}'
        raise UserError(f"--labeled all: the plans {request.plans} say num_labeled={fixed}: {fix}")
    raw = dataset_folder("nnUNet_raw", request.dataset)
    cases = labeled_images(raw, read_dataset_json(raw))
    if request.fold != "all":
        cases = [case for case in fold_of(request, preprocessed, cases)["train"] if case in cases]
    largest = max((size for size in request.sizes if size is not None), default=0)
    if largest > len(cases):
        raise UserError(
            f"--labeled {largest}: fold {request.fold} of {run.dataset} has only {len(cases)} labelled cases: give"
            f" {len(cases)} or less"
        )


def find_splits(preprocessed: Path, cases: Iterable[str]) -> list[dict]:
    """The folds of nnU-Net. Before the first training, these are the folds that nnU-Net will make.

    Raises:
        UserError: the file with the folds is damaged, or missing although there are too few cases for nnU-Net's folds.
    """
    file, cases = preprocessed / "splits_final.json", sorted(cases)
    if file.is_file() or len(cases) < NUM_FOLDS:
        return read_splits(file, "plan first with nnunet_semiseg plan_and_preprocess")
    return generate_crossval_split(cases)


def fold_of(request: Request, preprocessed: Path, cases: Iterable[str]) -> dict:
    """The fold of the request, from `find_splits`. Raises UserError if there is no such fold."""
    splits = find_splits(preprocessed, cases)
    if int(request.fold) >= len(splits):
        file = preprocessed / "splits_final.json"
        where = file if file.is_file() else preprocessed.name  # nnU-Net has not written the file yet
        raise UserError(f"-f {request.fold}: {where} has the folds 0 to {len(splits) - 1}: give one of them")
    return splits[int(request.fold)]


def make_runs(request: Request) -> tuple[list[Run], list[Run]]:
    """The runs to compare, and the runs of the upper bound.

    Raises:
        UserError: a trainer or dataset does not exist; a trainer or number is given twice; `--seeds`, `-f`, `--curve`
            or `--upper-bound` makes no sense.
    """
    for trainer in request.trainers:
        find_trainer(trainer)
    for name, values in (
        ("--trainers", request.trainers), ("--labeled", request.sizes), ("--curve", request.curve or ()),
        ("--noise", request.noise), ("--gpus", request.gpus),
    ):  # fmt: skip
        if len(set(values)) < len(values):
            shown = " ".join("all" if value is None else str(value) for value in values)
            raise UserError(f"{name}: {shown}: name each once")
    if request.seeds is not None and request.seeds < 1:
        raise UserError(f"--seeds {request.seeds}: give at least 1")
    if not is_fold(request.fold):
        raise UserError(f"-f {request.fold}: give the number of a fold, or all")
    for trainer in request.curve or ():
        if trainer not in request.trainers or len(request.sizes) < 2:
            raise UserError(
                f"--curve {trainer}: name only trainers of --trainers, and give several sizes with --labeled"
            )
    seeds = [None] if request.seeds is None else range(request.seeds)

    def make(dataset: int | str, trainers: Iterable[str], sizes: Iterable[int | None]) -> list[Run]:
        name = dataset_folder("nnUNet_preprocessed", dataset).name
        shared = name, request.configuration, request.fold
        return [Run(*shared, t, request.plans, seed, size) for size in sizes for t in trainers for seed in seeds]

    runs = make(request.dataset, request.trainers, [request.main_size])
    runs += make(request.dataset, request.trainers if request.curve is None else request.curve, request.sizes[1:])
    upper_bound = [] if request.upper_bound is None else make(request.upper_bound, request.trainers[:1], [None])
    if set(upper_bound) & set(runs):
        raise UserError(
            f"--upper-bound {request.upper_bound}: {request.trainers[0]} with all labels of this dataset is compared"
            " already: give another dataset, or leave out --upper-bound"
        )
    return runs, upper_bound


def find_test_set(request: Request, is_required: bool = False) -> TestSet:
    """Find the test set. If it has no references, take the validation cases of the fold.

    Args:
        is_required: whether the validation cases cannot take its place.

    Raises:
        UserError: there are no plans or no such configuration; the data have changed since they were preprocessed (see
            `check_labeled_data`); there is no test set, but noise or the caller needs one; the fold does not exist or
            has no validation cases; a case has no image.
    """
    raw = dataset_folder("nnUNet_raw", request.dataset)
    preprocessed = dataset_folder("nnUNet_preprocessed", request.dataset)
    dataset_json = read_dataset_json(raw)
    ending = dataset_json["file_ending"]
    file = preprocessed / f"{request.plans}.json"
    plans = load_plans(file, "plan first, or name other plans with -p")
    check_configuration(plans, request.configuration, file, "plan first with nnunet_semiseg plan_and_preprocess")
    about = dataset_json["labels"], ending, PlansManager(plans).image_reader_writer_class

    def cases_of(folder: Path) -> dict[str, list[str]]:
        lists = create_lists_from_splitted_dataset_folder(str(folder), ending) if folder.is_dir() else []
        return {Path(files[0]).name[: -len(ending) - 5]: files for files in lists}

    check_labeled_data(preprocessed, raw, plans, request.configuration)
    references = sorted(file.name[: -len(ending)] for file in (raw / "labelsTs").glob(f"*{ending}"))
    if references:
        images = cases_of(raw / "imagesTs")
        for case in references:
            if case not in images:
                raise UserError(f"{raw / 'labelsTs' / case}{ending}: imagesTs has no image {case}_0000{ending}: add it")
        return TestSet({case: images[case] for case in references}, raw / "labelsTs", False, *about)
    if is_required:
        raise UserError(f"{raw / 'labelsTs'}: has no *{ending}, but a test set is needed: add imagesTs and labelsTs")
    if request.noise:
        raise UserError(
            f"--noise: needs a test set, but {raw / 'labelsTs'} has no *{ending}: add imagesTs and labelsTs, or"
            f" leave out --noise"
        )
    if request.fold == "all":
        raise UserError(
            f"{raw / 'labelsTs'}: has no *{ending}, and fold all has no validation cases of its own: add imagesTs and"
            f" labelsTs, or compare a numbered fold with -f"
        )
    images = labeled_images(raw, dataset_json)
    cases = sorted(fold_of(request, preprocessed, images)["val"])
    if not cases:
        raise UserError(
            f"{preprocessed / 'splits_final.json'}: has no validation cases for fold {request.fold}: add some, or"
            " choose another fold with -f"
        )
    for case in cases:
        if case not in images:
            raise UserError(
                f"{preprocessed / 'splits_final.json'}: case {case} is not a labelled case of {raw}: add it, or correct"
                f" the file"
            )
    return TestSet({case: images[case] for case in cases}, preprocessed / "gt_segmentations", True, *about)


def check_disjoint(test_set: TestSet, upper_bound: Run) -> None:
    """Raises UserError if the upper bound is trained on a case that has the name of a test case."""
    raw = dataset_folder("nnUNet_raw", upper_bound.dataset)
    dataset_json = read_dataset_json(raw)
    labeled_cases = labeled_images(raw, dataset_json)
    held_out: Iterable[str] = ()
    if test_set.is_validation:  # its own fold may leave these cases out, too
        preprocessed = dataset_folder("nnUNet_preprocessed", upper_bound.dataset)
        splits = find_splits(preprocessed, labeled_cases)
        held_out = splits[int(upper_bound.fold)]["val"] if int(upper_bound.fold) < len(splits) else ()
    for case in set(test_set.images) - set(held_out):
        if case in labeled_cases:
            place = raw / ("dataset.json" if "dataset" in dataset_json else "imagesTr")
        elif any((raw / IMAGES_FOLDER).glob(f"{case}_0000.*")):
            place = raw / IMAGES_FOLDER
        else:
            continue
        raise UserError(f"--upper-bound: test case {case} is in {place}: remove it there, and train again")


def find_devices(request: Request) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES for each process that runs at the same time. '' means: do not change it.

    With `--executor slurm` there are none, because the queue decides.

    Raises:
        UserError: the device or a GPU does not exist; GPUs are named, but the device is not `cuda`; or `--gpus` or
            `--jobs` is given, but the queue decides.
    """
    if request.executor == "slurm":
        if given := " ".join(["--gpus"] * bool(request.gpus) + ["--jobs"] * (request.jobs > 1)):
            raise UserError(
                f"{given}: not with --executor slurm, because the queue decides which jobs run: leave out {given}, and"
                " give each job its GPU with --slurm gpus=1"
            )
        return []
    if request.gpus and request.device != "cuda":
        raise UserError(f"--gpus {' '.join(map(str, request.gpus))}: needs -device cuda: add it, or leave out --gpus")
    check_device(request.device)
    count = torch.cuda.device_count()
    for gpu in request.gpus:
        if not 0 <= gpu < count:
            raise UserError(
                f"--gpus {gpu}: there is no such GPU: use one of the {count} GPUs, whose numbers begin with 0"
            )
    # the numbers are those that this process sees, among the GPUs that it may use
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return ([names[gpu].strip() for gpu in request.gpus] or [""]) * request.jobs
