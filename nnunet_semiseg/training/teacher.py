"""The EMA teacher of mean-teacher methods (Tarvainen and Valpola, NeurIPS 2017)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy in eval mode that outputs the full resolution only: nothing is learnt from its others."""
    teacher: Any = deepcopy(student).requires_grad_(False).eval()
    teacher.decoder.deep_supervision = False
    return teacher


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, decay: float) -> None:
    """theta' = a theta' + (1 - a) theta with a = min(1 - 1 / (step + 1), decay), in one fused call.

    The early average over all steps so far (their section 3) keeps the random initialisation from lingering.
    Buffers are copied. `parameters()`, not `state_dict()`: nnU-Net's modules appear twice in the latter.
    """
    alpha = min(1 - 1 / (step + 1), decay)
    lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]: there is no public name
    lerp(list(teacher.parameters()), list(student.parameters()), 1 - alpha)
    for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
        old.copy_(new)
