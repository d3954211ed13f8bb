"""Unpack a NIfTI file once for all who read it, because unpacking takes longer than reading."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import nibabel


def unpacked_nifti(image: str, folder: Path) -> str:
    """The path of a file in this folder with the content of a `.nii.gz`. For any other image, its own path.

    A damaged file's own path is returned, too, because the reader will say what is wrong. Nothing after the last voxel
    is unpacked.
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
