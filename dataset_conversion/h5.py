"""The h5 files that SSL4MIS, UA-MT, DTC and their followers pass on."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import SimpleITK as sitk

from nnunet_semiseg.conversion import About, Case, Read, Source, by_name, convert_dataset
from nnunet_semiseg.dataset_conversion import brats2019, la2018, pancreas_ct
from nnunet_semiseg.errors import UserError

NOTE = "images are already normalised and cropped round the label by whoever made the h5 files, test cases too"

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
    notes=(NOTE,),
)

KNOWN = (  # how its case names look, what it was made from, and on which grid
    (r"[0-9A-Z]{20}", la2018.ABOUT, (0.625, 0.625, 0.625)),
    (r"(image)?\d{4}", pancreas_ct.ABOUT, (1.0, 1.0, 1.0)),
    (r"BraTS19_\w+", brats2019.ABOUT, (1.0, 1.0, 1.0)),
)


def find_cases(folder: Path, spacing: Sequence[float] | None = None, labels: Sequence[str] | None = None) -> Source:
    """
    Args:
        spacing: x y z, in mm, or one number; None: that of the known set.
        labels: names of the label values 1, 2, ...; None: those of the known set.
    """
    files = by_name((_case(path), path) for path in folder.rglob("*.h5"))
    if not files:
        return Source(ABOUT, {}, ())
    about, known_spacing = describe(list(files), labels)
    spacing = tuple(spacing or known_spacing or ())
    if len(spacing) not in (1, 3):
        raise UserError(f"{folder}: of no set whose voxel size is known: give it with --spacing X Y Z (mm)")
    cases = {}
    for name, path in files.items():
        image, label = (Read(read_h5, (path,), {"key": key, "spacing": spacing}) for key in ("image", "label"))
        cases[name] = Case(name, (image,), label)
    lists = {part: read_list(folder, f"{part}.list") for part in ("train", "val", "test")}
    return Source(about, cases, lists["train"] or list(cases), lists["val"], lists["test"])


def describe(names: Sequence[str], labels: Sequence[str] | None) -> tuple[About, Sequence[float] | None]:
    """What is known of a set with such case names, and its voxel size."""
    about, spacing = ABOUT, None
    for pattern, origin, known_spacing in KNOWN:
        if all(re.fullmatch(pattern, name) for name in names):
            changes = {"name": f"{origin.name}H5", "file_ending": ".nii.gz", "label_values": None, "crop": None}
            about = replace(origin, **changes, title=f"{origin.title}, from h5 files", notes=(NOTE,))
            spacing = known_spacing
    if labels:
        names = {"background": 0, **{name: i for i, name in enumerate(labels, 1)}}
        about = replace(about, labels=names, prompts={name: name for name in names})
    if not about.labels:
        raise UserError("the case names are of no known set: name its labels with --labels NAME ...")
    return about, spacing


def read_h5(path: Path, key: str, spacing: Sequence[float]) -> sitk.Image:
    with h5py.File(path) as file:
        if key not in file:
            raise UserError(f"{path}: has no dataset `{key}`")
        voxels = file[key][()]
    image = sitk.GetImageFromArray(voxels.T)  # x y z to z y x
    image.SetSpacing([float(s) for s in spacing] * (voxels.ndim // len(spacing)))
    return image


def read_list(folder: Path, name: str) -> list[str]:
    """Case names of a list file; what it says of their paths is left out. Empty, where there is no such file."""
    files = sorted(folder.rglob(name), key=lambda path: len(path.parts))
    lines = files[0].read_text(encoding="utf-8").split() if files else ()
    return [_case(Path(line)) for line in lines]


def _case(path: Path) -> str:
    if path.stem == "mri_norm2":
        return path.parent.name
    return path.name.removesuffix(".h5").removesuffix("_norm")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--spacing", type=float, nargs="+", metavar="MM", help="x y z; default: the known set's")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="of the values 1, 2, ...; default: the known set's")


convert = partial(convert_dataset, find_cases)
