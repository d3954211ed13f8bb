"""Check the option `-device`."""

import torch

from nnunet_semiseg.errors import UserError

DEVICES = ("cuda", "cpu", "mps")


def check_device(device: str) -> None:
    """Raises UserError unless this computer has a device of this kind: cuda, cpu or mps."""
    if device not in DEVICES:
        raise UserError(f"-device {device}: no such device: use {' or '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.device_count():
        raise UserError("-device cuda: there is no GPU: use -device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps: only on a Mac with Apple silicon: use -device cpu")
