"""How a network's passes run: in bfloat16 on a CPU, or one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

PASSES = ("encode", "decode")
"""the methods that run the layers of a network that is run in halves; `forward` calls them. Others have `forward`."""
PAIRED = ("paired",)
"""what runs a network in which samples touch each other"""


def run_in_bfloat16(network: nn.Module) -> None:
    """From now on this network's passes on a CPU run under autocast to bfloat16; logits are float32.

    Losses stay in float32, as under nnU-Net's mixed precision on a GPU. bfloat16 has float32's range, so that no
    gradient needs scaling. A deep copy of the network (a teacher) does the same with its own weights.
    """
    wrap_passes(network, in_bfloat16, PAIRED)


def run_sample_by_sample(network: nn.Module) -> None:
    """From now on a pass with gradients runs on one sample after the other, and keeps the feature maps of none.

    Backward computes them again (`torch.utils.checkpoint`). No sample may touch another, as with instance norm.
    """
    wrap_passes(network, sample_by_sample)


def wrap_passes(network: nn.Module, wrap: Callable[[Callable], Callable], more: Sequence[str] = ()) -> None:
    """Replace the network's passes, in place. What torch.compile made of `forward` is wrapped from outside."""
    inner = getattr(network, "_orig_mod", network)
    for name in (*(PASSES if hasattr(inner, PASSES[0]) else ("forward",)), *more):
        owner = network if name == "forward" else inner
        if hasattr(owner, name):
            setattr(owner, name, MethodType(wrap(as_method(getattr(owner, name))), owner))


def as_method(function: Callable) -> Callable:
    """A function that takes the module first, of a bound method or of what torch.compile left in its place."""
    if hasattr(function, "__func__"):
        return function.__func__
    return lambda self, *args, **kwargs: function(*args, **kwargs)


def in_bfloat16(function: Callable) -> Callable:
    """A pass under autocast to bfloat16 on the CPU; it returns float32, but for features that a decoder reads."""

    @wraps(function)
    def run(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = function(self, *args, **kwargs)
        # decoders read features, and take bfloat16
        return output if function.__name__ in ("encode", *PAIRED) else tree_map_only(Tensor, Tensor.float, output)

    return run


def sample_by_sample(function: Callable) -> Callable:
    """A pass that, where gradients are on, takes (1, C, *S) at a time and is computed again by backward."""

    @wraps(function)
    def run(self, x, *args, **kwargs):
        if not torch.is_grad_enabled():
            return function(self, x, *args, **kwargs)
        outputs = []
        for i in range(len(tree_leaves(x)[0])):
            sample = tree_map(lambda t, i=i: t[i : i + 1], x)
            outputs.append(checkpoint(function, self, sample, *args, use_reentrant=False, **kwargs))
        return tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *outputs)

    return run
