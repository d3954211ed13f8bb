"""The groups of loss terms of one step. Each has its own backward pass, so that only its graph is in memory.

With the setting `memory=fast` a step is joint: one backward pass for all groups, and, if the method uses `each`, one
pass of the network for all images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only


def backward(
    groups: Iterator[dict[str, Tensor]],
    autocast: Callable[[], AbstractContextManager],
    scaled: Callable[[Tensor], Tensor],
    joint: bool,
) -> dict[str, Tensor]:
    """Run a backward pass for each group of terms, or one pass for all.

    Args:
        groups: scalars by name. Terms with the same name are added.
        autocast: makes the context in which the groups are computed.
        scaled: scales a loss for its backward pass.
        joint: whether there is only one backward pass.

    Returns:
        The detached terms by name.
    """
    terms: dict[str, Tensor] = {}
    total: Any = None
    while True:
        # autocast ends before each backward pass, as in nnU-Net; this also deletes its 16-bit copies of weights
        with autocast():
            group = next(groups, None)
            loss: Any = None if group is None else sum(group.values())
        if group is None:
            break
        for name, term in group.items():
            terms[name] = term.detach() + terms[name] if name in terms else term.detach()
        if joint:
            total = loss if total is None else total + loss
        elif isinstance(loss, Tensor) and loss.requires_grad:
            scaled(loss).backward()
        del group, loss
    if total is not None:
        scaled(total).backward()
    return terms


@contextmanager
def shared(tensors: Any, backward_context: AbstractContextManager) -> Iterator[Any]:
    """Let several groups of terms use the same tensors, within a `with` block.

    The backward pass of the first group would free the graph that the next group needs. So the backward pass of each
    group ends at copies of the tensors, where gradients add up. At the end of the block one backward pass continues
    from there. The result is the same.

    Args:
        tensors: tensors in any nested lists, tuples and dictionaries. None stays None.
        backward_context: the context of the last backward pass.

    Yields:
        The copies, in the same lists, tuples and dictionaries.
    """
    unique = {id(x): x for x in tree_leaves(tensors) if x is not None}  # a tensor that appears twice is one leaf
    leaves = {key: x.detach().requires_grad_(x.requires_grad) for key, x in unique.items()}
    yield tree_map(lambda x: None if x is None else leaves[id(x)], tensors)
    pairs = [(x, leaves[key]) for key, x in unique.items()]
    ends = [(gradient_edge(x), leaf.grad) for x, leaf in pairs if leaf.grad is not None]
    for leaf in leaves.values():  # variables of the method still hold the leaves: free their memory
        leaf.grad, leaf.data = None, leaf.new_empty(0)
    del tensors, unique, pairs
    if ends:
        with backward_context:
            tensors_and_gradients: Any = zip(*ends, strict=True)
            torch.autograd.backward(*tensors_and_gradients)


def gradient_edge(x: Tensor):
    """The place in the graph where a backward pass into the tensor x begins. It does not keep x in memory.

    Before torch 2.6 a backward pass cannot begin at such a place. There it is x itself.
    """
    recent = torch.__version__ >= (2, 6)  # pyright: ignore[reportOperatorIssue]: a TorchVersion, not a str
    return get_gradient_edge(x) if recent else x


@contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.no_grad` for the network that is trained.

    autocast keeps 16-bit copies of the weights, which then have no gradient. Older versions of torch would use them in
    the next pass, too. So they are deleted at the end.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


def run_together(function: Callable[[Tensor], Any], batches: tuple[Tensor, ...]) -> Iterator[Any]:
    """Run the function once, on all samples of several batches (B, C, *S). Yields the result of each batch.

    Args:
        function: returns tensors with the same B, or None, in any nested lists, tuples and dictionaries. Samples must
            not influence each other.
    """
    start, joint = 0, function(torch.cat(batches))
    for x in batches:
        part = slice(start, start + len(x))
        yield tree_map_only(Tensor, lambda t, part=part: t[part], joint)
        start += len(x)


def in_turn(
    passes: Sequence[Callable[[], Any]], keep: Callable[[Any], Any], joint: bool
) -> Iterator[tuple[int, Any, list[Any]]]:
    """Run decoders or networks that teach each other, one after the other, so that only one graph is in memory.

    At the beginning all but the first run once more, without gradients, because each needs the outputs of the others.
    In a joint step each runs only once.

    Args:
        passes: functions without arguments. Each returns an output, and the same one every time.
        keep: a function that takes from an output what the others need. It runs without gradients.
        joint: whether the step is joint.

    Yields:
        The number of the pass, its output, and the list of what was kept of all passes.
    """
    keep = torch.no_grad()(keep)
    if joint:
        outputs = [function() for function in passes]
        kept = [keep(output) for output in outputs]
        for i, output in enumerate(outputs):
            yield i, output, kept
        return
    with without_gradients():
        kept = [keep(function()) for function in passes[1:]]
    for i, function in enumerate(passes):
        output = function()
        if i == 0:
            kept.insert(0, keep(output))
        yield i, output, kept
        del output
