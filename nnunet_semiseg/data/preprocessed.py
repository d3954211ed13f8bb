"""Check the labelled cases that nnU-Net has preprocessed, and check again at the start of a training."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from tqdm import tqdm

from nnunet_semiseg.data.image_problems import (
    IMAGES_FOLDER,
    one_line_of,
    preprocessed_problems,
    spread,
    spread_problems,
)
from nnunet_semiseg.data.labeled_cases import channel_names, inspect_labeled, labeled_files
from nnunet_semiseg.data.plans_hash import plans_hash
from nnunet_semiseg.data.records import FINGERPRINT, contents, read_record, record_file, usual_spread, write_record
from nnunet_semiseg.data.stamps import Stamp, all_renewed, digest, renewed, stamp
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import NOT_WRITABLE, disk_error, read_json, written_whole
from nnunet_semiseg.parallel import DELAY, run_jobs
from nnunet_semiseg.schema import check, read_dataset_json, resolved

SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
"""The endings of the files of a preprocessed case. nnU-Net writes the last one last."""
DAMAGED = "damaged, or written again by another command, since it was preprocessed"
REFERENCES = "gt_segmentations"
"""The folder with nnU-Net's copies of the labels. Validation and `compare` read them."""


def read_arrays(folder: Path, case: str) -> list[np.ndarray]:
    """Read the image (C, *S) and the segmentation (1, *S) of a preprocessed case completely.

    Raises:
        UserError: a file is missing or damaged. Callers add to its message how to fix that.
    """
    arrays = []
    for suffix in SUFFIXES:
        file = folder / (case + suffix)
        try:
            if suffix == ".pkl":
                load_pickle(str(file))
            else:
                array: Any = blosc2.open(str(file), mode="r")
                arrays.append(array[:])
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except Exception as e:  # the kind depends on the damage
            raise UserError(f"{file}: half-written or damaged ({one_line_of(e)})") from None
    return arrays


def find_dataset_class(folder: str | Path, fix: str) -> type:
    """nnU-Net's dataset class for a folder of preprocessed labelled cases.

    Raises:
        UserError: the folder is missing, empty or has other files in it.
    """
    try:
        return infer_dataset_class(str(folder))
    except FileNotFoundError:
        raise UserError(f"{folder}: has no preprocessed labelled cases: {fix}") from None
    except (AssertionError, KeyError):
        raise UserError(f"{folder}: has no preprocessed labelled cases, or other files lie among them: {fix}") from None


def blame_the_disk(error: Exception, place: Path) -> None:
    """Raise DiskError if the error comes from the disk. The package blosc2 itself only says that something failed."""
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        raise disk_error(place, str(error.strerror)) from None
    if isinstance(error, RuntimeError) and "NDArray" in str(error):
        free = shutil.disk_usage(place.parent).free / 2**20
        raise disk_error(place, f"{one_line_of(error)}, {free:.1f} MiB are free") from None


def opens(file: Path) -> bool:
    """Whether the file of an array exists and is complete. Only its header and its end are read."""
    try:
        blosc2.open(str(file), mode="r")
        return True
    except Exception:  # of several kinds
        return False


def look_at_labeled(
    raw: Path, preprocessed: Path, plans: dict, configuration: str, num_processes: int
) -> list[float] | None:
    """Check the preprocessed labelled cases, correct nnU-Net's copies of the labels, and record what was checked.

    The record lies beside the folder of the cases; see `read_record`.

    Returns:
        The usual spread of the values in each channel. None if the labelled cases are not preprocessed yet.

    Raises:
        UserError: see `inspect_labeled`; a case is not preprocessed, half-written, or made from other files; nothing
            can be learnt from the values of a case (then its preprocessed files are removed). There is one line for
            each problem.
    """
    name = resolved(plans, configuration)["data_identifier"]
    folder, dataset_json = preprocessed / name, read_dataset_json(raw)
    if not folder.is_dir():
        return None
    stamps, files = inspect_labeled(raw, preprocessed, dataset_json, num_processes), labeled_files(raw, dataset_json)
    (preprocessed / REFERENCES).mkdir(exist_ok=True)
    before, digest_now = read_record(preprocessed, name), plans_hash(plans, configuration)
    same_plans = before["plans_hash"] == digest_now
    known = before["cases"] if same_plans else {}
    # files that are not newer than a record for other plans belong to those other plans
    since = 0 if same_plans or not before["cases"] else record_file(preprocessed, name).stat().st_mtime_ns
    cases, doubtful, problems = {}, set(), []
    for case, (*_, label) in files.items():
        copy_label(label, preprocessed / REFERENCES / (case + dataset_json["file_ending"]), stamps[case][-1])
        entry = known.get(case)
        if entry and contents(entry["files"]) == contents(stamps[case]):
            if made := made_of(entry, made_files(folder, case, dataset_json)):
                cases[case] = entry | {"files": stamps[case], "made": made}
            else:  # made again by another command, or damaged: compare the voxels
                doubtful.add(case)
    jobs = [
        (case, files[case], stamps[case], case in doubtful, since, folder, plans, configuration, dataset_json)
        for case in files
        if case not in cases
    ]
    for case, entry, found in run_jobs(_look_at, jobs, num_processes, "Preprocessed labelled cases"):
        cases[case] = entry
        problems += found
    record = {"plans_hash": digest_now, "cases": cases}
    usual, channels = usual_spread(record), channel_names(dataset_json)
    for case, entry in cases.items():
        if entry["spread"] and (found := spread_problems(entry["spread"], files[case][:-1], channels, usual)):
            remove_case(folder, case)
            problems += found
    if problems:
        raise UserError("\n".join(sorted(problems)))
    write_record(preprocessed, name, cases, digest_now)
    return usual


def _look_at(
    case: str,
    files: list[str],
    stamps: list[Stamp],
    doubtful: bool,
    since: int,
    folder: Path,
    plans: dict,
    configuration: str,
    dataset_json: dict,
) -> tuple[str, dict, list[str]]:
    """Check one case. Returns its entry in the record, and what is wrong, one line each."""
    # imported here, because they need torch: `nnunet_semiseg status` imports this module, too, but needs no torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_semiseg.data.empty_channels import values_of_nothing

    manager = PlansManager(plans)
    configuration_manager = manager.get_configuration(configuration)
    fix = preprocess_again(plans, configuration)
    entry: dict = {"files": stamps, "made": None, "spread": None}
    try:
        data, seg = read_arrays(folder, case)
        entry["made"] = [stamp(file) for file in made_files(folder, case, dataset_json)]
    except UserError as e:
        return case, entry, [f"{e}: {fix}"]
    # a raw file that is newer than the case may have been changed, or only copied: compare the voxels
    made = (folder / (case + SUFFIXES[-1])).stat().st_mtime_ns
    if doubtful or max(since, *(max(s[2:4]) for s in stamps)) > made:
        preprocessor = configuration_manager.preprocessor_class(verbose=False)
        again = preprocessor.run_case(files[:-1], files[-1], manager, configuration_manager, dataset_json)
        if not (_are_close(data, again[0]) and np.array_equal(seg, again[1])):
            if doubtful:
                return case, entry, [f"{folder / case}.b2nd: damaged, its voxels are not those of {files[0]}: {fix}"]
            return case, entry, [f"{files[-1]}: this label, its image or the plans changed after preprocessing: {fix}"]
    nothing = values_of_nothing(manager, configuration_manager)
    problems = preprocessed_problems(data, files[:-1], channel_names(dataset_json), nothing)
    if problems:
        remove_case(folder, case)
    return case, entry | {"spread": spread(data)}, problems


def _are_close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, atol=1e-3)  # other versions of libraries round differently


def case_files(folder: Path, case: str) -> list[Path]:
    """The paths of the files of a preprocessed case."""
    return [folder / (case + suffix) for suffix in SUFFIXES]


def made_files(folder: Path, case: str, dataset_json: dict) -> list[Path]:
    """The paths of all files that preprocessing makes from a labelled case, with nnU-Net's copy of the label."""
    return [*case_files(folder, case), folder.parent / REFERENCES / (case + dataset_json["file_ending"])]


def made_of(entry: dict, files: list[Path]) -> list[Stamp] | None:
    """The present stamps of the files if they equal the stamps in the entry of a record or manifest, else None."""
    try:
        return all_renewed(entry["made"] or [], files)
    except OSError:  # a file is missing
        return None


def remove_case(folder: Path, case: str) -> None:
    """Remove a preprocessed case, so that no training uses it."""
    for file in case_files(folder, case):
        file.unlink(missing_ok=True)


def copy_label(label: str, copy: Path, stamp: Stamp) -> None:
    """Make nnU-Net's copy of a label equal to the label, because nnU-Net replaces only a copy that is older.

    Args:
        stamp: the stamp of the label.

    Raises:
        DiskError: the disk is full or read-only, or the copy is not equal.
    """
    if copy.is_file() and copy.stat().st_size == stamp[1] and digest(copy) == stamp[-1]:
        return
    with written_whole(copy) as temporary:
        shutil.copy2(label, temporary)
        if digest(temporary) != stamp[-1]:
            raise disk_error(copy, f"the copy of {label} differs from it")


def preprocess_again(plans: dict, configuration: str) -> str:
    """The command that makes the plans and the preprocessed data again."""
    planner = plans.get("experiment_planner_used", "ExperimentPlanner")
    option = "" if planner == "ExperimentPlanner" else f" -pl {planner}"
    number = number_of(plans["dataset_name"])
    return f"run nnunet_semiseg plan_and_preprocess -d {number} -c {configuration}{option}"


def preprocess_unlabeled_again(plans: dict, configuration: str) -> str:
    """The command that updates the preprocessed unlabelled cases, and checks the labelled ones."""
    number, name = number_of(plans["dataset_name"]), plans["plans_name"]
    return f"run nnunet_semiseg preprocess_unlabeled -d {number} -c {configuration} -plans_name {name}"


def number_of(dataset: int | str) -> int | str:
    """The number in the name of a dataset. Anything else is returned as it is."""
    match = re.match(r"Dataset(\d{3,})", str(dataset))
    return int(match[1]) if match else dataset


# ------------------------------------------------------------------------------------------ at the start of a training


def check_labeled_data(preprocessed: Path, raw: Path | None, plans: dict, configuration: str) -> None:
    """Check that the labelled cases are complete and made from the present files. No label in `raw` is opened.

    Args:
        raw: the raw dataset. None if there is none; a computer that trains does not need it.

    Raises:
        UserError: a file is half-written; a copy of a label is missing or incomplete; a labelled image or label has
            changed, is new or is missing; the fingerprint or the data belong to other cases or plans; the copy of
            `dataset.json` differs from it.
    """
    name = resolved(plans, configuration)["data_identifier"]
    fix = preprocess_again(plans, configuration)
    folder = preprocessed / name
    record = read_record(preprocessed, name)
    cases = sorted(file.stem for file in folder.glob("*.b2nd") if not file.stem.endswith("_seg"))
    if not cases:  # an old version of nnU-Net wrote other files
        return
    if record["cases"] and record["plans_hash"] != plans_hash(plans, configuration):
        raise UserError(
            f"{folder}: was preprocessed with other plans: {plans['plans_name']} have changed since then: {fix}"
        )
    dataset_json = read_dataset_json(raw or preprocessed)
    _check_description(raw, preprocessed, dataset_json, fix)
    now = {case: dict(entry) for case, entry in record["cases"].items()}
    look = preprocess_unlabeled_again(plans, configuration)
    if raw and not (raw / IMAGES_FOLDER).is_dir():
        look = f"{fix} --labeled_only"
    _check_made(folder, cases, now, dataset_json, fix, look)
    if raw and (files := labeled_files(raw, dataset_json)):
        _check_raw(files, raw, folder, cases, now, fix, look)
    _check_fingerprint(preprocessed, len(cases), fix)
    if now != record["cases"]:  # so that the next start does not have to read the files again
        with contextlib.suppress(OSError, UserError):
            write_record(preprocessed, name, now, record["plans_hash"])


def _check_description(raw: Path | None, preprocessed: Path, dataset_json: dict, fix: str) -> None:
    """Check that nnU-Net's copy of `dataset.json` has the labels, channels and file ending of the raw data set.

    A training reads the copy. Other keys, such as the prompts, are not compared here.
    """
    copy = read_dataset_json(preprocessed)
    for key in ("labels", "regions_class_order", "channel_names", "file_ending"):
        old, new = (channel_names(d) if key == "channel_names" else d.get(key) for d in (copy, dataset_json))
        if old != new:
            raise UserError(f'{preprocessed / "dataset.json"}: "{key}" differs from that in {raw}/dataset.json: {fix}')


def _check_made(
    folder: Path, cases: Sequence[str], record: dict[str, dict], dataset_json: dict, fix: str, look: str
) -> None:
    """Check that preprocessed files and copies of labels have not changed since the record of the cases was written.

    Args:
        record: the entries of the record. Here they get the present times of the files; the caller writes them.
        look: the command that compares contents, and copies labels again.
    """
    for case in tqdm(cases, "Labelled cases", delay=DELAY, disable=None):  # None: only on a terminal
        *files, copy = made_files(folder, case, dataset_json)
        made: list[Any] = record.get(case, {}).get("made") or [None] * 4
        *before, old_copy = made
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: no such file: {fix}")
        if not copy.is_file():
            raise UserError(f"{copy}: no such file, but validation needs this copy of the label: {look}")
        if old_copy is None:
            for file in files[:2]:
                if not opens(file):
                    raise UserError(f"{file}: half-written or damaged: {fix}")
            continue
        stamps = [renewed(*pair) for pair in zip(before, files, strict=True)]
        if None in stamps:
            raise UserError(f"{files[stamps.index(None)]}: {DAMAGED}: {fix}")
        if (copy_stamp := renewed(old_copy, copy)) is None:
            raise UserError(f"{copy}: this copy is not the label that was preprocessed: {look}")
        record[case]["made"] = [*stamps, copy_stamp]


def _check_fingerprint(preprocessed: Path, count: int, fix: str) -> None:
    file = preprocessed / f"{FINGERPRINT}.json"
    fingerprint = read_json(file, fix)
    check(fingerprint, {"shapes_after_crop": list}, file, fix)
    shapes = fingerprint["shapes_after_crop"]
    if len(shapes) != count:
        raise UserError(f"{file}: made from {len(shapes)} labelled cases, but {count} are preprocessed: {fix}")


def _check_raw(
    files: dict[str, list[str]],
    raw: Path,
    folder: Path,
    cases: Sequence[str],
    record: dict[str, dict],
    fix: str,
    look: str,
) -> None:
    """Check that images and labels have not changed since the record of the cases was written.

    If the times of an image have changed, its content is compared. A training must not open labels. So if the time of a
    label has changed and its size has not, the error asks for the command `look`, which compares contents. It does so,
    too, if a case has no record, and a file is newer than what was made of it.

    Args:
        record: see `_check_made`.
    """
    for case in sorted(files.keys() ^ set(cases)):
        what = "is new and not preprocessed" if case in files else "was preprocessed but is missing now"
        raise UserError(f"{raw}: labelled case {case} {what}: {fix}")
    for case, (*images, label) in files.items():
        for file in (*images, label):
            if not os.path.isfile(file):
                raise UserError(f"{file}: no such file, but {case} is preprocessed: put it back, or {fix}")
        if case not in record:  # preprocessed by nnU-Net's own command, and never checked since
            made = os.stat(folder / (case + SUFFIXES[-1])).st_mtime_ns
            if newer := [file for file in (*images, label) if os.stat(file).st_mtime_ns > made]:
                raise UserError(f"{newer[0]}: is newer than the preprocessed case: to compare its content, {look}")
            continue
        *old, old_label = record[case]["files"]
        stamps, label_stamp = all_renewed(old, images), renewed(old_label, label, may_read=False)
        record[case]["files"] = [*(stamps or []), label_stamp]
        if stamps is None or (label_stamp is None and os.stat(label).st_size != old_label[1]):
            raise UserError(f"{label}: this label or its image is not what was preprocessed: {fix}")
        if label_stamp is None:
            raise UserError(f"{label}: its time has changed since it was preprocessed: to compare its content, {look}")
