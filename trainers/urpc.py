"""URPC (MedIA 2022): the outputs at all resolutions agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_semiseg.losses.segmentation import divergence, on_grid, probabilities, weighted_loss
from nnunet_semiseg.networks.feature_perturbation import drop_channels, feature_noise
from nnunet_semiseg.networks.multi_decoder import LINEAR, MultiDecoderUNet
from nnunet_semiseg.settings.base import ConsistencySettings, OptionalTextSettings, PseudoLabelSettings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.text_guided import TextGuidedTrainer

HEAD_DROPOUT = (0.1, 0.2, 0.3, 0.5)
"""The probability of dropout before each output, from the finest to the fourth. Coarser outputs have the last value."""
SLAB = 32
"""How many voxels along the first axis `pyramid_consistency` computes at a time, to save memory."""


@dataclass(frozen=True, kw_only=True)
class URPCSettings(ConsistencySettings, OptionalTextSettings, PseudoLabelSettings):
    """Settings of `URPCTrainer`."""


class URPCTrainer(TextGuidedTrainer[URPCSettings]):
    """Luo et al., "Efficient semi-supervised gross target volume segmentation by uncertainty rectified pyramid ...".

    URPC; MICCAI 2021, arXiv 2012.07042; Medical Image Analysis 2022.

    The outputs p_s of nnU-Net's deep supervision are brought to full resolution. On unlabelled samples they learn to
    agree with their mean p_c. In training, channels of the features are dropped and noise is added before each output,
    so that the scales differ in more than their size. The dropout is smaller for finer outputs (0.1 to 0.5, as in their
    3d code, which has no noise and passes the dropped features on to the next level; their 2d code perturbs each output
    differently).

    - eq. 3: D_s = sum over classes of p_s log(p_s / p_c), the uncertainty of a scale in one forward pass;
    - eq. 4: L_unsup = 1/S sum_s [sum_v ||p_s - p_c||^2 w_s / sum_v w_s] + 1/S sum_s mean D_s, w_s = exp(-D_s);
    - L = L_sup + lambda(t) L_unsup, with a Gaussian ramp to lambda = 0.1.

    With `consistency=paper` L_unsup is eq. 4. By default we differ: each scale learns the decision of p_c by nnU-Net's
    loss, with the weights of deep supervision. A voxel has the weight w_s, which gets no gradient. lambda ends at 1
    after 0.4 of the training.

    As in their code, the squares are a mean over classes, and the last term is the mean of D_s (paper: its norm). That
    code has D_s the other way round, p_c log(p_c / p_s). L_sup is nnU-Net's, where each coarser output has half the
    weight (in the paper all are equal). nnU-Net leaves the coarsest output out; here it is supervised, too. Without
    deep supervision there is one output, and L_unsup is 0.
    """

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        heads = list(reversed(network.decoder.seg_layers))  # the finest first
        for i, head in enumerate(heads):
            # a hook, so that the weights keep the names of the plans' network
            head.register_forward_pre_hook(partial(perturb, HEAD_DROPOUT[min(i, len(HEAD_DROPOUT) - 1)]))
        return MultiDecoderUNet(network)

    def _build_loss(self):
        loss: Any = super()._build_loss()
        if self.enable_deep_supervision:
            weights = [0.5**i for i in range(len(loss.weight_factors))]
            loss.weight_factors = tuple(weight / sum(weights) for weight in weights)
        return loss

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        streams = batch.streams("strong")
        outputs = self.each(partial(self.predict, text=text), *(images for images, _, _ in streams))
        for _, target, share in streams:
            output, aligned = next(outputs)
            terms = self.cog(aligned, self.finest(output), text, share)
            if target is None:
                terms["pyramid"] = self.settings.weight(self.progress) * self.pyramid(output)
            else:
                terms["supervised"] = self.loss(output, target)
            del output, aligned
            yield terms

    def pyramid(self, output) -> Tensor:
        """The loss L_unsup (see `URPCTrainer`) of an output with or without deep supervision."""
        scales = output if self.enable_deep_supervision else [output]
        decisions, certainties = [], []
        for sample in zip(*(x.split(1) for x in scales), strict=True):  # all at once would need more than the network
            mean, certainty = pyramid_certainty(sample, self.label_manager)
            decisions.append(self.decide(mean))
            certainties.append(certainty)
        if self.settings.consistency == "paper":
            return pyramid_consistency(scales, self.label_manager)
        if len(scales) == 1:
            return 0 * scales[0].sum()
        targets = [on_grid(torch.cat(decisions), x) for x in scales]
        weights = [torch.cat(of_scale) for of_scale in zip(*certainties, strict=True)]
        loss: Any = DeepSupervisionWrapper(partial(weighted_loss, self.finest_loss), self.loss.weight_factors)
        return loss(scales, targets, weights)


def perturb(p: float, head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """In training, drop channels of the features (B, C, *s) before a head, and add noise. Otherwise change nothing."""
    (x,) = inputs
    return (feature_noise(drop_channels(x, p)),) if head.training else inputs


@torch.no_grad()
def pyramid_certainty(scales: Sequence[Tensor], label_manager) -> tuple[Tensor, list[Tensor]]:
    """Compute, for one sample, the mean p_c of all scales and the certainty w_s of each (see `URPCTrainer`).

    Returns the log of p_c (for regions its logits), (1, heads, *S), and w_s for each scale, (1, 1, *s). For regions w_s
    is that of the least certain region.
    """
    size, regions = scales[0].shape[2:], label_manager.has_regions
    mean: Any = sum(at_full_size(x, size, label_manager) for x in scales) / len(scales)
    weights = []
    for x in scales:
        weight = (-divergence(at_full_size(x, size, label_manager), mean, regions)).exp()
        weights.append(on_grid(weight.amin(1, keepdim=True), x))
    return mean.logit() if regions else mean.log(), weights


def at_full_size(logits: Tensor, size: Sequence[int], label_manager) -> Tensor:
    """The probabilities at full resolution, from the logits (B, heads, *s) of one scale."""
    logits = F.interpolate(logits.float(), list(size), mode=LINEAR[len(size)])
    return probabilities(logits, label_manager)


def pyramid_consistency(scales: Sequence[Tensor], label_manager) -> Tensor:
    """The loss L_unsup, eq. 4 of the paper. For each region, the uncertainty D_s (eq. 3) has two classes: in and out.

    With many classes, the probabilities of all scales at full size would need more memory than the network. So only
    `SLAB` voxels along the first axis are computed at a time, and once more in the backward pass.

    Args:
        scales: the logits (B, heads, *s) of S scales, from fine to coarse. The first has full resolution.
        label_manager: the `LabelManager` of nnU-Net. It says whether the heads are classes or regions.
    """
    size = scales[0].shape[2:]

    def sums_of_scale(logits: Tensor, mean: Tensor) -> Any:
        p = at_full_size(logits, size, label_manager)
        slabs = zip(p.split(SLAB, 2), mean.split(SLAB, 2), strict=True)
        return sum(checkpoint(in_slab, *slab, use_reentrant=False) for slab in slabs)

    def in_slab(p: Tensor, mean: Tensor) -> Tensor:
        return scale_means(p, mean, label_manager.has_regions) * (p.shape[2] / size[0])

    sums: Any = 0  # (S, 3)
    for sample in zip(*(x.split(1) for x in scales), strict=True):
        of_scales = (checkpoint(at_full_size, x, size, label_manager, use_reentrant=False) for x in sample)
        mean = sum(p / len(scales) for p in of_scales)
        sums = sums + torch.stack([checkpoint(sums_of_scale, x, mean, use_reentrant=False) for x in sample])
    distance, weight, uncertainty = (sums / len(scales[0])).unbind(1)
    return (distance / weight + uncertainty).mean()


def scale_means(p: Tensor, mean: Tensor, regions: bool) -> Tensor:
    """The means, over voxels and classes, of ||p_s - p_c||^2 w_s, of w_s, and of D_s (see `URPCTrainer`): (3,).

    Args:
        p: p_s, the probabilities of one scale at full resolution, (B, heads, *S).
        mean: p_c, their mean over the scales.
        regions: True: each head is a class and its complement. False: the heads share a softmax.
    """
    uncertainty = divergence(p, mean, regions)  # D_s, eq. 3
    weight = (-uncertainty).exp()
    return torch.stack([((p - mean).square() * weight).mean(), weight.mean(), uncertainty.mean()])
