"""What can be wrong with the options and the raw data. It is found before hours of work begin."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_semiseg.data.headers import count_channels, read_header, spacing_problem, total_memory
from nnunet_semiseg.data.image_problems import take_out
from nnunet_semiseg.data.labeled_cases import channel_names, labeled_images
from nnunet_semiseg.data.records import FINGERPRINT
from nnunet_semiseg.data.unlabeled_cases import check_headers, find_unlabeled_cases
from nnunet_semiseg.data.unlabeled_preprocessing import DEFAULT_CONFIGURATIONS
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, read_json, rewriting
from nnunet_semiseg.planning.planners import SemiSegMemory
from nnunet_semiseg.planning_request import PlanningRequest
from nnunet_semiseg.schema import check_name, load_plans, read_dataset_json, read_splits
from nnunet_semiseg.settings.plans import parse_assignments, update_settings
from nnunet_semiseg.text.prompts import read_prompts

LEAST_GPU = 0.5  # GB; with less, nnU-Net's planner finds no network


def check_options(request: PlanningRequest, planner_class: type[ExperimentPlanner]) -> None:
    """Raise UserError if options are wrong or do not fit together."""
    if os.environ.get("nnUNet_n_proc_DA") == "0" and not issubclass(planner_class, SemiSegMemory):
        # to estimate memory, nnU-Net's planner asks torch for that number of threads
        raise UserError(f"nnUNet_n_proc_DA=0: {request.planner} needs 1 or more: set it to 1 while you plan")
    if request.overwrite_plans_name is not None:
        check_name("-overwrite_plans_name", request.overwrite_plans_name)
    update_settings({}, parse_assignments(request.settings))
    if len(request.processes) not in (1, len(request.configurations)):
        raise UserError(f"-np {' '.join(map(str, request.processes))}: give one number, or one for each of -c")
    if unknown := sorted(set(request.configurations) - {*DEFAULT_CONFIGURATIONS, "3d_cascade_fullres"}):
        raise UserError(f"-c {unknown[0]}: no such configuration: use {' or '.join(DEFAULT_CONFIGURATIONS)}")
    if request.gpu_memory_target is not None and request.gpu_memory_target < LEAST_GPU:
        raise UserError(f"-gpu_memory_target {request.gpu_memory_target:g}: give {LEAST_GPU:g} GB or more")


def check_raw_data(dataset_id: int, request: PlanningRequest) -> None:
    """Raise UserError if the raw data set cannot be planned with these options.

    Images are not read, only their names and the headers of the first case; with `verify_dataset_integrity` also the
    headers of all unlabelled images.
    """
    raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
    dataset_json = read_dataset_json(raw)
    read_prompts(dataset_json, str(raw / "dataset.json"))
    labeled_cases = labeled_images(raw, dataset_json)
    _check_number(raw, dataset_json, labeled_cases)
    _check_channels(raw, dataset_json, labeled_cases)
    or_else = ", or plan without unlabelled cases: --labeled_only"
    unlabeled_cases = {} if request.labeled_only else find_unlabeled_cases(raw, dataset_json, or_else)
    first = next(iter(labeled_cases.values()))[0]
    if request.overwrite_target_spacing:
        _check_target_spacing(request.overwrite_target_spacing, first, len(channel_names(dataset_json)))
    _check_splits(raw, preprocessed)
    if request.verify_dataset_integrity:
        reader = determine_reader_writer_from_dataset_json(dataset_json, first, verbose=False)
        check_headers(unlabeled_cases, reader)


def _check_number(raw: Path, dataset_json: dict, labeled_cases: Mapping[str, Sequence[str]]) -> None:
    """Refuse a wrong number of labelled cases, because the batch size depends on it."""
    if not labeled_cases:
        raise UserError(f"{raw / 'imagesTr'}: no labelled cases: put at least one there, and its label into labelsTr")
    count = len(labeled_cases)
    if dataset_json["numTraining"] != count:
        raise UserError(
            f'{raw / "dataset.json"}: "numTraining" is {dataset_json["numTraining"]}, but there are {count} labelled'
            f' cases: write "numTraining": {count}'
        )


def _check_channels(raw: Path, dataset_json: dict, labeled_cases: Mapping[str, Sequence[str]]) -> None:
    """Refuse cases that do not have the channels of dataset.json."""
    first, images = next(iter(labeled_cases.items()))
    found, named = count_channels(images), len(channel_names(dataset_json))
    if found not in (None, named):
        raise UserError(
            f'{raw / "dataset.json"}: "channel_names" names {named} channels, but {first} has {found}: name those that'
            " there are, or add the missing files"
        )
    for case, files in labeled_cases.items():
        if len(files) != len(images):
            raise UserError(
                f"{files[0]}: {case} has {len(files)} channels, but {first} has {len(images)}: add or remove files"
            )


def _check_target_spacing(target: Sequence[float], image: str, channels: int) -> None:
    """Refuse a spacing (z, y, x) if the image would then have no voxels, or more than fit into memory.

    Args:
        image: the first labelled image. If it is not 3D or cannot be read, nothing is refused.
        channels: the number of channels of a case.
    """
    header, memory = read_header(Path(image)), total_memory()
    if header is None or header.GetDimension() != 3:
        return
    size, spacing = header.GetSize()[::-1], header.GetSpacing()[::-1]
    shape = [n * mm / new for n, mm, new in zip(size, spacing, target, strict=True)]
    if min(shape) < 1 or (memory and math.prod(shape) * channels * 4 > memory):
        wanted, found, result = (" ".join(f"{v:g}" for v in values) for values in (target, spacing, shape))
        raise UserError(
            f"-overwrite_target_spacing {wanted}: {image} has a spacing of {found} and would have {result} voxels:"
            " give a spacing near that of the images"
        )


def _check_splits(raw: Path, preprocessed: Path) -> None:
    """Refuse two files of folds that do not agree. nnU-Net itself would fail with a bare AssertionError."""
    ours, theirs = preprocessed / "splits_final.json", raw / "splits_final.json"
    both = ours.is_file() and theirs.is_file()
    if both and not _agree(read_splits(ours, "delete it"), read_splits(theirs, "fix it")):
        raise UserError(
            f"{ours}: has other folds than {theirs}: keep the file with the folds that you want, and delete the other"
        )


def _agree(preprocessed_splits: list[dict], raw_splits: list[dict]) -> bool:
    """Whether two lists of folds agree. By nnU-Net's rule, the first list may have more folds."""
    return len(preprocessed_splits) >= len(raw_splits) and all(
        set(ours[part]) == set(theirs[part])
        for ours, theirs in zip(preprocessed_splits, raw_splits, strict=False)
        for part in ("train", "val")
    )


def check_spacings(raw: Path, preprocessed: Path) -> None:
    """Refuse labelled images whose spacing is far from that of the others. The error has one line for each."""
    files = labeled_images(raw, read_dataset_json(raw))
    file = preprocessed / f"{FINGERPRINT}.json"
    spacings = read_json(file, "delete it")["spacings"]  # in the order of the cases
    usual, problems = np.quantile(spacings, 0.5, axis=0, method="lower"), []
    for images, spacing in zip(files.values(), spacings, strict=True):
        if odd := spacing_problem(spacing, usual):
            problems.append(f"{images[0]}: {odd}: {take_out(images[0])}")
    if problems:
        raise UserError("\n".join(problems))


def refuse_while_used(plans_file: Path, configurations: Sequence[str]) -> None:
    """Raise BusyError if a training uses data that will be rewritten. It is called before hours of work begin."""
    if not plans_file.is_file():
        return
    plans = load_plans(plans_file, "delete it")["configurations"]
    for name in {plans.get(c, {}).get("data_identifier") for c in configurations}:
        if name and plans_file.with_name(name).is_dir():
            with rewriting(plans_file.with_name(name)):
                pass
