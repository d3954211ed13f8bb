"""A NIfTI file, unpacked once for all who read it: that takes longer than to read it."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import nibabel


def unpacked(image: str, folder: Path) -> str:
    """The path of a file in this folder with the content of a `.nii.gz`; the image itself where it is none.

    Where it is damaged it is given back, too: who reads it says why. Nothing behind the last voxel is unpacked.
    """
    if not image.lower().endswith(".nii.gz"):
        return image
    try:
        voxels: Any = nibabel.load(image).dataobj  # pyright: ignore[reportAttributeAccessIssue]
        with gzip.open(image) as packed:
            content = packed.read(voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize)
    except Exception:  # of many kinds, by what is damaged
        return image
    file = folder / Path(image).name[: -len(".gz")]
    file.write_bytes(content)
    return str(file)
