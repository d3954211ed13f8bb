"""Text-SemiSeg (MICCAI 2025): class prompts guide two decoders that teach each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet, extra_decoder
from nnunet_semiseg.settings.base import ConsistencySettings, PseudoLabelSettings, Share, TextSettings, Weight
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.checks import check_there_are_pairs
from nnunet_semiseg.training.text_guided import TextGuidedTrainer


@dataclass(frozen=True, kw_only=True)
class TextSemiSegSettings(ConsistencySettings, TextSettings, PseudoLabelSettings):
    """Settings of `TextSemiSegTrainer`.

    `consistency` is about the loss with which the two decoders teach each other.
    """

    dca: Literal["complementary", "foreground", "off"] = "complementary"
    """How two images are mixed (DCA in the paper). `complementary` exchanges the foreground of the labelled image with
    the same voxels of the unlabelled image. `foreground` pastes the foreground of each image into the other, as the
    paper does. `off` mixes none."""
    dca_start: Share = 0.2
    """The share of the training after which images are mixed."""
    dca_weight: Weight = 1.0
    """The weight of the loss on mixed images."""


class TextSemiSegTrainer(TextGuidedTrainer[TextSemiSegSettings]):
    """Text-driven Multiplanar Visual Interaction for Semi-supervised Medical Image Segmentation.

    MICCAI 2025, arXiv 2507.12382. One encoder is shared by two decoders that upsample differently. A frozen text
    encoder reads class prompts with a learnable context.

        L = L_sup(1) + L_sup(2) + L_cog + L_mix + lambda(t) L_unsup.

    L_sup is nnU-Net's loss with deep supervision. L_cog is CSA (`category_alignment_loss`) over both streams and both
    decoders. It gives the text no gradient; the text learns through TMR only. L_mix is DCA, from `dca_start` on: the
    decoder with the lower supervised loss labels the unlabelled samples. `mix` mixes these with labelled samples, and
    the other decoder learns from the mixes (Dice + CE and L_cog; one mean over both mixes, as in the code). L_unsup is
    the cross pseudo supervision of the decoders. TMR is `MultiplanarTextAttention`. The first decoder (transposed
    convolutions) is deployed.

    With `consistency=paper` the losses of pseudo-labels use full resolution only, and lambda(t) is a Gaussian ramp to
    0.1 over the training. By default we differ: they have nnU-Net's deep supervision, and lambda reaches 1 after 0.4 of
    the training.

    Where the published code differs from the paper we follow the paper (see the docstrings of the modules). We differ
    from the paper in DCA's masks. In the paper each mix pastes its own image's foreground into the other
    (`dca=foreground`). Then both mixes contain the foreground of both images. What is wrongly called foreground is
    pasted, too, and learnt as foreground. Where a patch shows the whole organ this error grows: on left atria the
    pseudo-labels grew to 1.6 times the true volume (docs/results.md). By default the second mix takes all parts
    that are not in the first. So every voxel is used once, the amount of foreground does not change, and the edge of a
    pasted part is not always a boundary of the organ.

    Where the paper says nothing: the decoders are compared by the losses of the previous step. On a GPU it may be an
    earlier step, because no step waits for the copy to the CPU; so a seed does not fix this choice on a GPU. In a data
    set of regions, foreground is where there is any region. One augmented view of a sample is used for all terms.
    """

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        second = extra_decoder(network, arch_kwargs["n_conv_per_stage_decoder"], deep_supervision, "linear")
        return MultiDecoderUNet(network, [second], recompute=settings.memory == "stock")

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        if self.settings.dca != "off":
            check_there_are_pairs(self.settings, plans, configuration, "DCA", "or --set dca=off")
        return super().prepare(plans, configuration, fold, dataset_json)

    def initialize(self):
        super().initialize()
        better = torch.zeros((), dtype=torch.bool)
        # the CPU does not wait for a copy into pinned memory
        self.method_state["second_is_better"] = better.pin_memory() if self.device.type == "cuda" else better

    def guided_losses(self, batch: Batch, text: Tensor) -> Iterator[dict[str, Tensor]]:
        network, settings = self.bare_network, self.settings
        better = int(self.method_state["second_is_better"])  # from an earlier step
        (x_l, target, share_l), (x_u, _, share_u) = batch.streams("strong")
        encoded = self.each(partial(network.encode, text=text), x_l, x_u)
        supervised = []
        with self.shared(next(encoded)) as (skips, aligned):
            for i in range(2):
                with self.shared(network.decode(skips, i)) as output:
                    loss = self.loss(output, target)
                    supervised.append(loss.detach())
                    yield {f"supervised_{i + 1}": loss}
                    yield self.cog(aligned, self.finest(output), text, share_l)
        weight = settings.weight(self.progress)
        with self.shared(next(encoded)) as (skips, aligned):
            passes = [partial(network.decode, skips, i) for i in range(2)]
            for i, output, pseudo in self.in_turn(passes, self.pseudo_label):
                with self.shared(output) as output:
                    yield {"unsupervised": weight * self.taught_loss(output, pseudo[1 - i])}
                    yield self.cog(aligned, self.finest(output), text, share_u)
        # copied to the CPU while the GPU works; the next step reads it
        first, second = self.ranks.mean(torch.stack(supervised))
        self.method_state["second_is_better"].copy_(second < first, non_blocking=True)
        if settings.dca == "off":
            return
        if self.progress < settings.dca_start:
            yield {"mix": batch.images.new_zeros(())}
            return
        mixes = self.mixes(batch, pseudo[better])
        predictions = self.each(partial(self.decode_one, text=text, decoder=1 - better), *(x for x, _ in mixes))
        for _, target in mixes:
            with self.shared(next(predictions)) as (output, aligned):
                share = settings.dca_weight / len(mixes)
                yield {"mix": share * self.taught_loss(output, target)}
                yield {"mix": share * self.alignment(aligned, self.finest(output), text)} if settings.csa else {}

    def decode_one(self, images: Tensor, text: Tensor, decoder: int):
        """The output of one decoder, and the features that are aligned with the text (setting `csa`)."""
        skips, aligned = self.bare_network.encode(images, text)
        return self.bare_network.decode(skips, decoder), aligned

    def taught_loss(self, output, target: Tensor) -> Tensor:
        """The Dice + CE towards a target with pseudo-labels. With `consistency=paper` it is at full resolution only."""
        if self.settings.consistency == "paper":
            return self.finest_loss(self.finest(output), target)
        return self.pseudo_loss(output, target)

    def mixes(self, batch: Batch, pseudo_label: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The images and targets of the mixes that the setting `dca` asks for, in the two directions."""
        x_l, y_l = batch.images, self.finest(batch.target)
        x_u, y_u = batch.views["strong"][: len(x_l)], pseudo_label[: len(x_l)]
        mask_l = self.foreground(y_l)
        mask_u = mask_l if self.settings.dca == "complementary" else self.foreground(y_u)
        return [mix(mask_l, x_l, x_u, y_l, y_u), mix(mask_u, x_u, x_l, y_u, y_l)]

    def pseudo_label(self, output) -> Tensor:
        """The decision of a decoder."""
        return self.decide(self.finest(output))

    def foreground(self, target: Tensor) -> Tensor:
        """The foreground m = [y > 0], (B, 1, *S), of a target as nnU-Net's loss takes it, without ignored voxels."""
        if self.label_manager.has_regions:
            return target[:, : self.label_manager.num_segmentation_heads].bool().any(1, keepdim=True)
        foreground = target > 0
        if self.label_manager.has_ignore_label:
            foreground &= target != self.label_manager.ignore_label
        return foreground


def mix(mask: Tensor, x: Tensor, x_other: Tensor, y: Tensor, y_other: Tensor):
    """Mix two images as in DCA: x_mix = m x + (1 - m) x_other. The targets are mixed in the same way.

    The published code multiplies one label by the other, which is right for two classes only.

    Args:
        mask: the mask m, (B, 1, *S), bool.
        x, x_other: images (B, C, *S).
        y, y_other: targets (B, 1 or regions, *S).

    Returns:
        The mixed images and targets.
    """
    return torch.where(mask, x, x_other), torch.where(mask, y, y_other)
