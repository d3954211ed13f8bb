"""Plan and preprocess: nnU-Net's steps for the labelled cases, then ours for the unlabelled ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg.data.labeled_cases import inspect_labeled, labeled_images
from nnunet_semiseg.data.preprocessed import blame_the_disk, look_at_labeled
from nnunet_semiseg.data.records import FINGERPRINT, record_file, why_fingerprint_is_old, write_record
from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled
from nnunet_semiseg.files import dataset_folder, disk_errors, make_folder, only_one, put_back, rewriting, write_json
from nnunet_semiseg.parallel import killed_workers
from nnunet_semiseg.planning.checks import check_options, check_raw_data, check_spacings, refuse_while_used
from nnunet_semiseg.planning.planners import default_plans_name, find_planner
from nnunet_semiseg.planning.plans import read_plans
from nnunet_semiseg.planning_request import PlanningRequest
from nnunet_semiseg.schema import load_plans, read_dataset_json, read_splits
from nnunet_semiseg.settings.plans import PLANS_KEY, locked, parse_assignments, store_settings
from nnunet_semiseg.training.checks import check_depth

NUM_FOLDS = 5  # of nnU-Net's own split


def plan_and_preprocess(request: PlanningRequest) -> None:
    """Run nnU-Net's fingerprint, planning and preprocessing for labelled cases; then preprocess the unlabelled ones.

    Raises:
        UserError: options, files or headers are wrong (this is checked for all data sets before any work); images or
            labels are bad, one line for each; the disk is full.
        BusyError: a training uses the preprocessed cases, or another process plans this data set.
    """
    planner_class = find_planner(request.planner)
    check_options(request, planner_class)
    for dataset_id in request.dataset_ids:
        check_raw_data(dataset_id, request)

    plans_name = request.overwrite_plans_name or default_plans_name(planner_class)
    for dataset_id in request.dataset_ids:
        preprocessed = dataset_folder("nnUNet_preprocessed", dataset_id)
        plans_file = preprocessed / f"{plans_name}.json"
        if request.preprocess:
            refuse_while_used(plans_file, request.configurations)
        make_folder(preprocessed.parent)
        with only_one(preprocessed.with_name(f".{preprocessed.name}.lock"), "plans this data set"):
            _extract_fingerprint(dataset_id, request)
            _make_plans(dataset_id, planner_class, plans_file, request)
            write_small_split(dataset_id)
        if request.preprocess:
            _preprocess(dataset_id, plans_name, request)


def _extract_fingerprint(dataset_id: int, request: PlanningRequest) -> None:
    """Check the labelled cases and run nnU-Net's fingerprint extraction, again if files have changed since."""
    raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
    print("Fingerprint extraction...")
    with _in_one_line(raw, "-npfp"):
        stamps = inspect_labeled(raw, preprocessed, read_dataset_json(raw), request.num_processes_fingerprint)
    if why := why_fingerprint_is_old(preprocessed, stamps):
        print(f"{preprocessed / FINGERPRINT}.json: {why}: it is made again")
    with _in_one_line(preprocessed, "-npfp"):
        extract_fingerprint_dataset(
            dataset_id,
            num_processes=request.num_processes_fingerprint,
            check_dataset_integrity=request.verify_dataset_integrity,
            clean=request.clean or bool(why),
            verbose=request.verbose,
            show_progress_bar=request.show_progress_bar,
        )
    entries = {case: {"files": s, "made": None, "spread": None} for case, s in stamps.items()}
    write_record(preprocessed, FINGERPRINT, entries)
    check_spacings(raw, preprocessed)


def _make_plans(
    dataset_id: int, planner_class: type[ExperimentPlanner], plans_file: Path, request: PlanningRequest
) -> None:
    """Run nnU-Net's planning. Settings that older plans hold are kept, and those of the request are added."""
    print("Experiment planning...")
    with locked(plans_file), disk_errors(plans_file), put_back(plans_file):
        kept = load_plans(plans_file, "delete it").get(PLANS_KEY, {}) if plans_file.is_file() else {}
        plan_experiment_dataset(
            dataset_id,
            planner_class,
            request.gpu_memory_target,
            overwrite_target_spacing=request.overwrite_target_spacing,
            overwrite_plans_name=request.overwrite_plans_name,
        )
        if kept:
            write_json({**load_plans(plans_file, "plan again"), PLANS_KEY: kept}, plans_file)
    store_settings(plans_file, parse_assignments(request.settings))


def write_small_split(dataset_id: int) -> None:
    """Write leave-one-out folds if there are too few cases for nnU-Net's five folds.

    With one case only `fold all` works. If there is a file of folds, only cases that are in no fold are reported.
    """
    raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
    cases = sorted(labeled_images(raw, read_dataset_json(raw)))
    splits_file = preprocessed / "splits_final.json"
    if splits_file.is_file():
        folds = read_splits(splits_file, "delete it")
        if new := sorted(set(cases) - {case for fold in folds for case in (*fold["train"], *fold["val"])}):
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            print(f"WARNING: {splits_file}: no fold has {new[0]}{more}: delete the file to have new folds")
        return
    if not 2 <= len(cases) < NUM_FOLDS:
        return
    write_json([{"train": [c for c in cases if c != held_out], "val": [held_out]} for held_out in cases], splits_file)
    print(f"{splits_file}: {len(cases)} labelled cases, so {len(cases)} leave-one-out folds")


def _preprocess(dataset_id: int, plans_name: str, request: PlanningRequest) -> None:
    """Preprocess the labelled cases, then the unlabelled ones, unless `labeled_only`."""
    print("Preprocessing...")
    raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
    plans, processes = read_plans(preprocessed, plans_name), request.processes
    for configuration, n in zip(request.configurations, processes * len(request.configurations), strict=False):
        if configuration not in plans["configurations"]:
            print(f"INFO: configuration {configuration} is not in {plans_name}.json: skipped")
            continue
        check_depth(plans, configuration)
        _preprocess_labeled(dataset_id, plans, configuration, n, request.verbose, request.show_progress_bar)
        if request.labeled_only:  # otherwise preprocess_unlabeled does it
            with _in_one_line(preprocessed):
                look_at_labeled(raw, preprocessed, plans, configuration, n)
    if not request.labeled_only:
        preprocess_unlabeled(
            dataset_id,
            request.configurations,
            plans_name,
            processes,
            request.clean,
            request.show_progress_bar,
            request.verbose,
        )


def _preprocess_labeled(
    dataset_id: int, plans: dict, configuration: str, num_processes: int, verbose: bool, show_progress_bar: bool
) -> None:
    """Run nnU-Net's preprocessing of one configuration. If it fails, no folder with only some of the cases is left."""
    preprocessed = dataset_folder("nnUNet_preprocessed", dataset_id)
    folder = preprocessed / PlansManager(plans).get_configuration(configuration).data_identifier
    with rewriting(folder):
        record_file(preprocessed, folder.name).unlink(missing_ok=True)  # first: it belongs to the old files
        try:
            with _in_one_line(folder):
                preprocess_dataset(
                    dataset_id, plans["plans_name"], [configuration], [num_processes or 1], verbose, show_progress_bar
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _in_one_line(place: Path, option: str = "-np") -> Iterator[None]:
    """Turn nnU-Net's error about a full disk or a killed process into one line.

    Args:
        option: the option for the number of processes.
    """
    try:
        yield
    except Exception as e:
        blame_the_disk(e, place)
        with killed_workers(place, option):
            if isinstance(e, RuntimeError) and "background" in str(e):  # nnU-Net's name for workers
                raise BrokenProcessPool from None
            raise
