"""Read and write checkpoints, and refuse those that do not fit the present training."""

from __future__ import annotations

import io
import json
import os
import shlex
import tempfile
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
"""An environment variable. It names the checkpoint with whose weights a new training begins."""

_NUMPY: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
"""The functions with which NumPy unpickles numbers and arrays. Their module has different names in NumPy 1 and 2."""

HARMLESS = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "uint32", "uint8", "bool")),
    *((function, f"numpy.{core}.multiarray.{function.__name__}") for core in ("core", "_core") for function in _NUMPY),
]
"""Further classes, in addition to those that torch allows, that a checkpoint may hold. nnU-Net's log and the states of
random generators consist of them."""


KEYS = ("network_weights", "init_args", "logging")


def read(checkpoint: dict | str | os.PathLike, fix: str, mmap: bool = False, keys: Sequence[str] = KEYS) -> dict:
    """Read a checkpoint from a file onto the CPU. Code in the file is run only if the user trusts it (`TRUST`).

    Args:
        checkpoint: a file. A dictionary is returned as it is.
        fix: how to fix a missing or damaged file, for the message.
        mmap: whether the tensors stay on the disk until they are used.
        keys: the checkpoint must have these keys, and the value of each must be a dictionary.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint of nnU-Net; or loading it could run code, and the
            user does not trust it.
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
        raise UserError(f"{checkpoint}: is not an nnU-Net checkpoint (it has no {missing[0]}): {fix}")
    return content


@contextmanager
def as_file(checkpoint: dict | str | os.PathLike) -> Iterator[str]:
    """The path of a checkpoint. A dictionary is written to a file that exists within the `with` block only."""
    if not isinstance(checkpoint, dict):
        yield os.fspath(checkpoint)
        return
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(checkpoint, file.name)
        yield file.name


def _check_sums(file: str | os.PathLike) -> None:
    """Raise BadZipFile if a part of the file has a wrong checksum. torch itself does not check this."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(damaged)


def _read_trusted(file: str | os.PathLike, fix: str, error: Exception) -> Any:
    """Read a checkpoint that holds objects of other classes, if the user allows it to run code.

    Raises:
        UserError: the user does not allow it, or the file is damaged. Then `error` says how it failed.
    """
    try:
        with safe_globals(HARMLESS):
            unknown = get_unsafe_globals_in_checkpoint(file)
    except Exception:  # it cannot be read at all
        unknown = []
    if not unknown:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}): {fix}") from None
    warning = f"{file}: holds {', '.join(unknown[:3])}; loading this file can run code that is in it"
    if not is_trusted():
        raise UserError(f"{warning}: if you trust where it comes from, export {TRUST}=1") from None
    print(f"WARNING: {warning}")
    return torch.load(file, map_location="cpu", weights_only=False)


def collect(save: Callable[[Any], None]) -> dict:
    """The dictionary that nnU-Net's `save_checkpoint` writes. That method cannot make it without writing it.

    Args:
        save: the method of nnU-Net. It takes a file name, but also an open file, as `torch.save` does.
    """
    buffer = io.BytesIO()
    save(buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=False)  # this process wrote it: it is safe


def write(checkpoint: dict, filename: str | os.PathLike) -> None:
    """Write a checkpoint completely or not at all.

    Raises:
        DiskError: the disk is full or read-only. An older file with this name is unchanged.
    """
    buffer = io.BytesIO()  # torch.save does not report a full disk well
    torch.save(checkpoint, buffer)
    with written_whole(Path(filename)) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # some network disks report only now that they are full


def refuse_other_settings(changed: dict[str, tuple[Any, Any]], name: str) -> None:
    """Refuse to continue a training with settings that differ from those it was started with.

    Args:
        changed: the result of `changed_settings`.
        name: the checkpoint's file, for the message.

    Raises:
        UserError: settings differ. The message says which, how to set them back, and how to accept the new ones.
    """
    if changed:
        raise UserError(
            f"{name}: was trained with other settings: {_sentence(changed)}: set them back with --set {_back(changed)},"
            f" or continue with the new ones: nnunet_semiseg train ... --c --accept-changes, or {ACCEPT_CHANGES}=1"
            " nnUNetv2_train ... --c"
        )


@contextmanager
def fitting(changed: dict[str, tuple[Any, Any]], name: str, fix: str) -> Iterator[None]:
    """If the checkpoint that this `with` block loads does not fit, raise an error of one line that says why.

    Args:
        changed: the result of `changed_settings`.
        name: the checkpoint's file, for the message.
        fix: what to do if no setting changed.

    Raises:
        UserError: the checkpoint does not fit.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as e:
        if changed:
            raise UserError(
                f"{name}: does not fit, because {_sentence(changed)}: set this back with --set {_back(changed)}, or"
                " train again from the beginning, which replaces this model"
            ) from None
        what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"{name}: does not fit this training ({what}): {fix}") from None


def _back(changed: dict[str, tuple[Any, Any]]) -> str:
    """The values of `--set` that set all changed settings back, in quotes where the shell would change them."""
    return " ".join(shlex.quote(f"{key}={json.dumps(old)}") for key, (old, _) in changed.items())


def _sentence(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
