"""Check images after writing them, because SimpleITK does not report a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import SimpleITK as sitk

from nnunet_semiseg.data.image_problems import nifti_damage
from nnunet_semiseg.files import disk_error, disk_errors

LITTLE = 2**20
"""A disk with fewer free bytes than this counts as full."""


def refuse_half_written(images: Iterable[Path]) -> None:
    """Remove the first incomplete image, and raise DiskError for it. Only NIfTI files are checked."""
    for image in images:
        if damage := nifti_damage(image):
            full = shutil.disk_usage(image.parent).free < LITTLE
            image.unlink()
            raise disk_error(image, os.strerror(errno.ENOSPC) if full else f"what was written {damage}")


def write_image(image: sitk.Image, file: Path) -> None:
    """Write an image in compressed form.

    Raises:
        DiskError: the disk is full or read-only, or a NIfTI file is incomplete. The file is removed.
        RuntimeError: SimpleITK cannot write the file for another reason. The file is removed.
    """
    try:
        sitk.WriteImage(image, file, useCompression=True)
    except RuntimeError as error:
        with disk_errors(file):  # SimpleITK does not say what the system refused, so ask the system
            full = shutil.disk_usage(file.parent).free < LITTLE
            file.unlink(missing_ok=True)
            file.touch()
            file.unlink()
        if not full:
            raise
        raise disk_error(file, os.strerror(errno.ENOSPC)) from error
    refuse_half_written([file])


@contextmanager
def check_written(folder: Path) -> Iterator[None]:
    """Check all images in a folder at the end of this `with` block; see `refuse_half_written`.

    They are checked even if the block raises an error, because an incomplete image may be its cause. If there is one,
    DiskError replaces that error.
    """

    def images() -> Iterator[Path]:
        return (file for file in sorted(folder.glob("*")) if file.is_file())

    try:
        yield
    except Exception:
        refuse_half_written(images())
        raise
    refuse_half_written(images())
