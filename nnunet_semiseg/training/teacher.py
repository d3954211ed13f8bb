"""The EMA teacher of mean-teacher methods (Tarvainen and Valpola, NeurIPS 2017)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """Make a frozen copy in eval mode.

    It has only the output at full resolution, because nothing is learnt from its coarser outputs.
    """
    teacher: Any = deepcopy(student).requires_grad_(False).eval()
    teacher.decoder.deep_supervision = False
    return teacher


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, decay: float) -> None:
    """Move the teacher: theta' = a theta' + (1 - a) theta with a = min(1 - 1 / (step + 1), decay), in one fused call.

    theta are the weights of the student, and theta' those of the teacher. At first theta' is the average over all steps
    so far (section 3 of the paper), so that the random initialisation is soon forgotten. Buffers are copied. It uses
    `parameters()`, because `state_dict()` lists nnU-Net's modules twice.

    Args:
        step: the number of steps that are done. With 0 the teacher becomes a copy of the student.
        decay: the largest a.
    """
    alpha = min(1 - 1 / (step + 1), decay)
    lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]: there is no public name
    lerp(list(teacher.parameters()), list(student.parameters()), 1 - alpha)
    for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
        old.copy_(new)
