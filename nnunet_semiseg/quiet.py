"""Warnings of other packages that a user can do nothing about."""

from __future__ import annotations

import warnings


def hide_foreign_warnings() -> None:
    """Hide FutureWarning and DeprecationWarning of code that is not this package's.

    They tell the authors of torch, timm, MONAI and others what they are to change. Processes that are started later
    have filters of their own: `run_jobs` calls this for its own.
    """
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(?!nnunet_semiseg)")


def hide_reader_warnings() -> None:
    """Hide what ITK prints of headers, such as an orthonormal matrix that is not quite one.

    What is wrong with an image is checked when it is converted and preprocessed, and named with its file.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
