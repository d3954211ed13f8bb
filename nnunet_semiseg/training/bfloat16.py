"""Mixed precision where nnU-Net has none: on a CPU."""

from __future__ import annotations

from functools import wraps
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def run_in_bfloat16(network: nn.Module) -> None:
    """From now on this network's forward on a CPU runs under autocast to bfloat16, and returns float32.

    Losses stay in float32, as under nnU-Net's mixed precision on a GPU; bfloat16 has float32's range, so no
    gradient needs scaling. A deep copy of the network (a teacher) does the same with its own weights.
    """

    @wraps(type(network).forward)
    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = type(self).forward(self, *args, **kwargs)
        return tree_map_only(Tensor, Tensor.float, output)

    network.forward = MethodType(forward, network)
