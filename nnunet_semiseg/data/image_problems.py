"""What can be wrong with an unlabelled image: each problem in one line, with the file and the fix."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_semiseg.data.headers import header_problem

IMAGES_FOLDER = "imagesUn"
TAKE_OUT = f"replace the image or take its case out of {IMAGES_FOLDER}"


def header_problems(images: list[str], reader: type) -> list[str]:
    """Headers that cannot be read, and channels whose geometry differs from the first one's."""
    found = [(image, header_problem(Path(image), Path(image).parent)) for image in images]
    if wrong := [f"{image}: {problem}; {TAKE_OUT}" for image, problem in found if problem]:
        return wrong
    if not issubclass(reader, SimpleITKIO):
        return []  # the other readers compare channels themselves
    headers, problems = {}, []
    for image in images:
        header = sitk.ImageFileReader()
        header.SetFileName(image)
        try:
            header.ReadImageInformation()
        except RuntimeError as e:
            problems.append(f"{image}: cannot be read ({one_line_of(e)}): {TAKE_OUT}")
            continue
        headers[image] = header
    for image, header in headers.items():
        first, expected = next(iter(headers.items()))
        if difference := geometry_difference(header, expected):
            problems.append(
                f"{image}: {difference} in {Path(first).name}: "
                f"resample it to that grid or take its case out of {IMAGES_FOLDER}"
            )
    return problems


def geometry_difference(image, expected) -> str | None:
    """In which way the grids of two images (or headers) of SimpleITK's differ, or None.

    nnU-Net's reader is as strict with spacings; origins and directions are often rounded in files.
    """
    for kind, atol in {"Size": 0, "Spacing": 1e-8, "Origin": 1e-3, "Direction": 1e-3}.items():
        value, wanted = (getattr(i, f"Get{kind}")() for i in (image, expected))
        if len(value) != len(wanted) or not np.allclose(value, wanted, atol=atol):
            return f"{kind.lower()} {_numbers(value)} differs from {_numbers(wanted)}"
    return None


def nifti_damage(image: str | Path) -> str | None:
    """What ITK hides: it reads zeros where a NIfTI file ends early, and in place of NaN and infinity."""
    if not str(image).lower().endswith((".nii", ".nii.gz")):
        return None
    try:
        nifti: Any = nibabel.load(image, mmap=False)  # by its annotation, a file of any kind
        voxels = nifti.dataobj.get_unscaled()
    except Exception as e:  # of many kinds, by what is damaged
        return f"cannot be read ({one_line_of(e)})"
    return _not_finite(voxels) if np.issubdtype(voxels.dtype, np.floating) else None


def intensity_problems(data: np.ndarray, images: list[str], channels: list[str]) -> list[str]:
    """Channels (C, *S), as read, that are constant or not finite, or of a wrong number; see `missing_channels`."""
    if len(data) != len(channels):
        return [f"{images[0]}: {len(data)} channels, but dataset.json names {len(channels)}: {TAKE_OUT}"]
    problems, missing = [], missing_channels(data, channels)
    for i, (channel, name) in enumerate(zip(data, channels, strict=True)):
        file = images[i] if len(images) == len(channels) else f"{images[0]} (channel {name})"
        if damage := _not_finite(channel):
            problems.append(f"{file}: {damage}: {TAKE_OUT}")
        if name not in missing and channel.min() == channel.max():
            problems.append(f"{file}: constant, every voxel is {channel.flat[0]:g}: {TAKE_OUT}")
    return problems


def _not_finite(voxels: np.ndarray) -> str | None:
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    return f"{bad} voxels are NaN or infinite" if bad else None


def missing_channels(data: np.ndarray, channels: list[str]) -> list[str]:
    """The names of channels that are 0 everywhere, where others are not: modalities that this case lacks."""
    constant = [channel.min() == channel.max() for channel in data]
    if all(constant):
        return []
    return [name for name, channel, is_it in zip(channels, data, constant, strict=True) if is_it and not channel.any()]


def reading_problems(images: list[str], reader: type) -> list[str]:
    """Which of the images, or all of them together, the reader cannot read."""
    for files in [[image] for image in images] + [images]:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                reader().read_images(files)
        except Exception as e:
            detail = printed.getvalue().partition("\n")[0] or one_line_of(e)  # nnU-Net's readers print
            return [f"{', '.join(files)}: cannot be read ({detail}): {TAKE_OUT}"]
    return []


def one_line_of(error: Exception) -> str:
    """The last line of an error's text; the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{v:g}' for v in values)})"
