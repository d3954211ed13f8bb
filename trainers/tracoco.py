"""TraCoCo (TMI 2024): two networks see the same voxels in other surroundings, and agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.losses.segmentation import confidence, probabilities
from nnunet_semiseg.settings.base import ConsistencySettings, PseudoLabelSettings, Share
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.two_networks import TwoNetworkTrainer


@dataclass(frozen=True, kw_only=True)
class TraCoCoSettings(ConsistencySettings, PseudoLabelSettings):
    """Settings of `TraCoCoTrainer`."""

    paper_weight: ClassVar[float] = 1.0

    shift: Annotated[float, Bounds(0, 0.5)] = 0.25
    """The distance between the two crops of an unlabelled patch, as a share of its sides."""
    match_threshold: Share = 0.65
    """The least probability of a pseudo-label that counts."""


class TraCoCoTrainer(TwoNetworkTrainer[TraCoCoSettings]):
    """Liu et al., "Translation consistent semi-supervised segmentation for 3D medical images" (TMI 2024, 2203.14523).

    Two networks are trained together. Each sees a different crop of an unlabelled sample. Where the crops overlap, both
    see the same voxels with different surroundings, and learn to agree:

    - L_CRC is a mean over the voxels of the overlap where the decision y of the other network is confident. It is the
      sum of the binary cross-entropies of all classes towards y, so that a network also learns what a voxel is not;
    - L = L_sup(1) + L_sup(2) + lambda(t) (L_CRC(1) + L_CRC(2)).

    That is `consistency=paper`, with a Gaussian ramp to 1 over the training. By default we differ: nnU-Net's Dice + CE
    with deep supervision over these voxels replaces L_CRC, and lambda reaches 1 after 0.4 of the training. The crops
    are taken from one patch. They are shifted along each axis that is long enough, by whole strides of the network, in
    either direction. The paper's CutMix and its distance between entropies are left out. The paper has two
    architectures or two initial weights; here it is the latter.
    """

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        plans = super().prepare(plans, configuration, fold, dataset_json)
        manager = PlansManager(plans).get_configuration(configuration)
        self.strides = [int(n) for n in np.prod(manager.pool_op_kernel_sizes, 0)]
        return plans

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        for i, network in enumerate(self.networks):
            yield {f"supervised_{i + 1}": self.loss(network(batch.images), batch.target)}
        unlabeled = batch.views["strong"]
        windows, overlaps = draw_windows(unlabeled.shape[2:], self.strides, self.settings.shift)
        passes = [
            partial(of_overlap, network, unlabeled[(..., *window)], overlap)
            for network, window, overlap in zip(self.networks, windows, overlaps, strict=True)
        ]
        weight = self.settings.weight(self.progress)
        for i, output, taught in self.in_turn(passes, self.taught):
            yield {"translation": weight * self.taught_loss(output, *taught[1 - i])}
            del output

    def taught(self, output) -> tuple[Tensor, Tensor]:
        """A network's decision, and where it is confident, (B, 1, *S), 0 or 1."""
        logits = self.finest(output)
        certain = confidence(probabilities(logits, self.label_manager), self.label_manager)
        return self.decide(logits), (certain >= self.settings.match_threshold).float()

    def taught_loss(self, output, decision: Tensor, weight: Tensor) -> Tensor:
        """The loss of one network towards the decision of the other, over the voxels with weight 1."""
        if self.settings.consistency != "paper":
            return self.pseudo_loss(output, decision, weight)
        p = probabilities(self.finest(output), self.label_manager).clamp(1e-6, 1 - 1e-6)
        heads = range(p.shape[1])
        regions = self.label_manager.has_regions
        y = decision[:, heads] if regions else torch.cat([decision == head for head in heads], 1)
        with torch.autocast(p.device.type, enabled=False):  # autocast does not allow this loss
            losses = F.binary_cross_entropy(p, y.float(), reduction="none").mean(1, keepdim=True)
        return (losses * weight).sum() / weight.sum().clamp_min(1)


def of_overlap(network, crop: Tensor, overlap: Sequence[tuple[float, float]]):
    """The network's output for the voxels that both crops have. The overlap is cut from each scale in proportion."""
    return tree_map(lambda x: x[(..., *slices_of(overlap, x.shape[2:]))], network(crop))


def draw_windows(size: Sequence[int], strides: Sequence[int], share: float):
    """Draw two crops of a patch at random, and compute what they have in common.

    Args:
        size: of the patch, in voxels.
        strides: the network's stride along each axis, from the image to the bottleneck. Crops are multiples of it.
        share: the shift between the crops, as a part of the side. It is smaller if they would not overlap otherwise.

    Returns:
        Two tuples of slices into the patch; and for each crop the common part, as shares (start, stop) of its sides.
    """
    windows, overlaps = ([], []), ([], [])
    for n, stride in zip(size, strides, strict=True):
        shift = min(round(share * n / stride), (n // stride - 1) // 2) * stride
        first = int(torch.randint(2, ()))  # the crop that begins at 0
        for i in range(2):
            begins = i == first
            windows[i].append(slice(0, n - shift) if begins else slice(shift, n))
            length, common = n - shift, n - 2 * shift
            start = shift if begins else 0
            overlaps[i].append((start / length, (start + common) / length))
    return [tuple(window) for window in windows], overlaps


def slices_of(shares: Sequence[tuple[float, float]], size: Sequence[int]) -> tuple[slice, ...]:
    """Turn shares of the sides into slices."""
    return tuple(slice(round(a * n), round(b * n)) for (a, b), n in zip(shares, size, strict=True))
