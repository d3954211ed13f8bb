"""The user's own images and (fewer) labels."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_semiseg.conversion import About, Case, Read, Source, by_name, convert_dataset, read_dicom_series
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json

VOLUMES = (".nii.gz", ".nrrd", ".mha", ".gipl", ".nii", ".mhd", ".nhdr")
PICTURES = (".png", ".tif", ".bmp", ".tiff", ".jpg", ".jpeg")
READABLE = (".nii.gz", ".nrrd", ".mha", ".gipl", ".png", ".tif", ".bmp")  # by nnU-Net, as they are

ABOUT = About(
    name="MyData",
    title="Your own images",
    url="",
    licence="",
    citation="",
    layout="images/CASE_0000.nii.gz, one a channel (CASE_0001.nii.gz, ...), or images/CASE.nii.gz, or with\n"
    "  --channels t1 t2: images/CASE_t1.nii.gz and CASE_t2.nii.gz; .nrrd, .mha, .nii, .png, .tif and more,\n"
    "  or a DICOM series in a folder images/CASE (images/CASE_0000, ...)\n"
    "labels/CASE.nii.gz for the labelled cases, with the values 0, 1, 2, ...",
    protocol="labelled is what has a label; training, validation and test cases as --split says",
    channels=("image",),
    labels={},
    prompts={},
)


def find_cases(
    folder: Path,
    labels: Sequence[str] | None = None,
    channels: Sequence[str] = ("image",),
    name: str = ABOUT.name,
    split: str | Path | None = None,
) -> Source:
    """
    Args:
        labels: names of the label values 1, 2, ...
        channels: names of the channels, in their order; also the suffixes of the files, where those have no numbers.
        name: of the dataset.
        split: a JSON file `{"train": [case, ...], "val": [...], "test": [...]}`; None: every case is for training.
    """
    images, masks = _files(folder / "images"), _files(folder / "labels")
    if not images:
        return Source(ABOUT, {}, ())
    if not labels:
        raise UserError(f"{folder}: what do the label values 1, 2, ... mean? Say it with --labels NAME ...")
    cases_of = _group_channels(images, channels)
    labels_of = by_name((re.sub(r"_0000$", "", stem), path) for stem, path in masks)
    for case in labels_of.keys() - cases_of.keys():
        raise UserError(
            f"{labels_of[case]}: there is no image of case {case} in {folder / 'images'}: rename or remove it"
        )
    names = {"background": 0, **{label: i for i, label in enumerate(labels, 1)}}
    about = replace(
        ABOUT, name=name, labels=names, prompts={n: n for n in names}, channels=tuple(channels),
        file_ending=_file_ending([path for files in cases_of.values() for path in files]),
    )  # fmt: skip
    cases = {
        case: Case(
            case, tuple(_source(path) for path in files), _source(labels_of[case]) if case in labels_of else None
        )
        for case, files in cases_of.items()
    }
    if split is None:
        return Source(about, cases, sorted(cases, key=lambda case: (case not in labels_of, case)))
    lists = read_json(Path(split), 'write {"train": [case, ...], "val": [...], "test": [...]}')
    return Source(about, cases, *(lists.get(part, ()) for part in ("train", "val", "test")))


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Images, and folders of DICOM series, with their names less the ending."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        ending = next((e for e in (*VOLUMES, *PICTURES) if path.name.lower().endswith(e)), "")
        if not path.name.startswith(".") and (ending or path.is_dir()):
            found.append((path.name[: len(path.name) - len(ending)], path))
    return found


def _group_channels(images: Sequence[tuple[str, Path]], channels: Sequence[str]) -> Mapping[str, list[Path]]:
    """Files by case: by numbers where all have them, by the channels' names, or one file a case.

    A case that lacks a channel keeps the place where that was looked for, and fails alone.
    """
    by_stem = by_name(images)
    for suffixes in ([f"_{i:04d}" for i in range(len(channels))], [f"_{channel}" for channel in channels]):
        cases: dict[str, dict[str, Path]] = {}
        for stem, path in by_stem.items():
            suffix = next((s for s in suffixes if stem.endswith(s)), None)
            if suffix is None:
                break
            cases.setdefault(stem.removesuffix(suffix), {})[suffix] = path
        else:
            return {
                case: [files.get(s) or _sibling(next(iter(files.values())), case, s) for s in suffixes]
                for case, files in cases.items()
            }
    return {stem: [path] for stem, path in by_stem.items()}


def _sibling(path: Path, case: str, suffix: str) -> Path:
    ending = next((e for e in (*VOLUMES, *PICTURES) if path.name.lower().endswith(e)), "")
    return path.with_name(case + suffix + ending)


def _file_ending(paths: Sequence[Path]) -> str:
    """The images' own, where all have the same and nnU-Net reads it; else one that keeps every voxel."""
    for ending in READABLE:
        if all(path.name.endswith(ending) for path in paths):
            return ending
    return ".png" if any(path.name.lower().endswith(PICTURES) for path in paths) else ".nii.gz"


def _source(path: Path) -> Path | Read:
    return Read(read_dicom_series, (path,)) if path.is_dir() else path


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="of the label values 1, 2, ...")
    parser.add_argument(
        "--channels", nargs="+", default=["image"], metavar="NAME",
        help="in their order, CT where it is one; default: one, `image`",
    )  # fmt: skip
    parser.add_argument("--name", default=ABOUT.name, help="of the dataset; default: %(default)s")
    parser.add_argument("--split", metavar="FILE", help='JSON: {"train": [case, ...], "val": [...], "test": [...]}')


convert = partial(convert_dataset, find_cases)
