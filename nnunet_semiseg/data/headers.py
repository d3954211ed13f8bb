"""Check an image's header before its voxels are read. A bad header may claim too much memory or name other files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import SimpleITK as sitk

DATA_FILE = {
    ".mhd": rb"ElementDataFile\s*[=:]\s*(.*)",
    ".mha": rb"ElementDataFile\s*[=:]\s*(.*)",
    ".nhdr": rb"data ?file\s*:\s*(.*)",
    ".nrrd": rb"data ?file\s*:\s*(.*)",
}
"""For each kind of header, a pattern for the line that names another file with the voxels."""

SMALLEST, LARGEST = 1e-7, 1e5
"""The smallest and the largest length in mm that is believed: a tenth of a nanometre and a hundred metres."""
MOST = 100
"""A spacing may differ from the usual one of the data set by at most this factor."""


def header_problem(image: Path, root: Path) -> str | None:
    """What is wrong with the header of an image, or None. The voxels are not read.

    Args:
        root: the header must not name a file outside of this folder.
    """
    for name in data_files(image):
        file = os.path.normpath(os.path.join(image.parent.absolute(), name))
        if not Path(file).is_relative_to(os.path.normpath(root.absolute())):
            return (
                f"its voxels are in {file}, outside of {root}: do not use this image, or move that file into the folder"
                " and write its new place into the header"
            )
    header = read_header(image)
    if header is None:
        return None  # the reader will report the reason
    kind = header.GetPixelIDValue()
    if kind in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        return "has complex numbers, of which only the real part would be read: save their magnitude"
    claimed, memory = claimed_bytes(header), total_memory()
    if memory and claimed > memory:
        size = " x ".join(map(str, header.GetSize()))
        return (
            f"its header claims {size} voxels, {claimed / 2**30:.0f} GiB, but this machine has {memory / 2**30:.0f}: "
            "do not use it, or crop it on a larger machine"
        )
    return None


def data_files(image: Path) -> Iterator[str]:
    """The names of other files from which a MetaImage or NRRD header takes its voxels."""
    ending = image.suffix.lower()
    if ending not in DATA_FILE or not image.is_file():
        return
    with open(image, "rb") as file:
        lines = file.read(1 << 20).split(b"\n")
    in_list = False
    for line in map(bytes.strip, lines):
        if not line and ending in (".nhdr", ".nrrd"):  # here the voxels begin
            return
        if not in_list:
            found = re.fullmatch(DATA_FILE[ending], line, re.IGNORECASE)
            if found is None:
                continue
            line = found[1]
            if line.upper() == b"LOCAL":
                return
            in_list = line.upper().startswith(b"LIST")
            if in_list:
                continue
        if not line:
            continue
        name = line.decode("utf-8", "surrogateescape")
        yield name.split()[0] if "%" in name else name  # a pattern for numbered files, followed by the range of numbers


def read_header(image: Path) -> sitk.ImageFileReader | None:
    """The header of an image. None if SimpleITK cannot read it."""
    header = sitk.ImageFileReader()
    header.SetFileName(str(image))
    try:
        header.ReadImageInformation()
    except RuntimeError:
        return None
    return header


def claimed_bytes(header: sitk.ImageFileReader) -> int:
    """The memory that the voxels of an image need, in bytes."""
    kind = sitk.GetPixelIDValueAsString(header.GetPixelIDValue())
    bits = re.search(r"(\d+)-bit", kind)
    return math.prod(header.GetSize()) * header.GetNumberOfComponents() * (int(bits[1]) // 8 if bits else 1)


def total_memory() -> int | None:
    """The memory of this computer in bytes. None if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def count_channels(images: Sequence[str]) -> int | None:
    """The number of channels that nnU-Net reads from the files of a case. None if a header cannot be read."""
    channels = 0
    for image in images:
        header = read_header(Path(image))
        if header is None:
            return None
        channels += header.GetSize()[3] if header.GetDimension() == 4 else header.GetNumberOfComponents()
    return channels


def is_spacing(spacing: Iterable[float]) -> bool:
    """Whether these numbers can be a spacing in mm. A fourth axis is not checked, because it is time."""
    return all(SMALLEST <= s <= LARGEST for s in list(spacing)[:3])


def spacing_problem(spacing: Sequence[float], usual: Sequence[float]) -> str | None:
    """A sentence if a spacing is far from that of the data set, else None.

    Resampling such an image would leave no voxels, or far too many.

    Args:
        spacing, usual: two spacings along the same axes; `usual` is the median of the labelled images.
    """
    for value, expected in zip(spacing, usual, strict=False):
        if not expected / MOST <= value <= expected * MOST:
            return f"its spacing is {value:g} where other images have {expected:g}: correct its header (another unit?)"
    return None


def flat_problem(shape: Sequence[int], plans: dict) -> str | None:
    """A sentence if an image has only one slice although the plans are for volumes, else None.

    Args:
        shape: the shape of the image, as nnU-Net reads it: z, y, x.
    """
    usual = plans.get("original_median_shape_after_transp")
    if usual and 1 in shape and 1 not in usual:
        return f"has the shape {' x '.join(map(str, shape))}, a single slice, but the data set has volumes"
    return None
