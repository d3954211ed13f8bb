"""Checkpoints: read, collected from nnU-Net, written whole, and compared with the settings of now."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import written_whole
from nnunet_semiseg.settings.plans import ACCEPT_CHANGES

KEYS = ("network_weights", "logging")
"""that every checkpoint of nnU-Net has"""


def read(checkpoint: dict | str | os.PathLike, fix: str = "remove it, and train again", **options) -> dict:
    """A checkpoint, on the CPU, from its file or as it is.

    Args:
        fix: what to do with a damaged file.
        options: for `torch.load`.

    Raises:
        UserError: the file is damaged, or is no checkpoint.
    """
    if isinstance(checkpoint, dict):
        return checkpoint
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=False, **options)
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: no such file: {fix}") from None
    except Exception as e:  # a damaged file raises nearly anything
        raise UserError(f"{checkpoint}: cannot be read ({type(e).__name__}), it is not whole: {fix}") from None
    if not isinstance(content, dict) or any(key not in content for key in KEYS):
        raise UserError(f"{checkpoint}: is no checkpoint of nnU-Net's: {fix}")
    return content


def collect(save: Callable[[Any], None]) -> dict:
    """The dictionary that nnU-Net's `save_checkpoint` writes: it builds and writes it in one go.

    Args:
        save: that method; it asks for a file's name, and takes an open file as well, as `torch.save` does.
    """
    buffer = io.BytesIO()
    save(buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=False)


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


def explain_other_settings(changed: dict[str, tuple[Any, Any]], name: str) -> None:
    """Say why a checkpoint does not fit, where settings changed since; see `refuse_other_settings`.

    Raises:
        UserError: settings differ.
    """
    if changed:
        raise UserError(
            f"{name}: its training cannot go on, since {_sentence(changed)}: set it back with --set, or train again"
            " without --c"
        ) from None


def _sentence(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
