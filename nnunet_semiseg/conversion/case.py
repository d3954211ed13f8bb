"""One case: read, checked and written."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.conversion.description import About, Case, Crop, Read
from nnunet_semiseg.conversion.readers import one_channel
from nnunet_semiseg.data.headers import header_problem
from nnunet_semiseg.data.image_problems import geometry_difference, nifti_damage, one_line_of
from nnunet_semiseg.data.written_images import write_image
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import DiskError, disk_errors, write_json

STATE = ".conversion"


def convert_case(
    case: Case, subset: str, about: About, crop: Crop | None, folder: Path, target: Path
) -> tuple[str, str | None]:
    """Check and write one case; a record in `.conversion` says that it is whole.

    Returns:
        The case's name, and what is wrong with it, in one line.

    Raises:
        DiskError: the disk is full or read-only.
    """
    staging = target / STATE / f"case_{case.name}"
    shutil.rmtree(staging, ignore_errors=True)  # a killed run may have left it
    try:
        with disk_errors(target):
            _convert_case(case, subset, about, crop, folder, target, staging)
    except DiskError:  # so do the other cases
        raise
    except Exception as e:  # readers raise of many kinds
        return case.name, one_line_of(e)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return case.name, None


def _convert_case(
    case: Case, subset: str, about: About, crop: Crop | None, folder: Path, target: Path, staging: Path
) -> None:
    # the label of an unlabelled case is not opened, unless the user has asked for a crop round it
    notes = _write_case(case, subset, about, crop, folder, staging)
    for file in staging.rglob(f"*{about.file_ending}"):
        os.replace(file, target / file.parent.name / file.name)
    labels = () if case.label is None or subset == "Un" else (case.label,)
    sources = {}
    for source in (*case.images, *labels):
        for path in paths_of(source):
            sources[os.path.relpath(path, folder)] = _sha256(path)
    write_json({"sources": sources, "notes": notes}, target / STATE / f"case_{case.name}.json")


def _write_case(case: Case, subset: str, about: About, crop: Crop | None, root: Path, staging: Path) -> list[str]:
    notes: list[str] = []
    images = [_load(image, notes, root) for image in case.images]
    channels = sum(image.GetNumberOfComponentsPerPixel() for image in images)
    if channels != len(about.channels):
        expected = f"{len(about.channels)} ({', '.join(about.channels)})"
        raise UserError(f"{_name(case.images[0])}: {channels} channels instead of {expected}")
    for path, image in zip(case.images, images, strict=True):
        if image.GetDimension() != about.dimension:
            raise UserError(f"{_name(path)}: {image.GetDimension()} dimensions, but the dataset has {about.dimension}")
        if difference := geometry_difference(image, images[0]):
            raise UserError(f"{_name(path)}: {difference} in {_name(case.images[0])}")
    label = None
    if case.label is None and subset == "Tr":
        raise UserError("has no label, which a labelled case needs")
    if case.label is not None and (subset != "Un" or crop):
        given = _load(case.label, notes, root)
        label = one_channel(given, _name(case.label))
        if difference := geometry_difference(label, images[0]):
            raise UserError(f"{_name(case.label)}: {difference} in {_name(case.images[0])}")
        label.CopyInformation(images[0])  # they differ by no more than what files round
    slices = crop(label) if crop else None
    folder, ending = staging / f"images{subset}", about.file_ending
    for i, (path, image) in enumerate(zip(case.images, images, strict=True)):
        _write(image, path, slices, folder / f"{case.name}_{i:04d}{ending}", ending)
    if label is None or subset == "Un":
        return [*notes, "has no label: it can be predicted, not evaluated"] if subset == "Ts" else notes
    mapped = _map_label(label, about.label_map, _name(case.label))
    if not sitk.GetArrayViewFromImage(mapped).any():
        notes.append("the label is empty")
    path = case.label if mapped is given else None
    _write(mapped, path, slices, staging / f"labels{subset}" / f"{case.name}{ending}", ending)
    return notes


def _load(source: Path | Read, notes: list[str], root: Path) -> sitk.Image:
    for path in source.paths if isinstance(source, Read) else (source,):
        if not path.exists():
            raise UserError(f"{path}: missing")
        if path.is_file() and (damage := header_problem(path, root) or nifti_damage(path)):
            raise UserError(f"{path}: {damage}")
    try:
        loaded = (
            source.function(*source.paths, **source.options) if isinstance(source, Read) else sitk.ReadImage(source)
        )
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{_name(source)}: cannot be read ({one_line_of(e)})") from None
    if isinstance(loaded, tuple):
        loaded, note = loaded
        notes.append(note)
    if loaded.GetDimension() == 2:  # dots per inch, which nnU-Net does not read and masks do not share
        loaded.SetSpacing((1, 1))
        loaded.SetOrigin((0, 0))
    voxels = sitk.GetArrayViewFromImage(loaded)
    if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
        raise UserError(f"{_name(source)}: has voxels that are NaN or infinite")
    return loaded


def _map_label(label: sitk.Image, values: Mapping[int, int], name: str) -> sitk.Image:
    """The label itself where nothing is to be changed, else a copy with the dataset's values, uint8."""
    voxels = sitk.GetArrayViewFromImage(label)
    present = np.unique(voxels)
    if unknown := [f"{v:g}" for v in present if v not in values]:
        known = ", ".join(map(str, values))
        raise UserError(f"{name}: label value {some(unknown)}, known are {known}: correct it, or name all its labels")
    if {1, 255} <= set(present.tolist()) and values[1] == values[255]:
        raise UserError(f"{name}: label values 1 and 255 at once, and 255 is read as 1: leave one")
    if np.issubdtype(voxels.dtype, np.integer) and all(values[int(v)] == v for v in present):
        return label
    mapped = np.zeros(voxels.shape, np.uint8)
    for value in present:
        mapped[voxels == value] = values[int(value)]
    mapped = sitk.GetImageFromArray(mapped)
    mapped.CopyInformation(label)
    return mapped


def _write(image: sitk.Image, source: Path | Read | None, slices, file: Path, ending: str) -> None:
    """Link the source's file where it is what nnU-Net reads, copy it where links do not work, else write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if slices is not None or not isinstance(source, Path) or not source.name.endswith(ending):
        write_image(image if slices is None else image[slices], file)
        return
    try:
        os.link(source.resolve(), file)
    except OSError:
        shutil.copyfile(source, file)


def _name(source: Path | Read) -> str:
    return str(source.paths[0] if isinstance(source, Read) else source)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in files_of(path):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    """A file, or a header and its data, or all files in a folder (a DICOM series), by the order of their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if path.name.lower().endswith((".mhd", ".nhdr")):
        files = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return [file for file in files if file.is_file()]


def paths_of(source: Path | Read | None) -> tuple[Path, ...]:
    """The files that an image or a label is read from."""
    return () if source is None else source.paths if isinstance(source, Read) else (source,)


def some(names: Sequence[str]) -> str:
    """At most five of the names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
