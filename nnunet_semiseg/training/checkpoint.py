"""Checkpoints: read, collected from nnU-Net, written whole, and compared with the settings of now."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import written_whole
from nnunet_semiseg.schema import TRUST, is_trusted
from nnunet_semiseg.settings.plans import ACCEPT_CHANGES

CONTINUE_FROM = "nnUNet_semiseg_continue_from"
"""a variable: the checkpoint whose weights a new training begins with"""

_NUMPY: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
"""what NumPy pickles its numbers and arrays with; NumPy 1 and NumPy 2 call their module differently"""

HARMLESS = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "uint32", "uint8", "bool")),
    *((function, f"numpy.{core}.multiarray.{function.__name__}") for core in ("core", "_core") for function in _NUMPY),
]
"""what else may be in a checkpoint: nnU-Net's log and the states of random generators are made of these"""


KEYS = ("network_weights", "init_args", "logging")


def read(checkpoint: dict | str | os.PathLike, fix: str, mmap: bool = False, keys: Sequence[str] = KEYS) -> dict:
    """A checkpoint, on the CPU, from its file or as it is; no code that a file may hold is run.

    Args:
        fix: what to do where the file is missing or damaged.
        mmap: its tensors stay on the disk until they are used.
        keys: of what it must hold, each a dictionary.

    Raises:
        UserError: no such file, damaged, not one of nnU-Net's, or it holds more than numbers and can run code.
    """
    if isinstance(checkpoint, dict):
        return checkpoint
    try:
        _check_sums(checkpoint)
        with safe_globals(HARMLESS):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: no such file: {fix}") from None
    except Exception as e:  # a damaged checkpoint raises nearly anything
        content = _read_trusted(checkpoint, fix, e)
    if missing := [k for k in keys if not (isinstance(content, dict) and isinstance(content.get(k), dict))]:
        raise UserError(f"{checkpoint}: is no checkpoint of nnU-Net's (it has no {missing[0]}): {fix}")
    return content


def _check_sums(file: str | os.PathLike) -> None:
    """Raises BadZipFile where a part of a file is not what was written: torch does not look at the checksums."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(damaged)


def _read_trusted(file: str | os.PathLike, fix: str, error: Exception) -> Any:
    """A checkpoint that holds objects of other classes, if the user says that it may run code."""
    try:
        with safe_globals(HARMLESS):
            unknown = get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not to be read at all
        unknown = []
    if not unknown:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}): {fix}") from None
    warning = f"{file}: holds {', '.join(unknown[:3])}, so that loading it can run code that is in it"
    if not is_trusted():
        raise UserError(f"{warning}: if you trust where it comes from, export {TRUST}=1") from None
    print(f"WARNING: {warning}")
    return torch.load(file, map_location="cpu", weights_only=False)


def collect(save: Callable[[Any], None]) -> dict:
    """The dictionary that nnU-Net's `save_checkpoint` writes: it builds and writes it in one go.

    Args:
        save: that method; it asks for a file's name, and takes an open file as well, as `torch.save` does.
    """
    buffer = io.BytesIO()
    save(buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=False)  # written by this process: nothing foreign


def write(checkpoint: dict, filename: str | os.PathLike) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        DiskError: the disk is full or read-only; the file is as it was.
    """
    buffer = io.BytesIO()  # torch.save hides what a full disk says
    torch.save(checkpoint, buffer)
    with written_whole(Path(filename)) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # some shared disks say only now that they are full


def refuse_other_settings(changed: dict[str, tuple[Any, Any]], name: str) -> None:
    """Refuse to go on with other settings than those that a training was started with.

    Args:
        changed: of `changed_settings`.
        name: of the checkpoint's file, for the message.

    Raises:
        UserError: settings differ; it says which, how to set them back, and how to go on with the new ones.
    """
    if changed:
        back = " ".join(f"{key}={json.dumps(old)}" for key, (old, _) in changed.items())
        raise UserError(
            f"{name}: was trained with other settings: {_sentence(changed)}: set them back with --set {back}, or go on"
            f" with the new ones: nnunet_semiseg train ... --c --accept-changes, or {ACCEPT_CHANGES}=1 nnUNetv2_train"
            " ... --c"
        )


@contextmanager
def fitting(changed: dict[str, tuple[Any, Any]], name: str, fix: str) -> Iterator[None]:
    """Say why a checkpoint that is loaded here does not fit: settings changed since, or it is another model's.

    Args:
        changed: of `changed_settings`.
        name: of the checkpoint's file, for the message.
        fix: what to do where no setting changed.

    Raises:
        UserError: it does not fit.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as e:
        if changed:
            raise UserError(
                f"{name}: its training cannot go on, since {_sentence(changed)}: set it back with --set, or train again"
                " without --c"
            ) from None
        what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"{name}: does not fit this training ({what}): {fix}") from None


def _sentence(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
