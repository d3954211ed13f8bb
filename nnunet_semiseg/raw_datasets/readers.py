"""Read images that nnU-Net cannot read directly: DICOM series, and images with colour channels."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.listing import dicom_kind
from nnunet_semiseg.raw_datasets.names import SERIES, plain
from nnunet_semiseg.raw_datasets.sources import find_files


def read_dicom_series(folder: Path, channel: str | None = None) -> sitk.Image:
    """Read a DICOM series below a folder. Its files may be in one folder or in several.

    Args:
        channel: the description of the wanted series, or its folder, or a part of these, if there are several series.

    Raises:
        UserError: no series or several series fit the channel; slices are missing or shifted; several lie at one
            position.
    """
    return sitk.ReadImage(series_files(folder, channel))


def read_dicom_channel(folder: Path, channel: str, channels: Sequence[str]) -> tuple[sitk.Image, str]:
    """Read the series of one channel, for a case with several channels.

    Also returns a note on series that are not used, because they belong to no channel. It is empty for all channels but
    the first.

    Raises:
        UserError: as `read_dicom_series`; also if the only series belongs to another channel.
    """
    series = find_series(folder)
    image = sitk.ReadImage(_choose(series, folder, channel, len(channels) > 1))
    taken = {uid for name in channels for uid in _fitting(series, folder, name)}
    others = [_text(files) for uid, files in series.items() if uid not in taken]
    if channel != channels[0] or not others or len(series) == 1:
        return image, ""
    return image, f"left out, of no channel: DICOM series {', '.join(others)}"


def series_files(folder: Path, channel: str | None = None) -> list[str]:
    """The files of the slices of a series, sorted by their position; see `read_dicom_series`."""
    return _choose(find_series(folder), folder, channel, False)


def _choose(series: Mapping[str, list[str]], folder: Path, channel: str | None, several: bool) -> list[str]:
    """Choose the series that fits the channel. Returns its files.

    Args:
        several: whether the cases have several series. Then even a single series must have the name of its channel.
    """
    by_name = channel is not None and (several or len(series) > 1)
    fitting = _fitting(series, folder, channel) if by_name and channel is not None else list(series)
    if len(fitting) == 1:
        return _in_order(series[fitting[0]], folder)
    what = f"{len(fitting) or 'no'} DICOM series"
    if by_name:
        what = f"{what} of {len(series)} fit{'s' if not fitting else ''} channel {channel}"
    fix = "leave exactly one there"
    if series and (by_name or len(series) > 1):
        fix += f", or, with convert folder, take some with --channels: {', '.join(map(_text, series.values()))}"
    raise UserError(f"{folder}: {what}: {fix}")


def _fitting(series: Mapping[str, list[str]], folder: Path, channel: str) -> list[str]:
    """The series whose description or folder equals the channel.

    If there is none, the series whose description or folder contains it; see `plain` for the spelling.
    """
    words = {
        uid: [plain(describe(files[0])), *(plain(p) for p in _below(files[0], folder))] for uid, files in series.items()
    }
    fitting = [uid for uid, names in words.items() if plain(channel) in names]
    return fitting or [uid for uid, names in words.items() if any(plain(channel) in name for name in names)]


def _text(files: Sequence[str]) -> str:
    return f"{describe(files[0]) or Path(files[0]).parent.name} ({len(files)} slices)"


def find_series(folder: Path) -> dict[str, list[str]]:
    """The files of each series below a folder. The keys are the UIDs of the series."""
    series: dict[str, list[str]] = {}
    for directory in sorted(_dicom_folders(folder)):
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(directory)):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(directory), uid)
            if dicom_kind(Path(files[0])) == SERIES:
                series.setdefault(uid, []).extend(files)
    return series


def _dicom_folders(folder: Path) -> dict[Path, Path]:
    """Find folders with DICOM images, at any depth, and the first image of each."""
    files = (file for file in find_files(folder, "*") if file.is_file() and dicom_kind(file) == SERIES)
    return {file.parent: file for file in reversed(list(files))}


def find_modalities(folder: Path) -> set[str]:
    """The modality (`CT`, `MR`, ...) of the first DICOM file in each folder. Unreadable files are reported later."""
    found = set()
    for file in _dicom_folders(folder).values():
        with contextlib.suppress(RuntimeError):
            found.add(_tag(str(file), "0008|0060"))
    return found - {""}


def describe(file: str) -> str:
    """The description of the series of a DICOM file."""
    return _tag(file, "0008|103e")


def _tag(file: str, tag: str) -> str:
    header = sitk.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    return header.GetMetaData(tag).strip() if header.HasMetaDataKey(tag) else ""


def _below(file: str, folder: Path) -> tuple[str, ...]:
    return Path(file).relative_to(folder).parent.parts


def read_grid(path: Path, channel: str | None = None) -> sitk.Image:
    """Read an image, a file or a DICOM series, to get its grid."""
    return sitk.ReadImage(series_files(path, channel)) if path.is_dir() else sitk.ReadImage(path)


def read_dicom_picture(path: Path) -> sitk.Image:
    """Read a single DICOM file. An X-ray is a picture; an image of several frames is a volume."""
    image = sitk.ReadImage(path)
    return image[:, :, 0] if image.GetDimension() == 3 and image.GetSize()[2] == 1 else image


def _in_order(files: Sequence[str], folder: Path) -> list[str]:
    """Sort slices by position.

    It refuses missing and shifted slices, and several at one position: ITK would read another spacing or shape.
    """
    heights, origins = {}, {}
    for file in files:
        header = sitk.ImageFileReader()
        header.SetFileName(file)
        header.ReadImageInformation()
        origin, direction = header.GetOrigin(), np.reshape(header.GetDirection(), (3, 3))
        heights[file] = float(np.dot(origin, direction[:, 2]))
        origins[file] = origin - heights[file] * direction[:, 2]
    ordered = sorted(files, key=heights.get)
    if len(ordered) == 1:
        return ordered
    gaps = np.diff([heights[file] for file in ordered])
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise UserError(
            f"{folder}: several slices lie at {heights[ordered[gaps.argmin()]]:g} mm: remove copies; if the series has"
            " several volumes, keep one"
        )
    odd = np.abs(gaps - usual).argmax()
    if abs(gaps[odd] - usual) > max(0.1 * usual, 0.11):  # positions are often rounded to 0.1 mm
        raise UserError(
            f"{folder}: slices are {usual:g} mm apart, but {gaps[odd]:g} mm at {heights[ordered[odd]]:g} mm: slices"
            f" are missing or belong to another series: add or remove them"
        )
    if np.ptp(list(origins.values()), axis=0).max() > 1:
        raise UserError(
            f"{folder}: its slices are shifted against each other, as with a tilted gantry: resample the volume first"
        )
    return ordered


def read_gray(path: Path) -> sitk.Image:
    """Read a 2d image whose colour channels are equal, as one channel."""
    return one_channel(sitk.ReadImage(path), str(path))


def one_channel(image: sitk.Image, name: str) -> sitk.Image:
    """The image, or the first of its colour channels if all are equal.

    Raises UserError if they are not equal, or if a volume has several values in each voxel.
    """
    number = image.GetNumberOfComponentsPerPixel()
    if number == 1:
        return image
    voxels = sitk.GetArrayViewFromImage(image)
    if image.GetDimension() > 2:  # 3D Slicer saves overlapping segments in several layers
        fix = "save it with one (in 3D Slicer: export the segments as a label map)"
        raise UserError(f"{name}: has {number} values in each voxel instead of one: {fix}")
    colours = 3 if number >= 3 else 1  # two: grey and alpha
    if not (voxels[..., :colours] == voxels[..., :1]).all():
        raise UserError(
            f"{name}: is a colour image instead of a grey one: save it in grey, or, with convert folder, name all its"
            f" channels with --channels"
        )
    return sitk.VectorIndexSelectionCast(image, 0)
