"""Dual-task consistency (AAAI 2021): predicted classes and signed distances agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from nnunet_semiseg.losses.segmentation import cross_entropy, has_label, probabilities
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import ConsistencySettings, OptionalTextSettings, PseudoLabelSettings, Weight
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.text_guided import TextGuidedTrainer

STEEPNESS = 1500
"""The factor k in the smooth Heaviside function."""


@dataclass(frozen=True, kw_only=True)
class DTCSettings(ConsistencySettings, OptionalTextSettings, PseudoLabelSettings):
    """Settings of `DTCTrainer`."""

    paper_weight: ClassVar[float] = 1.0

    level_set_weight: Weight = 0.3
    """The weight of the loss on the level sets of labelled samples (beta in the paper). A level set is a signed
    distance to the boundary of a class."""


class DualTaskUNet(MultiDecoderUNet):
    """A U-Net with twice as many heads: each class or region has one for the segmentation and one for the level set.

    `forward(x)` gives the segmentation only.
    """

    def forward(self, x: Tensor):
        return tree_map(lambda t: t[:, : t.shape[1] // 2], super().forward(x))


class DTCTrainer(TextGuidedTrainer[DTCSettings]):
    """Luo et al., "Semi-supervised medical image segmentation through dual-task consistency" (AAAI 2021, 2009.04448).

    One network predicts the classes and, by tanh, level sets z: signed distances to the boundary, in voxels of the
    patch, negative inside and scaled to -1 to 1 (eq. 1).

    - eq. 3: the smooth Heaviside function sigmoid(-k z), k = 1500, turns z into a soft segmentation;
    - eq. 4: L_DTC = mean ||sigmoid(-k z) - p||^2, over labelled and unlabelled samples;
    - eq. 5: L_LSF = mean ||z - T(y)||^2, over the labelled samples;
    - eq. 6: L = L_seg + 0.3 L_LSF + lambda(t) L_DTC, with lambda a Gaussian ramp to 1 over the training.

    The paper has one organ. Here each class (the background, too) or region has its own level set. If a class is not in
    a patch, every voxel is outside (1). A patch with ignored voxels has no L_LSF. The distances are computed after
    augmentation, in the loader's processes (1 to 1.5 s for each head of a patch of 128^3). L_LSF and eq. 4 use the full
    resolution, and L_seg is nnU-Net's. With deep supervision the level sets of the coarser outputs are not used.

    With `consistency=paper` L_DTC is eq. 4. Its gradient is so small that the classes learn next to nothing from it.
    With k = 1500 it moves only level sets that are within a few thousandths of 0, and these are nearly right anyway. By
    default we differ: each task learns the decision of the other,

        L_DTC = L_seg(p, argmin z) + CE(softmax(-k z), argmax p) / k,

    and for regions z < 0 and the sigmoid. L_seg is nnU-Net's, with deep supervision. The second part is about 0 where
    the sign is right; elsewhere it grows with the error. So it fixes the signs of the distances and nothing else.
    """

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        return super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, 2 * num_output_channels, enable_deep_supervision
        )

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return DualTaskUNet(network)

    def target_maker(self):
        return partial(add_level_sets, label_manager=self.label_manager)

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        network = self.bare_network

        def predict(images: Tensor):
            skips, aligned = network.encode(images, text)
            return network.decode(skips), aligned

        streams = batch.streams("strong")
        predictions = self.each(predict, *(images for images, _, _ in streams))
        weight = self.settings.weight(self.progress)
        for _, target, share in streams:
            with self.shared(next(predictions)) as (output, aligned):
                # one sample at a time: with many classes the tensors of the level sets are the largest of a step
                samples = self.finest(output).split(1)
                if target is not None:
                    yield {"supervised": self.loss(self.segmentation(output), target)}
                    shares = self.known_shares(target)
                    for sample, true, known in zip(samples, batch.extra["level_sets"], shares, strict=True):
                        yield {"level_sets": known * self.level_set_loss(sample, true)}
                segmentation, level_sets = self.split(self.finest(output))
                decisions = [self.decide(x, counts=target is None) for x in (segmentation, -level_sets)]
                del segmentation, level_sets
                if self.settings.consistency != "paper":
                    yield {"dtc": weight * share * self.pseudo_loss(self.segmentation(output), decisions[1])}
                for sample, decision in zip(samples, decisions[0].split(1), strict=True):
                    yield {"dtc": weight * share / len(samples) * self.dtc_loss(sample, decision)}
                del decisions, decision
                samples = sample = None  # views of logits, which would keep this stream's memory
                yield self.cog(aligned, self.finest(output), text, share)

    def split(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Split an output into the logits of the heads (B, heads, *S), and the values whose tanh is the level sets."""
        segmentation, level_sets = logits.chunk(2, 1)
        return segmentation, level_sets

    def segmentation(self, output):
        """Take the part for the segmentation from an output with or without deep supervision."""
        return tree_map(lambda logits: self.split(logits)[0], output)

    def known_shares(self, target) -> Tensor:
        """The weights (B,) of the patches: equal for all with known distances, 0 for the others. Their sum is 1 or 0.

        In a patch with an ignored voxel the distances are not known, because the nearest boundary may be in that voxel.
        """
        known = has_label(self.finest(target), self.label_manager).flatten(1).all(1).float()
        return known / known.sum().clamp_min(1)

    def level_set_loss(self, logits: Tensor, true: Tensor) -> Tensor:
        """The loss beta L_LSF (see `DTCTrainer`) of one patch: output (1, 2 heads, *S), level sets T(y) (heads, *S)."""
        return self.settings.level_set_weight * F.mse_loss(self.split(logits)[1][0].float().tanh(), true.float())

    def dtc_loss(self, logits: Tensor, decision: Tensor) -> Tensor:
        """The loss L_DTC (see `DTCTrainer`) of an output (B, 2 heads, *S), without its weight.

        With `consistency=paper` it is eq. 4. Else it is the second part only, in which the level sets learn `decision`,
        the pseudo-label of this network's own head for segmentation.
        """
        segmentation, level_sets = self.split(logits)
        inside = -STEEPNESS * level_sets.float().tanh()
        if self.settings.consistency == "paper":
            return F.mse_loss(inside.sigmoid(), probabilities(segmentation, self.label_manager))
        return cross_entropy(inside, decision, self.label_manager.has_regions) / STEEPNESS


def add_level_sets(labeled_batch: dict, unlabeled_batch: dict, label_manager) -> dict[str, Tensor]:
    """Compute the level sets of the labels in the labelled batch, (B, heads, *S), float16; see `level_set`.

    They become `level_sets` in `Batch.extra`. The unlabelled batch is not used.
    """
    target = labeled_batch["target"]
    target = (target[0] if isinstance(target, (list, tuple)) else target).numpy()
    heads = range(label_manager.num_segmentation_heads)
    masks = target[:, heads] > 0 if label_manager.has_regions else np.concatenate([target == c for c in heads], 1)
    level_sets = torch.from_numpy(np.stack([[level_set(mask) for mask in sample] for sample in masks]))
    return {"level_sets": level_sets.half()}  # half the size on its way to the GPU; more digits are not needed


def level_set(mask: np.ndarray) -> np.ndarray:
    """The level set T(y): the distance to the boundary, divided by its maximum. Negative inside, 0 on the boundary.

    Source: eq. 1. The voxels inside and outside have their own maximum; the boundary belongs to the inside. If the mask
    is empty, T(y) is 1 everywhere; if it is full, T(y) is -1.

    Args:
        mask: (*S), bool.

    Returns:
        (*S), float32, in -1 to 1.
    """
    if mask.all() or not mask.any():
        return np.where(mask, np.float32(-1), np.float32(1))
    distance: Any = distance_transform_edt  # its annotation says that it may return several arrays, or none
    outside, inside = distance(~mask), distance(mask)
    result = outside / outside.max() - inside / inside.max()
    result[find_boundaries(mask, mode="inner")] = 0
    return result.astype(np.float32)
