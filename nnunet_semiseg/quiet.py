"""Hide warnings of other packages, because a user can do nothing about them."""

from __future__ import annotations

import warnings


def hide_foreign_warnings() -> None:
    """Hide FutureWarning and DeprecationWarning of code that is not this package's.

    These warnings are for the authors of torch, timm, MONAI and others. A process that is started later has its own
    filters, so `run_jobs` calls this in its processes.
    """
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(?!nnunet_semiseg)")


def hide_reader_warnings() -> None:
    """Hide what ITK prints about headers, for example about a matrix that is not exactly orthonormal.

    The checks of conversion and preprocessing report wrong images, with their files.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
