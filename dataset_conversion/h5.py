"""The h5 files that SSL4MIS, UA-MT, DTC and later projects publish."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import SimpleITK as sitk

from nnunet_semiseg.data.headers import total_memory
from nnunet_semiseg.dataset_conversion import brats2019, la2018, pancreas_ct
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.options import positive
from nnunet_semiseg.raw_datasets import (
    About,
    Case,
    Read,
    Source,
    by_name,
    convert_dataset,
    find_files,
    published_split,
)

NOTE = (
    "whoever made the h5 files has already normalised and cropped the images (LA and Pancreas-CT around the label, test"
    " cases too)"
)

ABOUT = About(
    name="H5",
    title="h5 files of the semi-supervised literature (LA, Pancreas-CT, BraTS 2019 or others of that form)",
    url="https://github.com/HiLab-git/SSL4MIS",
    licence="that of the data set the files were made from",
    citation="that of the data set the files were made from",
    layout="train.list, test.list (val.list), one case a line, and\n"
    "  LA:       06SR5RBREL16DQ6M8LWS/mri_norm2.h5\n"
    "  Pancreas: Pancreas_h5/image0001_norm.h5\n"
    "  BraTS:    data/BraTS19_2013_0_1.h5\n"
    "each with the datasets `image` and `label`, indexed x y z",
    protocol="the lists beside the files",
    channels=("MRI",),
    labels={},
    prompts={},
    value_hint="correct it, or name the values 1, 2, ... with --labels",
    notes=(NOTE,),
)


@dataclass(frozen=True)
class Known:
    """A data set that such files were made from: its cases' names (a pattern), their voxel size, its published list."""

    pattern: str
    about: About
    spacing: tuple[float, float, float]
    split: str


KNOWN = (
    Known(r"[0-9A-Z]{20}", la2018.ABOUT, (0.625, 0.625, 0.625), "la2018"),
    Known(r"(image)?\d{4}", pancreas_ct.ABOUT, (1.0, 1.0, 1.0), "pancreas_ct"),
    Known(r"BraTS19_\w+", brats2019.ABOUT, (1.0, 1.0, 1.0), "brats2019"),
)


def find_cases(folder: Path, spacing: Sequence[float] | None = None, labels: Sequence[str] | None = None) -> Source:
    """The cases of .h5 files, one in each file. Their names show the data set, and so voxel size, labels and split.

    Args:
        spacing: x y z, in mm, or one number. None: that of the known set.
        labels: names of the label values 1, 2, ... None: those of the known set.

    Raises:
        UserError: nothing says what the label values mean, or how large voxels are; a file belongs to another data set;
            a case appears twice.
    """
    files = by_name((_case(path), path) for path in find_files(folder, "*.h5"))
    if not files:
        return Source(ABOUT, {}, ())
    known = find_known(files)
    about = describe(known, labels)
    if not about.labels:
        raise UserError(
            f"{folder}: case names like {next(iter(files))} belong to no known data set: name the classes with"
            f" --labels NAME ..."
        )
    spacing = tuple(spacing or (known.spacing if known else ()))
    if not spacing:
        raise UserError(f"{folder}: the voxel size of this data set is not known: give it with --spacing X Y Z (mm)")
    if len(spacing) not in (1, 3):
        raise UserError(f"--spacing {' '.join(f'{s:g}' for s in spacing)}: give three numbers X Y Z (mm), or one")
    cases = {}
    for name, path in files.items():
        image, label = (Read(read_h5, (path,), {"key": key, "spacing": spacing}) for key in ("image", "label"))
        cases[name] = Case(name, (image,), label)
    protocol, lists = find_lists(folder, files, known)
    return Source(replace(about, protocol=protocol), cases, lists["train"], lists["val"], lists["test"])


def find_known(files: Mapping[str, Path]) -> Known | None:
    """The data set to which all case names belong.

    Raises:
        UserError: most of them, but not all, belong to a known set.
    """
    for known in KNOWN:
        odd = [path for name, path in files.items() if not re.fullmatch(known.pattern, name)]
        if not odd:
            return known
        if len(odd) < len(files) / 2:
            more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
            raise UserError(
                f"{odd[0]}{more}: its name is not like those of the other files, which are of"
                f" {known.about.name}: remove it"
            )
    return None


def describe(known: Known | None, labels: Sequence[str] | None) -> About:
    """Describe the data set. `labels` replaces the names of the known set. If both are None, no class has a name."""
    about = ABOUT
    if known:
        changes = {"name": f"{known.about.name}H5", "file_ending": ".nii.gz", "label_values": None, "crop": None}
        changes |= {"notes": (NOTE,), "value_hint": ABOUT.value_hint}
        about = replace(known.about, **changes, title=f"{known.about.title}, from h5 files")
    if labels:
        names = {"background": 0, **{name: i for i, name in enumerate(labels, 1)}}
        about = replace(about, labels=names, prompts={name: name for name in names})
    return about


def find_lists(folder: Path, names: Collection[str], known: Known | None) -> tuple[str, dict[str, list[str]]]:
    """The origin of the lists, in words, and the cases of each: lists beside the files, else the published ones."""
    lists = {part: read_list(folder, f"{part}.list") for part in ("train", "val", "test")}
    if any(lists.values()):
        listed = {*lists["val"], *lists["test"]}
        lists["train"] = lists["train"] or [name for name in names if name not in listed]
        return "the lists beside the files", lists
    if known:
        published = published_split(known.split)
        # for the pancreas, some files are named image0001_norm.h5, as in the list, and some 0001.h5
        prefix = "" if any(name.startswith("image") for name in names) else "image"
        lists = {part: [name.removeprefix(prefix) for name in published.get(part, ())] for part in lists}
        return f"no list beside the files, hence {known.about.protocol}", lists
    return "no list beside the files: every case is for training", lists | {"train": list(names)}


def read_h5(path: Path, key: str, spacing: Sequence[float]) -> sitk.Image:
    """The array `key` of a file, `image` or `label`. It is stored x y z, and its spacing is in mm.

    Raises:
        UserError: there is no such array; it is in another file, or larger than the memory.
    """
    with h5py.File(path) as file:
        if key not in file:
            raise UserError(f"{path}: has no dataset `{key}`: download the file again, or remove it")
        stored = None if isinstance(file.get(key, getlink=True), h5py.ExternalLink) else file[key]
        if not isinstance(stored, h5py.Dataset) or stored.file != file or stored.external or stored.is_virtual:
            raise UserError(
                f"{path}: `{key}` is no array, or is read from another file, which may be an attack: do not use"
                f" this file"
            )
        memory = total_memory()
        if memory and stored.nbytes > memory:
            claim = f"claims {stored.nbytes / 2**30:.0f} GiB, but this machine has {memory / 2**30:.0f}"
            raise UserError(f"{path}: `{key}` {claim}: do not use this file, or crop the array on a larger machine")
        voxels = stored[()]
    image = sitk.GetImageFromArray(voxels.T)  # x y z to z y x
    image.SetSpacing([float(s) for s in spacing] * (voxels.ndim // len(spacing)))
    return image


def read_list(folder: Path, name: str) -> list[str]:
    """The case names in a list file, without their paths. Empty if there is no such file."""
    files = sorted(find_files(folder, name), key=lambda path: len(path.parts))
    lines = files[0].read_text(encoding="utf-8").split() if files else ()
    return [_case(Path(line)) for line in lines]


def _case(path: Path) -> str:
    if path.stem == "mri_norm2":
        return path.parent.name
    return path.name.removesuffix(".h5").removesuffix("_norm")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's options, which are arguments of `find_cases`."""
    parser.add_argument(
        "--spacing",
        type=positive,
        nargs="+",
        metavar="MM",
        help="voxel spacing x y z in mm, or one number for all three; default: the spacing of a known data set",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="names of the label values 1, 2, ...; default: the names for a known data set",
    )


convert = partial(convert_dataset, find_cases)
