"""How similar the areas of predictions are: losses between the two modalities of Semi-CML."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_semiseg.losses.segmentation import hard_pseudo_label

recomputed: Any = partial(checkpoint, use_reentrant=False)
"""Call a function whose intermediate tensors are not kept. The backward pass computes them again."""


def dissimilarity(branches: Sequence[Tensor], label_manager) -> Tensor:
    """1 minus the soft Dice between the predictions of the two decoders: a mean over classes, then over samples.

    `similarities` says which classes and samples count. If none does, the result is 0.

    Args:
        branches: the logits of both decoders, (B, heads, *S).
    """
    similarity, counts = (x.diagonal(len(branches[0])) for x in similarities(branches, label_manager))
    return ((1 - similarity) * counts).sum() / counts.sum().clamp_min(1)


def area_similarity_contrast(similarity: Tensor, counts: Tensor, anchors: int, temperature: float) -> Tensor:
    """A contrastive loss: a prediction must find the other modality of its sample among all predictions of the batch.

    The loss is the mean over anchors i of -log(exp(s_ij / T) / sum_(k != i) exp(s_ik / T)), with j the partner of i. A
    negative k with s_ik >= s_ij gets no gradient. An anchor has no loss if its pair with its partner does not count.

    Args:
        similarity: s, (2 N, 2 N): the predictions of N samples from one modality, then from the other one.
        counts: (2 N, 2 N), bool: whether a pair counts.
        anchors: the number of samples whose predictions are anchors. They are the first ones of each modality.
        temperature: T.
    """
    m, n = len(similarity), len(similarity) // 2
    samples = torch.arange(anchors, device=similarity.device)
    rows = torch.cat((samples, samples + n))
    partner = ((rows + n) % m)[:, None]
    s, usable = similarity[rows], counts[rows]
    positive, anchor = s.gather(1, partner), usable.gather(1, partner)[:, 0]
    s = torch.where(s >= positive, s.detach(), s).scatter(1, partner, positive)
    itself = torch.zeros_like(usable).scatter(1, rows[:, None], True)
    others = (usable & ~itself).scatter(1, partner, True)
    losses = F.cross_entropy((s / temperature).masked_fill(~others, -torch.inf), partner[:, 0], reduction="none")
    return (losses * anchor).sum() / anchor.sum().clamp_min(1)


def similarities(logits: Sequence[Tensor], label_manager, squared: bool = False) -> tuple[Tensor, Tensor]:
    """`area_similarity` of all pairs of predictions, (M, M), and which pairs count, (M, M), bool.

    The similarity of a pair is the mean over the foreground classes that at least one of its two decisions has. A
    pair without such a class does not count. The classes are computed one at a time, and again by the backward
    pass, because the probabilities of all classes would be the largest tensors of a step.

    Args:
        logits: tensors (B_i, heads, *S). M is the sum of all B_i.
        squared: see `area_similarity`.
    """
    regions = label_manager.has_regions
    norms = [None if regions else recomputed(log_normaliser, x) for x in logits]
    classes = list(zip(*(x.unbind(1) for x in logits), strict=True))[0 if regions else 1 :]
    of_classes = torch.stack([recomputed(class_similarity, of_class, norms, squared) for of_class in classes])
    there = torch.cat([classes_in(x, label_manager) for x in logits]).T  # (classes, M)
    either = there[:, :, None] | there[:, None]
    return (of_classes * either).sum(0) / either.sum(0).clamp_min(1), either.any(0)


def area_similarity(p: Tensor, squared: bool = False) -> Tensor:
    """The soft Dice 2 |P_i P_j| / (|P_i| + |P_j|) of each pair of predictions, as a mean over classes.

    Args:
        p: probabilities (M, classes, *S).
        squared: whether the denominator is |P_i^2| + |P_j^2|, so that a soft prediction has similarity 1 with itself.

    Returns:
        (M, M), in 0 to 1.
    """
    with torch.autocast(p.device.type, enabled=False):  # sums over many thousands of voxels need float32
        flat = p.float().flatten(2)
        area = (flat.square() if squared else flat).sum(2)
        overlap = torch.einsum("icv,jcv->ijc", flat, flat)
        return ((2 * overlap + 1e-5) / (area[:, None] + area[None] + 1e-5)).mean(2)


@torch.no_grad()
def classes_in(logits: Tensor, label_manager) -> Tensor:
    """The foreground classes or regions in the decision of logits (B, heads, *S): (B, classes), bool."""
    label = hard_pseudo_label(logits, label_manager)
    heads = range(logits.shape[1])
    if label_manager.has_regions:
        return torch.stack([label[:, head].flatten(1).any(1) for head in heads], 1)
    return torch.stack([(label == head).flatten(1).any(1) for head in heads[1:]], 1)


def log_normaliser(logits: Tensor) -> Tensor:
    """The logarithm of the sum of exp(logits) over the heads of (B, heads, *S): (B, *S), in float32 or float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(1)


def class_similarity(logits: Sequence[Tensor], norms: Sequence[Tensor | None], squared: bool = False) -> Tensor:
    """`area_similarity` of one class.

    Args:
        logits: tensors (B_i, *S) of this class only. M is the sum of all B_i.
        norms: for each tensor the `log_normaliser` of all heads. None for a region, which has a sigmoid.
        squared: see `area_similarity`.

    Returns:
        (M, M), in 0 to 1.
    """
    p = [x.sigmoid() if norm is None else (x - norm).exp() for x, norm in zip(logits, norms, strict=True)]
    return area_similarity(torch.cat(p)[:, None], squared)
