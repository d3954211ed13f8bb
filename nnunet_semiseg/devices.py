"""The option `-device`: check it, and write it into the commands that we propose."""

from __future__ import annotations

import sys
from pathlib import Path

from nnunet_semiseg.errors import UserError

DEVICES = ("cuda", "cpu", "mps")
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""On Linux, one of these files exists if there is a GPU of NVIDIA, a GPU of AMD, or Linux runs within Windows."""


def check_device(device: str) -> None:
    """Raises UserError unless this computer has a device of this kind: cuda, cpu or mps."""
    import torch

    if device not in DEVICES:
        raise UserError(f"-device {device}: no such device: use {' or '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.device_count():
        raise UserError("-device cuda: PyTorch finds no GPU: use -device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps: this exists only on a Mac with Apple silicon: use -device cpu")


def may_have_gpu() -> bool:
    """False if this computer certainly has no GPU for `-device cuda`.

    It does not import torch, which would take seconds.
    """
    if torch := sys.modules.get("torch"):
        return torch.cuda.device_count() > 0
    return sys.platform == "win32" or any(Path(file).exists() for file in GPU_FILES)


def device_option(given: str | None = None) -> str:
    """The end of a command that we propose: ` -device cpu`, or nothing if the default, cuda, is right.

    Args:
        given: the device that the user named for the present command, if any.
    """
    device = given or ("cuda" if may_have_gpu() else "cpu")
    return "" if device == "cuda" else f" -device {device}"
