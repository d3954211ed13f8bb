"""The weights of voxels in the re-learning of Semi-CML."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_semiseg.losses.segmentation import confidence, disagree, entropy, probabilities


def relearning_weight(
    branches: Sequence[Tensor], mean: Tensor, sampled: Tensor | None, tau: float, disagreement: float, label_manager
) -> Tensor:
    """The weight of each voxel, (B, 1, *S).

    It is 0 where the probability of the decision is below tau. Elsewhere it is the certainty; it is multiplied by
    `disagreement` where the decisions of the two decoders differ.

    Args:
        branches: the logits of both decoders, (B, heads, *S).
        mean: the logits from which the decision is made.
        sampled: the logits of the mean over dropout passes. None: the certainty is 1.
    """
    weight = (confidence(probabilities(mean, label_manager), label_manager) >= tau).float()
    weight *= torch.where(disagree(branches[0], branches[1], label_manager), disagreement, 1.0)
    if sampled is not None:
        weight *= certainty(probabilities(sampled, label_manager), label_manager)
    return weight


def dynamic_threshold(t: float, tau0: float) -> float:
    """The threshold tau(t) = tau0 + (1 - tau0) min(0.9, t).

    t is 0 when the re-learning begins, and 1 after a further share `threshold_warmup` of the training.
    """
    return tau0 + (1 - tau0) * min(0.9, t)


def certainty(p: Tensor, label_manager) -> Tensor:
    """The certainty 1 - entropy / max entropy of probabilities (B, heads, *S): (B, 1, *S).

    For regions it is the mean over all regions.
    """
    regions = label_manager.has_regions
    return 1 - entropy(p, regions).mean(1, keepdim=True) / math.log(2 if regions else p.shape[1])
