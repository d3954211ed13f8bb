"""Readers of images that nnU-Net does not read as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.conversion.sources import find_files
from nnunet_semiseg.errors import UserError


def read_dicom_series(folder: Path) -> sitk.Image:
    """The one DICOM series below a folder, be its files in one folder or in several.

    Raises:
        UserError: no series, or several; slices that are missing, or there twice.
    """
    series: dict[str, list[str]] = {}
    for directory in sorted({file.parent for file in find_files(folder, "*") if file.is_file()}):
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(directory)):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(directory), uid)
            series.setdefault(uid, []).extend(files)
    if len(series) != 1:
        raise UserError(f"{folder}: {len(series) or 'no'} DICOM series: leave exactly one there")
    (files,) = series.values()
    return sitk.ReadImage(_in_order(files, folder))


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
