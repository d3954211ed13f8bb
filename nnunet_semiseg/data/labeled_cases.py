"""Find the files of labelled cases, and check them before any other step uses them."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_semiseg.data.half_accepted import refuse_half_accepted
from nnunet_semiseg.data.image_problems import (
    header_problems,
    intensity_problems,
    label_problems,
    nifti_damage,
    reading_problems,
    take_out,
)
from nnunet_semiseg.data.records import known_stamps
from nnunet_semiseg.data.stamps import Stamp, stamp
from nnunet_semiseg.data.unpacked_nifti import unpacked_nifti
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.parallel import run_jobs


def channel_names(dataset_json: dict) -> list[str]:
    """The names of the channels, in order. Old datasets list them under `modality` instead of `channel_names`."""
    return list((dataset_json.get("channel_names") or dataset_json["modality"]).values())


def labeled_images(raw_dataset_folder: str | Path, dataset_json: dict) -> dict[str, list[str]]:
    """The images of each labelled case, by its name.

    It finds the same as nnU-Net's get_filenames_of_train_images_and_targets, but without its pool of 12 processes.

    Raises:
        UserError: `nnunet_semiseg accept` was interrupted, so that a case may be split between two folders.
    """
    raw = str(raw_dataset_folder)
    refuse_half_accepted(Path(raw))
    if "dataset" in dataset_json:
        entries = dataset_json["dataset"].items()
        return {case: [os.path.join(raw, os.path.expandvars(i)) for i in e["images"]] for case, e in entries}
    folder, ending = os.path.join(raw, "imagesTr"), dataset_json["file_ending"]
    cases: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name.endswith(ending):
            cases.setdefault(name[: -len(ending) - 5], []).append(os.path.join(folder, name))
    return cases


def labeled_files(raw: str | Path, dataset_json: dict) -> dict[str, list[str]]:
    """The files of each labelled case: its images, then its label. Raises like `labeled_images`."""
    if "dataset" in dataset_json:
        labels = {case: os.path.expandvars(e["label"]) for case, e in dataset_json["dataset"].items()}
    else:
        labels = {case: f"labelsTr/{case}{dataset_json['file_ending']}" for case in labeled_images(raw, dataset_json)}
    return {case: [*i, os.path.join(raw, labels[case])] for case, i in labeled_images(raw, dataset_json).items()}


def inspect_labeled(raw: Path, preprocessed: Path, dataset_json: dict, num_processes: int) -> dict[str, list[Stamp]]:
    """Check all labelled images and labels that were not checked before.

    Returns:
        For each case the stamps (name, size, times, hash) of its files.

    Raises:
        UserError: a file is missing or damaged; a label does not fit; all labels are empty. There is one line for each
            problem.
    """
    cases = labeled_files(raw, dataset_json)
    missing = []
    for *images, label in cases.values():
        missing += [f"{i}: no such file, or a link to none: {take_out(i)}" for i in images if not os.path.isfile(i)]
        if not os.path.isfile(label):
            missing.append(f"{label}: no such file: put the label there, or move the case's images to imagesUn")
    if missing:
        raise UserError("\n".join(missing))
    stamps = known_stamps(preprocessed, cases)
    example = next(iter(cases.values()))[0]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # each reader that fails prints a traceback
            reader = determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)
    except RuntimeError:  # it has tried all readers on this one image
        raise UserError(f"{example}: cannot be read by any of nnU-Net's readers: {take_out(example)}") from None
    jobs = [(case, cases[case], reader, dataset_json) for case in cases if case not in stamps]
    problems, empty = {}, []
    for case, found, is_empty, now in run_jobs(_inspect_case, jobs, num_processes, "Labelled cases"):
        problems[case], stamps[case] = found, now
        empty += [case] if is_empty else []
    if lines := [line for case in sorted(problems) for line in problems[case]]:
        raise UserError("\n".join(lines))
    if len(empty) == len(cases):
        folder = Path(next(iter(cases.values()))[-1]).parent
        raise UserError(f"{folder}: all labels are empty: draw a class in at least one of them")
    return stamps


def _inspect_case(
    case: str, files: list[str], reader: type, dataset_json: dict
) -> tuple[str, list[str], bool, list[Stamp]]:
    """Check one case.

    Returns its name, its problems (one line each), whether its label is empty, and the stamps (name, size, times, hash)
    of its files.
    """
    *images, label = files
    stamps = [stamp(file) for file in files]
    problems = header_problems(files, reader)
    if problems:
        return case, problems, False, stamps
    with TemporaryDirectory(prefix="nnunet_semiseg_") as folder:
        unpacked = [_unpacked(file, Path(mkdtemp(dir=folder))) for file in files]  # files may have the same name
        damages = zip(files, map(nifti_damage, unpacked), strict=True)
        if problems := [f"{file}: {damage}: {take_out(file)}" for file, damage in damages if damage]:
            return case, problems, False, stamps
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                data, about = reader().read_images(unpacked[:-1])
                seg, about_label = reader().read_seg(unpacked[-1])
        except Exception:  # the kind depends on the damage
            if problems := reading_problems(images, reader) + reading_problems([label], reader):
                return case, problems, False, stamps
            raise
    problems += intensity_problems(data, images, channel_names(dataset_json))
    problems += (wrong := label_problems(seg, label, data.shape[1:], label_values(dataset_json)))
    spacings = about["spacing"], about_label["spacing"]
    if not wrong and not np.allclose(*spacings):
        image, own = (" x ".join(f"{mm:g}" for mm in spacing) for spacing in spacings)
        problems.append(f"{label}: a spacing of {own} mm differs from {image} mm, that of the image: {take_out(label)}")
    return case, problems, not (seg > 0).any(), stamps


def _unpacked(file: str, folder: Path) -> str:
    """The unpacked file, see `unpacked_nifti`. If the folder for temporary files is full, the packed file itself."""
    try:
        return unpacked_nifti(file, folder)
    except OSError:
        return file


def label_values(dataset_json: dict) -> set[int]:
    """All values that dataset.json names, including the ignore label."""
    values = dataset_json["labels"].values()
    return {int(v) for value in values for v in (value if isinstance(value, (list, tuple)) else [value])}
