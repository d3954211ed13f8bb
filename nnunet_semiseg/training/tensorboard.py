"""Write nnU-Net's log for TensorBoard. `export nnUNet_semiseg_tensorboard=1` switches it on."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nnunet_semiseg.errors import UserError

VARIABLE = "nnUNet_semiseg_tensorboard"


def is_wanted() -> bool:
    """Whether the user wants a log for TensorBoard.

    Raises:
        UserError: the user wants it, but the package is not installed.
    """
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return False
    if find_spec("tensorboard") is None:
        raise UserError(f"{VARIABLE}=1: no package tensorboard: pip install tensorboard, or unset the variable")
    return True


class TensorBoardLogger:
    """A logger for nnU-Net's `MetaLogger`. It writes into the folder `tensorboard` of the training.

    The step of a value is its epoch. If a training continues (`--c`), its older values from there on are not shown.
    """

    def __init__(self, output_folder: str):
        self.folder = Path(output_folder, "tensorboard")
        self.writer: Any = None

    def update_config(self, config: dict) -> None:
        """Do nothing, because plans and settings are in files in the same folder."""

    def log(self, key: str, value: float, step: int) -> None:
        """Write one number of an epoch. Numbers that are times of day are not written."""
        if key.endswith("_timestamps"):
            return
        self._write(key, value, step, purge_step=step)

    def log_summary(self, key: str, value: float) -> None:
        """Write one number of the whole training, such as the last validation's Dice."""
        self._write(key, value, 0, purge_step=None)

    def _write(self, key: str, value: float, step: int, purge_step: int | None) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        self.writer.add_scalar(key, value, step)
        self.writer.flush()
