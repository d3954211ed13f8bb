"""Checkpoints of semi-supervised trainings: what nnU-Net's hold, and what a method needs to go on."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.settings.plans import PLANS_KEY


def read(checkpoint: dict | str | os.PathLike) -> dict:
    """A checkpoint, on the CPU, from its file or as it is."""
    if isinstance(checkpoint, dict):
        return checkpoint
    return torch.load(checkpoint, map_location="cpu", weights_only=False)


def collect(save: Callable[[Any], None]) -> dict:
    """The dictionary that nnU-Net's `save_checkpoint` writes: it builds and writes it in one go.

    Args:
        save: that method; it asks for a file's name, and takes an open file as well, as `torch.save` does.
    """
    buffer = io.BytesIO()
    save(buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=False)


def write(checkpoint: dict, filename: str) -> None:
    """Write a file that appears whole or not at all."""
    torch.save(checkpoint, filename + ".tmp")
    os.replace(filename + ".tmp", filename)


def explain_other_settings(settings_class: type, checkpoint: dict, plans: dict, name: str) -> None:
    """Say why a checkpoint does not fit, where settings changed since.

    Args:
        plans: of the training that is to go on.
        name: of the checkpoint's file, for the message.

    Raises:
        UserError: settings differ.
    """
    old, new = (p.get(PLANS_KEY, {}) for p in (checkpoint["init_args"]["plans"], plans))
    now = {f.name: (old.get(f.name, f.default), new.get(f.name, f.default)) for f in fields(settings_class)}
    changed = [f"{key} was {a} and is {b}" for key, (a, b) in now.items() if a != b]
    if changed:
        raise UserError(
            f"{name}: its training cannot go on, since {'; '.join(changed)}: set it back with --set, or train again"
            " without --c"
        ) from None
