"""Read, check and write one case."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.data.headers import data_files, header_problem, is_spacing
from nnunet_semiseg.data.image_problems import nifti_damage, one_line_of
from nnunet_semiseg.data.written_images import write_image
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import DiskError, disk_errors, write_json
from nnunet_semiseg.raw_datasets.description import About, Case, Crop, Read
from nnunet_semiseg.raw_datasets.names import some
from nnunet_semiseg.raw_datasets.readers import one_channel
from nnunet_semiseg.raw_datasets.registration import align
from nnunet_semiseg.raw_datasets.repair import Repair, grid_difference, read

STATE = ".conversion"
LINKED = (".nrrd", ".mha")
"""Endings of files that nnU-Net reads, but whose voxels may be in another file that the header names. A link to the
header would not include that file."""


def convert_case(
    case: Case, subset: str, about: About, crop: Crop | None, folder: Path, target: Path, register: str = "off"
) -> tuple[str, str | None]:
    """Check and write one case. When it is complete, a record is written into `.conversion`.

    Args:
        subset: `Tr`, `Un` or `Ts`: the end of the name of the folders to write into.
        crop: the crop of all images and labels. None: they stay whole.
        folder: the folder of the source.
        target: the folder of the dataset.
        register: a value of `registration.REGISTER`.

    Returns:
        The name of the case; and what is wrong with it, in one line, or None.

    Raises:
        DiskError: the disk is full or read-only.
    """
    staging = target / STATE / f"case_{case.name}"
    shutil.rmtree(staging, ignore_errors=True)  # a killed process may have left it
    try:
        with disk_errors(target):
            _convert_case(case, subset, about, crop, folder, target, staging, register)
    except DiskError:  # the other cases will have the same error
        raise
    except Exception as e:  # readers have errors of many kinds
        return case.name, one_line_of(e)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return case.name, None


def _convert_case(
    case: Case, subset: str, about: About, crop: Crop | None, folder: Path, target: Path, staging: Path, register: str
) -> None:
    # the label of an unlabelled case is not opened, unless the user asks for a crop around it
    notes = _write_case(case, subset, about, crop, folder, staging, register)
    for file in staging.rglob(f"*{about.file_ending}"):
        os.replace(file, target / file.parent.name / file.name)
    labels = () if case.label is None or subset == "Un" else (case.label,)
    sources = {}
    for source in (*case.images, *labels):
        for path in paths_of(source):
            sources[os.path.relpath(path, folder)] = _sha256(path)
    write_json({"sources": sources, "notes": notes}, target / STATE / f"case_{case.name}.json")


def _write_case(
    case: Case, subset: str, about: About, crop: Crop | None, root: Path, staging: Path, register: str
) -> list[str]:
    notes: list[str] = []
    images = [load(image, notes, about.repair, root) for image in case.images]
    _check_channels(case, images, about)
    first = images[0][0]
    for i, (image, _) in enumerate(images):
        if image.GetDimension() != about.dimension:
            where = _name(case.images[i])
            raise UserError(
                f"{where}: has {image.GetDimension()} dimensions, but images of this dataset have {about.dimension}: "
                "remove this case"
            )
        names = about.channels[i], about.channels[0]
        if i and register == "rigid":
            images[i] = _registered(images[i], case.images[i], first, names, register, notes)
        images[i] = _on_grid(images[i], case.images[i], first, case.images[0], notes)
        if i and register == "check":
            images[i] = _registered(images[i], case.images[i], first, names, register, notes)
    label = None
    if case.label is None and subset == "Tr":
        raise UserError("is for validation, but has no label: add it, or take the case out of the list")
    if case.label is None and crop:
        raise UserError("has no label, so there is nothing to crop around: add it, or use --crop none")
    if case.label is not None and (subset != "Un" or crop):
        given, link = load(case.label, notes, about.repair, root)
        label = one_channel(given, _name(case.label))
        label, link = _on_grid((label, link if label is given else None), case.label, first, case.images[0], notes)
        label.CopyInformation(first)  # they differ only by rounding in the files
    slices = crop(label) if crop else None
    folder, ending = staging / f"images{subset}", about.file_ending
    for i, (image, whole) in enumerate(images):
        _write(image, whole, slices, folder / f"{case.name}_{i:04d}{ending}", ending)
    if label is None or subset == "Un":
        return [*notes, "has no label: it can be predicted, not evaluated"] if subset == "Ts" else notes
    mapped = _map_label(label, about.label_map, _name(case.label), about.value_hint)
    if not sitk.GetArrayViewFromImage(mapped).any():
        notes.append("the label is empty")
    whole = link if mapped is label else None
    _write(mapped, whole, slices, staging / f"labels{subset}" / f"{case.name}{ending}", ending)
    return notes


Loaded = tuple[sitk.Image, Path | None]
"""An image, and its file if the file holds exactly this image."""


def _check_channels(case: Case, images: Sequence[Loaded], about: About) -> None:
    """Raise UserError if a case has more or fewer channels than the data set. It names the file with most channels."""
    counts = [image.GetNumberOfComponentsPerPixel() for image, _ in images]
    if sum(counts) != len(about.channels):
        most, file = max(zip(counts, map(_name, case.images), strict=True), key=lambda pair: pair[0])
        raise UserError(
            f"{file}: has {most} channels, so its case has {sum(counts)} instead of {len(about.channels)}"
            f" ({', '.join(about.channels)}): add or remove channels"
        )


def load(source: Path | Read, notes: list[str], repair: Repair, root: Path | None = None) -> Loaded:
    """Read an image of a case. The notes say how it differs from its file.

    Args:
        root: the header of an image must not name a file outside this folder. None: the folder of the header. The
            header itself may lie elsewhere, and links are followed.

    Raises:
        UserError: the image is missing, or has a problem that `repair` does not allow to fix.
    """
    for path in paths_of(source):
        if not path.exists():
            raise UserError(
                f"{path}: is a link to {path.readlink()}, which does not exist: fix or remove the link"
                if path.is_symlink()
                else f"{path}: no such file: add it"
            )
        if path.is_file() and (problem := header_problem(path, root or path.parent)):
            raise UserError(f"{path}: {problem}")
    if isinstance(source, Path):
        image, found = read(source, repair)
        if any(data_files(source)) and source.name.lower().endswith(LINKED):
            found.append(f"{source.name} and the file with its voxels are written as one")
        notes += found
        link = None if found else source
    else:
        image, link = _run(source, notes), None
    if image.GetDimension() == 2:  # from its dots per inch, which nnU-Net does not read; a mask may have others
        image.SetSpacing((1, 1))
        image.SetOrigin((0, 0))
    if not is_spacing(image.GetSpacing()):
        raise UserError(f"{_name(source)}: its spacing, {image.GetSpacing()} mm, is impossible: correct its header")
    return image, link


def _run(source: Read, notes: list[str]) -> sitk.Image:
    for path in source.paths:
        if path.is_file() and (damage := nifti_damage(path)) and not source.repairs:
            raise UserError(f"{path}: {damage}: save or download it again")
    try:
        loaded = source.function(*source.paths, **source.options)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{_name(source)}: cannot be read ({one_line_of(e)}): save or download it again") from None
    if isinstance(loaded, tuple):
        loaded, note = loaded
        notes.extend([note] if note else [])
    voxels = sitk.GetArrayViewFromImage(loaded)
    if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
        raise UserError(f"{_name(source)}: has voxels that are NaN or infinite: replace them by numbers")
    return loaded


def _registered(
    loaded: Loaded, source: Path | Read, first: sitk.Image, names: tuple[str, str], how: str, notes: list[str]
) -> Loaded:
    """Compare a channel with the first one, or align it with the first one; see `align`. Its note is added to `notes`.

    Args:
        source: the file of the channel, for messages.
        names: the names of the channel and of the first one.
        how: `check` or `rigid`.
    """
    image, link = loaded
    try:
        moved, note = align(image, first, *names, how)
    except UserError as error:
        raise UserError(f"{_name(source)}: {error}") from None
    notes.append(note)
    return moved, link if moved is image else None


def _on_grid(loaded: Loaded, source: Path | Read, expected: sitk.Image, of: Path | Read, notes: list[str]) -> Loaded:
    """Replace the header of an image by the expected one if it differs only by rounding.

    Raises UserError if the grids differ by more.
    """
    image, link = loaded
    difference, rounded = grid_difference(image, expected)
    if difference:
        fix = "if only the header is wrong, correct it; otherwise resample the image"
        raise UserError(f"{_name(source)}: {difference} in {_name(of)}: {fix}")
    if rounded:
        notes.append(f"{rounded} ({Path(_name(source)).name})")
        image.CopyInformation(expected)
        link = None
    return image, link


def _map_label(label: sitk.Image, values: Mapping[int, int], name: str, hint: str) -> sitk.Image:
    """The label itself if its values are integers and right, else a copy with the values of the dataset, uint8."""
    voxels = sitk.GetArrayViewFromImage(label)
    present, counts = np.unique(voxels, return_counts=True)
    if unknown := [f"{v:g} ({n} voxels)" for v, n in zip(present, counts, strict=True) if v not in values]:
        known = ", ".join(map(str, values))
        raise UserError(f"{name}: has the label value {some(unknown)}, but the known values are {known}: {hint}")
    if {1, 255} <= set(present.tolist()) and values[1] == values[255]:
        raise UserError(f"{name}: has label values 1 and 255, but 255 is read as 1: remove one of them")
    if np.issubdtype(voxels.dtype, np.integer) and all(values[int(v)] == v for v in present):
        return label
    mapped = np.zeros(voxels.shape, np.uint8)
    for value in present:
        mapped[voxels == value] = values[int(value)]
    mapped = sitk.GetImageFromArray(mapped)
    mapped.CopyInformation(label)
    return mapped


def _write(image: sitk.Image, whole: Path | None, slices, file: Path, ending: str) -> None:
    """Write an image into the dataset.

    If `whole` has the right ending and the image is not cropped, `whole` is linked, or copied if links do not work.

    Args:
        whole: a source file that holds exactly this image. None if there is none.
        slices: the crop. None: the whole image.
        file: where to write.
        ending: the `file_ending` of the dataset.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if slices is not None or whole is None or not whole.name.endswith(ending):
        warns = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)  # about parts of a header that the new format does not have
        try:
            write_image(image if slices is None else image[slices], file)
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(warns)
        return
    try:
        os.link(whole.resolve(), file)
    except OSError:
        shutil.copyfile(whole, file)


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
    """The files of an image: one file, a header and its data, or all files of a folder (a DICOM series), sorted."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if not path.is_dir():
        files += [path.parent / name for name in data_files(path)]
    return [file for file in files if file.is_file()]


def paths_of(source: Path | Read | None) -> tuple[Path, ...]:
    """The paths of an image or a label: files or folders. `files_of` gives all files of a path."""
    return () if source is None else source.paths if isinstance(source, Read) else (source,)
