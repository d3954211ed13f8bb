"""Change how a network runs: compiled, in bfloat16 on a CPU, or one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

PASSES = ("encode", "decode")
"""The methods of a network that runs in two halves. Its `forward` calls them. Other networks have only `forward`."""
PAIRED = ("paired",)
"""The method of a network in which the samples of a batch influence each other."""


def compile_each_size() -> None:
    """Let torch.compile make one static graph for each batch size, from now on."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.cache_size_limit = 64  # all parts that are compiled separately count together


def compile_parts(network: Any) -> None:
    """Compile, in place, the parts of a network that a method runs separately, if it has such parts."""
    for part in network.parts() if hasattr(network, "parts") else ():
        part.compile()


def run_in_bfloat16(network: nn.Module) -> None:
    """Make a network on a CPU run under autocast to bfloat16 from now on. Its logits are float32.

    Losses stay in float32, as under nnU-Net's mixed precision on a GPU. bfloat16 has the range of float32, so gradients
    need no scaling. A deep copy of the network (a teacher) runs in the same way with its own weights.
    """
    wrap_passes(network, in_bfloat16, PAIRED)


def run_sample_by_sample(network: nn.Module) -> None:
    """Make a network run on one sample after the other if gradients are needed. Its feature maps are not kept.

    The backward pass computes them again (`torch.utils.checkpoint`). Samples must not influence each other; with
    instance normalisation they do not.
    """
    wrap_passes(network, sample_by_sample)


def wrap_passes(network: nn.Module, wrap: Callable[[Callable], Callable], more: Sequence[str] = ()) -> None:
    """Replace the methods that run the network (`PASSES`). The network is changed in place.

    A compiled `forward` stays compiled inside.

    Args:
        wrap: makes the new method from the old one, both as functions whose first argument is the module.
        more: the names of further methods to replace, if the network has them.
    """
    inner = getattr(network, "_orig_mod", network)
    for name in (*(PASSES if hasattr(inner, PASSES[0]) else ("forward",)), *more):
        owner = network if name == "forward" else inner
        if hasattr(owner, name):
            setattr(owner, name, MethodType(wrap(as_method(getattr(owner, name))), owner))


def as_method(function: Callable) -> Callable:
    """Turn a method, or its replacement by torch.compile, into a function whose first argument is the module."""
    if hasattr(function, "__func__"):
        return function.__func__
    return lambda self, *args, **kwargs: function(*args, **kwargs)


def in_bfloat16(function: Callable) -> Callable:
    """Wrap a function so that it runs under autocast to bfloat16.

    Its result is float32, except features for a decoder.
    """

    @wraps(function)
    def run(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = function(self, *args, **kwargs)
        # a decoder reads features, and takes bfloat16
        return output if function.__name__ in ("encode", *PAIRED) else tree_map_only(Tensor, Tensor.float, output)

    return run


def sample_by_sample(function: Callable) -> Callable:
    """Wrap a function so that, if gradients are on, it gets one sample at a time.

    The backward pass computes it again.
    """

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
