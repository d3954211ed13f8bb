"""MC-Net+ (MedIA 2022): three decoders that differ agree with each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.losses.segmentation import probabilities
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet, extra_decoder
from nnunet_semiseg.settings.base import OptionalTextSettings, PseudoLabelSettings, SharpeningSettings, Weight
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.text_guided import TextGuidedTrainer

UPSAMPLING = ("linear", "nearest")
"""How the second and the third decoder upsample. The first one has the transposed convolutions of the plans."""


@dataclass(frozen=True, kw_only=True)
class MCNetSettings(SharpeningSettings, OptionalTextSettings, PseudoLabelSettings):
    """Settings of `MCNetTrainer`; `consistency_weight` is the paper's beta."""

    paper_weight: ClassVar[float] = 1.0

    supervised_weight: Weight = 0.5
    """The weight of the loss on labelled samples (lambda in the paper). This loss is the sum over all decoders."""


class MCNetTrainer(TextGuidedTrainer[MCNetSettings]):
    """Wu et al., "Mutual consistency learning for semi-supervised medical image segmentation" (MC-Net+).

    Medical Image Analysis 2022, arXiv 2109.09960. One encoder is shared by three decoders. They differ in how they
    upsample: transposed convolutions, linear and nearest interpolation.

    - sharpening: p* = p^(1/T) / (p^(1/T) + (1 - p)^(1/T)), T = 0.1. For several classes it is p^(1/T) divided by its
      sum over the classes, which is the softmax of logits / T;
    - L_mc = sum over decoders i != j of MSE(p_i, p*_j), over labelled and unlabelled samples;
    - L = lambda sum_i L_seg(i) + beta L_mc, with lambda = 0.5 and beta a Gaussian ramp to 1 over the training.

    Where the paper says nothing, or its code differs: p* gets no gradient, because it takes the place of a label. L_seg
    is nnU-Net's (their code: Dice only). The decoder with transposed convolutions is deployed.

    With `consistency=paper` L_mc is as above, with a ramp as long as the training (their code: 40 % of it). By default
    we differ: a decoder learns the decisions of the others (p* at T = 0) by nnU-Net's loss with deep supervision. L_mc
    = lambda sum_i mean over j != i of L_seg(i, decision of j). So at beta = 1 the other decoders have as much weight as
    the labels.
    """

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        convolutions = arch_kwargs["n_conv_per_stage_decoder"]
        others = [extra_decoder(network, convolutions, deep_supervision, kind) for kind in UPSAMPLING]
        return MultiDecoderUNet(network, others, recompute=settings.memory == "stock")

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        network, settings = self.bare_network, self.settings
        weight = settings.weight(self.progress)
        streams = batch.streams("strong")
        encoded = self.each(partial(network.encode, text=text), *(images for images, _, _ in streams))
        for _, target, share in streams:
            keep = partial(self.taught, counts=target is None)
            with self.shared(next(encoded)) as (skips, aligned):
                passes = [partial(network.decode, skips, i) for i in range(1 + len(UPSAMPLING))]
                for i, output, taught in self.in_turn(passes, keep):
                    with self.shared(output) as output:
                        if target is not None:
                            yield {f"supervised_{i + 1}": settings.supervised_weight * self.loss(output, target)}
                        others = [x for j, x in enumerate(taught) if j != i]
                        mutual = share * weight * self.mutual_loss(output, others)
                        terms = {"mutual": mutual} | self.cog(aligned, self.finest(output), text, share)
                        del others, mutual
                        yield terms
                del taught, terms  # else they would keep this stream's memory

    def taught(self, output, counts: bool) -> Tensor:
        """What the other decoders learn from a decoder: its decision, or with `consistency=paper` its logits.

        `counts`: whether the log counts the classes of the decision; see `Decisions`.
        """
        logits = self.finest(output)
        decision = self.decide(logits, counts)
        return logits.detach() if self.settings.consistency == "paper" else decision

    def mutual_loss(self, output, others: Sequence[Tensor]) -> Tensor:
        """The part of the loss L_mc (see `MCNetTrainer`) for one decoder. What the others teach gets no gradient."""
        if self.settings.consistency == "paper":
            p, T = probabilities(self.finest(output), self.label_manager), self.settings.sharpening
            sharpened = (probabilities(x.detach().float() / T, self.label_manager) for x in others)
            return sum(F.mse_loss(p, x) for x in sharpened)  # pyright: ignore[reportReturnType]: sum's 0 is not left
        losses = torch.stack([self.pseudo_loss(output, decision) for decision in others])
        return self.settings.supervised_weight * losses.mean()
