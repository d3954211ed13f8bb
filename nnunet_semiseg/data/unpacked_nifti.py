"""Unpack a NIfTI file once for all functions that read it, because unpacking takes longer than reading."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import nibabel


def unpacked_nifti(image: str, folder: Path) -> str:
    """Unpack a `.nii.gz` into this folder, and return the path. For any other image, return its own path.

    For a damaged file, the result is its own path, too, because the reader will say what is wrong. Nothing after the
    last voxel is unpacked.

    Raises:
        OSError: the unpacked file cannot be written.
    """
    if not image.lower().endswith(".nii.gz"):
        return image
    try:
        voxels: Any = nibabel.load(image).dataobj  # pyright: ignore[reportAttributeAccessIssue]
        with gzip.open(image) as packed:
            content = packed.read(voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize)
    except Exception:  # the kind depends on the damage
        return image
    file = folder / Path(image).name[: -len(".gz")]
    file.write_bytes(content)
    return str(file)
