"""What can be wrong with an image or a label. Each problem is one line with the file and the fix."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_semiseg.data.headers import header_problem, is_spacing
from nnunet_semiseg.errors import UserError

IMAGES_FOLDER = "imagesUn"
TOLERANCE = 0.01
"""Two intensities that differ by less than this, in units of the normalised intensity, count as equal; bfloat16 has
about three digits."""
ROUNDING = 1e-5
"""Resampling changes the intensities of a constant image by up to this."""
LARGEST_RATIO = 20
"""The largest ratio between the spread of an image and that of labelled images, both after preprocessing. If one voxel
is much larger than all others, nearly all values become equal, and the ratio is in the hundreds."""


def take_out(file: str, is_label: bool = False) -> str:
    """How to fix a bad case if nothing better is known: take it out of the data set."""
    folder = Path(file).parent.name
    what = "label" if is_label or folder.startswith("labels") else "image"
    return f"replace the {what} or take its case out of {folder}"


def header_problems(images: list[str], reader: type) -> list[str]:
    """Find headers that cannot be read or trusted, and files whose geometry differs from that of the first file."""
    found = [(image, header_problem(Path(image), Path(image).parent)) for image in images]
    if wrong := [f"{image}: {problem}; {take_out(image)}" for image, problem in found if problem]:
        return wrong
    if not issubclass(reader, SimpleITKIO):
        return []  # the other readers compare the channels themselves
    headers, problems = {}, []
    for image in images:
        header = sitk.ImageFileReader()
        header.SetFileName(image)
        try:
            header.ReadImageInformation()
        except RuntimeError as e:
            problems.append(f"{image}: cannot be read ({one_line_of(e)}): {take_out(image)}")
            continue
        headers[image] = header
    if odd := {image: h.GetSpacing() for image, h in headers.items() if not is_spacing(h.GetSpacing())}:
        return [f"{image}: its spacing is {_numbers(spacing)} mm: {take_out(image)}" for image, spacing in odd.items()]
    for image, header in headers.items():
        first, expected = next(iter(headers.items()))
        if difference := geometry_difference(header, expected):
            problems.append(
                f"{image}: {difference} in {Path(first).name}: "
                f"resample it to that grid or take its case out of {Path(image).parent.name}"
            )
    return problems


def geometry_difference(image, expected, origin: float = 0.01) -> str | None:
    """How the grids of two SimpleITK images (or headers) differ, or None.

    Spacings are compared as strictly as by nnU-Net's reader. Origins and directions are often rounded in files.

    Args:
        origin: the origin may differ by this share of the smallest spacing.
    """
    origin *= min(expected.GetSpacing())
    for kind, atol in {"Size": 0, "Spacing": 1e-8, "Origin": origin, "Direction": 1e-3}.items():
        value, wanted = (getattr(i, f"Get{kind}")() for i in (image, expected))
        if len(value) != len(wanted) or not np.allclose(value, wanted, atol=atol):
            return f"{kind.lower()} {_numbers(value)} differs from {_numbers(wanted)}"
    return None


def nifti_damage(image: str | Path) -> str | None:
    """Find what ITK does not report in a NIfTI file, such as an early end (ITK reads zeros there), NaN or infinity.

    None if there is no damage, and for other formats.
    """
    if not str(image).lower().endswith((".nii", ".nii.gz")):
        return None
    try:
        nifti: Any = nibabel.load(image, mmap=False)  # nibabel's annotation allows files without voxels
        first, end = nifti.dataobj.offset, nifti.header.single_vox_offset
        if first < end:  # ITK would read the header as voxels; nibabel takes 0 as a sign of a separate header file
            return f"its voxels begin at byte {first}, inside the header of {end} bytes"
        voxels = nifti.dataobj.get_unscaled()
    except Exception as e:  # the kind depends on the damage
        return f"cannot be read ({one_line_of(e)})"
    if np.iscomplexobj(voxels):
        return "its voxels are complex numbers"
    return _not_finite(voxels) if np.issubdtype(voxels.dtype, np.floating) else None


def intensity_problems(data: np.ndarray, images: list[str], channels: list[str]) -> list[str]:
    """Find channels of a raw image (C, *S) that are constant, not finite or too large, or a wrong number of channels.

    A channel that the case lacks may be constant; see `missing_channels`.
    """
    if len(data) != len(channels):
        return [f"{images[0]}: {len(data)} channels, but dataset.json names {len(channels)}: {take_out(images[0])}"]
    problems, missing = [], missing_channels(data, channels)
    for i, (channel, name) in enumerate(zip(data, channels, strict=True)):
        file, fix = _file_of(i, name, images, channels), take_out(images[0])
        with np.errstate(all="ignore"):
            channel = np.asarray(channel, np.float32)  # as nnU-Net does
            deviation = channel.std()
        if damage := _not_finite(channel):
            problems.append(f"{file}: {damage}, as 32-bit numbers: {fix}")
        elif name not in missing and channel.min() == channel.max():
            problems.append(f"{file}: constant, every voxel is {channel.flat[0]:g}: {fix}")
        elif not np.isfinite(deviation):
            extremes = f"values from {channel.min():g} to {channel.max():g}"
            problems.append(f"{file}: {extremes}, too large for the variance to be a 32-bit number: {fix}")
    return problems


def preprocessed_problems(
    data: np.ndarray, images: list[str], channels: list[str], nothing: Sequence[float]
) -> list[str]:
    """Find channels that are constant or not finite in a preprocessed image (C, *S).

    Args:
        images: the raw files of the channels.
        nothing: for each channel the value if the case lacks it; see `values_of_nothing`.
    """
    problems, spreads = [], spread(data)
    for i, (channel, name) in enumerate(zip(data, channels, strict=True)):
        file, fix = _file_of(i, name, images, channels), take_out(images[0])
        if damage := _not_finite(channel):
            problems.append(f"{file}: {damage} after preprocessing: {fix}")
        elif np.ptp(channel) < ROUNDING:
            is_missing = np.isclose(channel.flat[0], nothing[i], atol=TOLERANCE) and any(spreads)
            if not is_missing:
                problems.append(f"{file}: constant after preprocessing, every voxel is {channel.flat[0]:g}: {fix}")
    return problems


def spread(data: np.ndarray) -> list[float]:
    """For each channel of (C, *S), the mean distance of the voxels from their mean. 0 if it is only a rounding error.

    The standard deviation cannot be used: z-scores make it 1, even if all voxels but one are equal.
    """
    with np.errstate(all="ignore"):
        distances = (float(np.abs(channel - channel.mean()).mean()) for channel in data)
        return [0.0 if distance < ROUNDING else distance for distance in distances]


def spread_problems(
    spreads: Sequence[float], images: list[str], channels: list[str], usual: Sequence[float] | None
) -> list[str]:
    """Find channels whose values, after preprocessing, spread far more or far less than those of labelled images.

    Args:
        spreads: see `spread`; it is 0 for a channel that the case lacks.
        usual: the usual spread in labelled images. None if it is not known.
    """
    problems = []
    for i, (name, expected) in enumerate(zip(channels, usual or (), strict=False)):
        ratio = spreads[i] / expected if expected else 0
        if ratio and not 1 / LARGEST_RATIO < ratio < LARGEST_RATIO:
            problems.append(
                f"{_file_of(i, name, images, channels)}: after preprocessing, its values spread {ratio:.2g} times as"
                " much as those of labelled images (another unit, or single voxels of another magnitude?):"
                f" {take_out(images[0])}"
            )
    return problems


def label_problems(seg: np.ndarray, label: str, shape: Sequence[int], values: Iterable[int]) -> list[str]:
    """Find what is wrong with a label (1, *S), as the reader returns it.

    Args:
        shape: the shape of the image.
        values: the label values that dataset.json names.
    """
    if seg.shape != (1, *shape):
        what = f"size {_numbers(seg.shape)} differs from {_numbers((1, *shape))}, that of the image"
        return [f"{label}: {what}: {take_out(label, is_label=True)}"]
    if damage := _not_finite(seg):
        return [f"{label}: {damage}: {take_out(label, is_label=True)}"]
    found = np.unique(seg)
    unknown = found[~np.isin(found, list(values))]
    if broken := [v for v in unknown if v != np.round(v)]:
        return [f"{label}: {broken[0]:g} is not a whole number: round the label's values"]
    if len(unknown):
        named = ", ".join(map(str, sorted(values)))
        return [f"{label}: has the value {unknown[0]:g}, but dataset.json names {named}: correct one of them"]
    return []


def _file_of(i: int, name: str, images: list[str], channels: list[str]) -> str:
    return images[i] if len(images) == len(channels) else f"{images[0]} (channel {name})"


def _not_finite(voxels: np.ndarray) -> str | None:
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    return f"{bad} voxels are NaN or infinite" if bad else None


def missing_channels(data: np.ndarray, channels: list[str]) -> list[str]:
    """The names of the modalities that this case lacks: their channels are 0 everywhere, while others are not."""
    constant = [channel.min() == channel.max() for channel in data]
    if all(constant):
        return []
    return [name for name, channel, is_it in zip(channels, data, constant, strict=True) if is_it and not channel.any()]


def reading_problems(images: list[str], reader: type) -> list[str]:
    """Find an image that the reader cannot read.

    Sometimes the reader can read each image of a case, but not all of them together. This is found, too.
    """
    for files in [[image] for image in images] + [images]:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                reader().read_images(files)
        except Exception as e:
            detail = printed.getvalue().partition("\n")[0] or one_line_of(e)  # nnU-Net's readers print the reason
            return [f"{', '.join(files)}: cannot be read ({detail}): {take_out(files[0])}"]
    return []


def read_images(images: list[str], reader: type) -> tuple[np.ndarray, dict]:
    """Read the image (C, *S) of a case and its properties, as nnU-Net's reader returns them.

    Raises:
        UserError: a file is damaged or cannot be read. There is one line for each problem.
    """
    problems = [f"{image}: {damage}: {take_out(image)}" for image in images if (damage := nifti_damage(image))]
    if not problems:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return reader().read_images(images)
        except Exception:  # the kind depends on the damage
            if not (problems := reading_problems(images, reader)):
                raise
    raise UserError("\n".join(problems))


def one_line_of(error: Exception) -> str:
    """The last line of an error's text, or the name of its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{v:g}' for v in values)})"
