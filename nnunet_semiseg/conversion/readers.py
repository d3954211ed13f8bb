"""Readers of images that nnU-Net does not read as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.conversion.listing import dicom_kind
from nnunet_semiseg.conversion.names import DICOM_SEG, RTSTRUCT, plain
from nnunet_semiseg.conversion.sources import find_files
from nnunet_semiseg.errors import UserError


def read_dicom_series(folder: Path, channel: str | None = None) -> sitk.Image:
    """A DICOM series below a folder, be its files in one folder or in several.

    Args:
        channel: what the series' description or its folder is called, where there are several.

    Raises:
        UserError: no series, or several that fit; slices that are missing, or there twice.
    """
    return sitk.ReadImage(series_files(folder, channel))


def series_files(folder: Path, channel: str | None = None) -> list[str]:
    """The files of the slices of a series, by their position; see `read_dicom_series`."""
    series = find_series(folder)
    fitting = list(series)
    if channel is not None and len(series) > 1:
        words = {
            uid: [plain(describe(files[0])), *(plain(p) for p in _below(files[0], folder))]
            for uid, files in series.items()
        }
        fitting = [uid for uid, names in words.items() if plain(channel) in names]
        fitting = fitting or [uid for uid, names in words.items() if any(plain(channel) in name for name in names)]
    if len(fitting) != 1:
        what = f"{len(fitting) or 'no'} DICOM series"
        if channel is not None and len(series) > 1:
            what = f"{what} of {len(series)} fit{'s' if not fitting else ''} channel {channel}"
        if len(series) > 1:
            known = ", ".join(
                f"{describe(files[0]) or Path(files[0]).parent.name} ({len(files)} slices)" for files in series.values()
            )
            raise UserError(
                f"{folder}: {what}: leave exactly one there, or name those to take with --channels: {known}"
            )
        raise UserError(f"{folder}: {what}: leave exactly one there")
    return _in_order(series[fitting[0]], folder)


def find_series(folder: Path) -> dict[str, list[str]]:
    """The files of each series below a folder, by its UID."""
    series: dict[str, list[str]] = {}
    for directory in sorted({file.parent for file in find_files(folder, "*") if file.is_file()}):
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(directory)):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(directory), uid)
            if dicom_kind(Path(files[0])) not in (DICOM_SEG, RTSTRUCT):
                series.setdefault(uid, []).extend(files)
    return series


def describe(file: str) -> str:
    """The description of the series that a DICOM file is of."""
    header = sitk.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    return header.GetMetaData("0008|103e").strip() if header.HasMetaDataKey("0008|103e") else ""


def _below(file: str, folder: Path) -> tuple[str, ...]:
    return Path(file).relative_to(folder).parent.parts


def read_grid(path: Path, channel: str | None = None) -> sitk.Image:
    """An image for its grid: a file, or a DICOM series."""
    return read_dicom_series(path, channel) if path.is_dir() else sitk.ReadImage(path)


def read_dicom_picture(path: Path) -> sitk.Image:
    """A DICOM file of its own: an X-ray is a picture, an image of several frames a volume."""
    image = sitk.ReadImage(path)
    return image[:, :, 0] if image.GetDimension() == 3 and image.GetSize()[2] == 1 else image


def _in_order(files: Sequence[str], folder: Path) -> list[str]:
    """Slices by their position. ITK reads what is missing or there twice as a volume with another spacing."""
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
        raise UserError(f"{folder}: slices are there twice, at {heights[ordered[gaps.argmin()]]:g} mm: remove copies")
    odd = np.abs(gaps - usual).argmax()
    if abs(gaps[odd] - usual) > max(0.1 * usual, 0.11):  # positions are often rounded to 0.1 mm
        raise UserError(
            f"{folder}: slices are {usual:g} mm apart, but {gaps[odd]:g} mm at {heights[ordered[odd]]:g} mm: some are"
            f" missing, or of another series"
        )
    if np.ptp(list(origins.values()), axis=0).max() > 1:
        raise UserError(f"{folder}: slices are shifted against each other (a tilted gantry): resample the volume first")
    return ordered


def read_gray(path: Path) -> sitk.Image:
    """A 2d image of which all colour channels are alike, as one channel."""
    return one_channel(sitk.ReadImage(path), str(path))


def one_channel(image: sitk.Image, name: str) -> sitk.Image:
    """The image itself, or the first of its colour channels, if all are alike. Raises UserError if they are not."""
    if image.GetNumberOfComponentsPerPixel() == 1:
        return image
    voxels = sitk.GetArrayViewFromImage(image)
    colours = 3 if image.GetNumberOfComponentsPerPixel() >= 3 else 1  # grey and alpha
    if not (voxels[..., :colours] == voxels[..., :1]).all():
        raise UserError(f"{name}: a colour image, where a grey one belongs: save it so, or name all --channels")
    return sitk.VectorIndexSelectionCast(image, 0)
