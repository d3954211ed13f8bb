"""The user's own images and (fewer) labels."""

from __future__ import annotations

import contextlib
import difflib
import math
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image

from nnunet_semiseg.conversion import (
    JUNK,
    About,
    Case,
    Read,
    Source,
    by_name,
    convert_dataset,
    find_files,
    one_channel,
    read_dicom_series,
    read_gray,
)
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json

VOLUMES = (".nii.gz", ".nrrd", ".mha", ".gipl", ".nii", ".mhd", ".nhdr")
PICTURES = (".png", ".tif", ".bmp", ".tiff", ".jpg", ".jpeg")
READABLE = (".nii.gz", ".nrrd", ".mha", ".gipl", ".nii", ".png", ".tif", ".bmp")  # by nnU-Net, as they are
BESIDE = (".json", ".txt", ".csv", ".tsv", ".md", ".xlsx", ".raw", ".zraw", ".gz")  # no images, and no surprise

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
    spacing: Sequence[float] | None = None,
) -> Source:
    """The cases of the folders `images` and `labels`; an image without a label is an unlabelled case.

    Args:
        labels: names of the label values 1, 2, ...; with a single one, 255 is 1 as well.
        channels: names of the channels, in their order; also the suffixes of the files, where those have no numbers.
        name: of the dataset.
        split: a JSON file `{"train": [case, ...], "val": [...], "test": [...]}`; None: every case is for training.
        spacing: x y z, in mm, of TIFF volumes, which do not say it themselves.

    Raises:
        UserError: options that make no sense, labels that belong to no image, a case that is there twice.
    """
    folder = _root(folder)
    images, left_out = _files(folder / "images")
    masks, unreadable = _files(folder / "labels")
    if not images:
        return Source(ABOUT, {}, ())
    _check(folder, labels, channels)
    if unreadable:
        raise UserError(f"{unreadable[0]}: of no kind that can be read ({', '.join(VOLUMES[:3])}, ...): convert it")
    cases_of = _group_channels(images, channels)
    labels_of = by_name((_case_of_label(stem, cases_of), path) for stem, path in masks)
    if alone := sorted(labels_of.keys() - cases_of.keys()):
        lines = (f"{labels_of[case]}: no image of case {case} in {folder / 'images'}: rename it" for case in alone)
        raise UserError("\n".join(lines))

    paths = [path for files in cases_of.values() for path in files if isinstance(path, Path)]
    dims = _most_common_dimension(paths)
    names = {"background": 0, **{label: i for i, label in enumerate(labels, 1)}}
    some = ", ".join(path.name for path in left_out[:5])
    about = replace(
        ABOUT,
        name=name,
        labels=names,
        label_values={0: 0, 1: 1, 255: 1} if len(labels) == 1 else None,
        prompts={n: n for n in names},
        channels=tuple(channels),
        dims=dims,
        file_ending=_file_ending(paths, dims),
        notes=(f"{len(left_out)} files in images are of no known kind and left out: {some}",) if left_out else (),
    )

    def image(path: Path | Read) -> Path | Read:
        if isinstance(path, Read):
            return path
        if path.is_dir():
            return Read(read_dicom_series, (path,))
        if dims == 3 and path.name.lower().endswith((".tif", ".tiff")):
            return Read(read_tiff_volume, (path,), {"spacing": spacing})
        return _picture(path, len(channels))

    cases = {
        case: Case(case, tuple(map(image, files)), _mask(labels_of[case], spacing, dims) if case in labels_of else None)
        for case, files in cases_of.items()
    }
    if split is None:
        return Source(about, cases, sorted(cases, key=lambda case: (case not in labels_of, case)))
    return Source(about, cases, *_read_split(Path(split), cases))


def read_tiff_volume(path: Path, spacing: Sequence[float] | None) -> sitk.Image:
    """A TIFF stack with the voxel size of the file CASE.json beside it, as nnU-Net has them (z y x), or with `spacing`.

    Raises:
        UserError: neither is there.
    """
    volume = sitk.ReadImage(path)
    beside = next((f for s in (path.stem, path.stem[:-5]) if (f := path.with_name(f"{s}.json")).is_file()), None)
    if beside:
        spacing = read_json(beside, 'write {"spacing": [z, y, x]}, in mm')["spacing"][::-1]
    if not spacing:
        raise UserError(f"{path}: a volume without a voxel size: give it with --spacing X Y Z (mm)")
    volume.SetSpacing([float(s) for s in spacing])
    return volume


def read_mask(path: Path) -> sitk.Image:
    """A picture of labels whose values are no grey: the indices of a palette, or one bit; transparency is left out."""
    with Image.open(path) as picture:
        labels = np.asarray(picture.getchannel(0) if picture.mode in ("LA", "PA") else picture)
    return sitk.GetImageFromArray(labels.astype(np.uint8))


def read_jpeg(path: Path, channels: int) -> sitk.Image:
    """With Pillow, which does not take a truncated file for a whole one."""
    with Image.open(path) as picture:
        image = sitk.GetImageFromArray(np.asarray(picture), isVector=picture.mode != "L")
    return one_channel(image, str(path)) if channels == 1 else image


def refuse(path: Path, why: str) -> None:
    """In place of a reader: the case fails alone, and the others go on."""
    raise UserError(f"{path}: {why}")


def _root(folder: Path) -> Path:
    """Where `images` is: often an archive has a folder of its own."""
    found = [path.parent for path in find_files(folder, "images") if path.is_dir()]
    return folder if (folder / "images").is_dir() or len(found) != 1 else found[0]


def _check(folder: Path, labels: Sequence[str] | None, channels: Sequence[str]) -> None:
    if not labels:
        raise UserError(f"{folder}: what do the label values 1, 2, ... mean? Say it with --labels NAME ...")
    if set(labels) == {"ignore"}:
        raise UserError("--labels ignore: there is no class beside what is ignored: name one")
    for option, names in (("--labels", ["background", *labels]), ("--channels", channels)):
        for name in names:
            if not name.strip():
                raise UserError(f"{option}: a name is empty: give a name for each")
            if names.count(name) > 1:
                why = "is value 0 in any case" if name == "background" else "is named twice"
                raise UserError(f"{option}: {name} {why}: leave it out")


def _files(folder: Path) -> tuple[list[tuple[str, Path]], list[Path]]:
    """Images, and folders of DICOM series, with their names less the ending; and files of no known kind."""
    found, unknown = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ending = next((e for e in (*VOLUMES, *PICTURES) if path.name.lower().endswith(e)), "")
        if path.name.startswith(JUNK):
            continue
        if path.is_dir():
            found.append((path.name, path))
        elif ending:
            found.append((path.name[: len(path.name) - len(ending)], path))
        elif not path.name.lower().endswith(BESIDE):
            unknown.append(path)
    return found, unknown


def _group_channels(images: Sequence[tuple[str, Path]], channels: Sequence[str]) -> dict[str, list[Path | Read]]:
    """Files by case: by numbers, by the channels' names, or one file a case.

    A case that lacks a channel keeps the place where that was looked for, and fails alone; so does a file that has no
    such suffix where most have.
    """
    by_stem = by_name(images)
    if all(stem.endswith("_0000") for stem in by_stem):  # one file a case, of as many channels as it has
        return {stem.removesuffix("_0000"): [path] for stem, path in by_stem.items()}
    for suffixes in ([f"_{i:04d}" for i in range(len(channels))], [f"_{channel}" for channel in channels]):
        cases: dict[str, dict[str, Path]] = {}
        others = {}
        for stem, path in by_stem.items():
            suffix = next((s for s in suffixes if stem.endswith(s)), None)
            if suffix is None:
                others[stem] = path
            else:
                cases.setdefault(stem.removesuffix(suffix), {})[suffix] = path
        if others and (len(channels) == 1 or len(others) > len(by_stem) / 2):
            continue
        why = f"its name ends with none of {', '.join(suffixes)}: rename it, or name all --channels"
        return {
            case: [files.get(s) or _sibling(next(iter(files.values())), case, s) for s in suffixes]
            for case, files in cases.items()
        } | {stem: [Read(refuse, (path,), {"why": why})] for stem, path in others.items()}
    return {stem: [path] for stem, path in by_stem.items()}


def _case_of_label(stem: str, cases: Mapping[str, list]) -> str:
    return stem if stem in cases else stem.removesuffix("_0000")


def _sibling(path: Path, case: str, suffix: str) -> Path:
    ending = next((e for e in (*VOLUMES, *PICTURES) if path.name.lower().endswith(e)), "")
    return path.with_name(case + suffix + ending)


def _most_common_dimension(paths: Sequence[Path]) -> int:
    """Of the images, by their headers; those that differ or cannot be read fail alone, later."""
    count: Counter[int] = Counter()
    for path in paths:
        header = sitk.ImageFileReader()
        header.SetFileName(str(path))
        with contextlib.suppress(RuntimeError):
            if path.is_dir():
                count[3] += 1
            elif path.exists():
                header.ReadImageInformation()
                count[header.GetDimension()] += 1
    return count.most_common(1)[0][0] if count else 3


def _file_ending(paths: Sequence[Path], dims: int) -> str:
    """The images' own, where all have the same and nnU-Net reads it; else one that keeps every voxel."""
    pictures = all(path.name.lower().endswith(PICTURES) for path in paths)
    own = [e for e in READABLE if all(path.name.endswith(e) and not path.is_dir() for path in paths)]
    if dims == 2 and pictures:
        has_tiff = any(path.name.lower().endswith((".tif", ".tiff")) for path in paths)
        return own[0] if own else ".tif" if has_tiff else ".png"
    return own[0] if own and not pictures else ".nii.gz"


def _picture(path: Path, channels: int) -> Path | Read:
    """The path itself where nnU-Net reads as many channels from it as there ought to be."""
    if path.name.lower().endswith((".jpg", ".jpeg")):
        return Read(read_jpeg, (path,), {"channels": channels})
    if channels > 1 or _mode(path) in (None, "L", "I;16", "I;16B", "I", "F") and not path.name.lower().endswith(".bmp"):
        return path  # a grey BMP has a palette, which SimpleITK reads as colours
    return Read(read_mask if _mode(path) == "LA" else read_gray, (path,))


def _mask(path: Path, spacing: Sequence[float] | None, dims: int) -> Path | Read:
    if dims == 3 and path.name.lower().endswith((".tif", ".tiff")):
        return Read(read_tiff_volume, (path,), {"spacing": spacing})
    if path.is_dir():
        return Read(read_dicom_series, (path,))
    return Read(read_mask, (path,)) if _mode(path) in ("P", "1", "LA", "PA") else path


def _mode(path: Path) -> str | None:
    """Pillow's name for what the pixels of a picture are; None for anything else. Reads the header only."""
    if not path.name.lower().endswith(PICTURES):
        return None
    try:
        with Image.open(path) as picture:
            return picture.mode
    except (OSError, Image.DecompressionBombError):
        return None  # what reads it later says why


def _read_split(file: Path, cases: Mapping[str, Case]) -> list[list[str]]:
    fix = 'write {"train": [case, ...], "val": [...], "test": [...]}'
    lists = read_json(file, fix)
    if not isinstance(lists, dict) or "train" not in lists or lists.keys() - {"train", "val", "test"}:
        raise UserError(f"{file}: {fix}")
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists.values()):
        raise UserError(f"{file}: {fix}")
    for part, names in lists.items():
        for name in names:
            if name not in cases:
                near = [case for case in cases if name.startswith(f"{case}.")]
                near += difflib.get_close_matches(name, cases, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the first is {next(iter(cases))}"
                raise UserError(f"{file}: {part}: there is no case {name}: {hint}")
    return [lists.get(part, []) for part in ("train", "val", "test")]


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options, which are arguments of `find_cases`."""
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="of the label values 1, 2, ...")
    parser.add_argument(
        "--channels", nargs="+", default=["image"], metavar="NAME",
        help="in their order, CT where it is one; default: one, `image`",
    )  # fmt: skip
    parser.add_argument("--name", default=ABOUT.name, help="of the dataset; default: %(default)s")
    parser.add_argument("--split", metavar="FILE", help='JSON: {"train": [case, ...], "val": [...], "test": [...]}')
    parser.add_argument("--spacing", type=_millimetres, nargs=3, metavar="MM", help="x y z, of TIFF volumes")


def _millimetres(text: str) -> float:
    """Raises ValueError, which argparse shows, for what is no length."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


convert = partial(convert_dataset, find_cases)
