"""Cross pseudo supervision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn

from nnunet_semiseg.losses.pseudo_labels import cross_entropy
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import ConsistencySettings, OptionalTextSettings, PseudoLabelSettings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.passes import run_in_bfloat16, run_sample_by_sample
from nnunet_semiseg.training.semi_supervised import compile_parts
from nnunet_semiseg.training.text_guided import TextGuidedTrainer


@dataclass(frozen=True, kw_only=True)
class CPSSettings(ConsistencySettings, OptionalTextSettings, PseudoLabelSettings):
    """Settings of `CPSTrainer`; `consistency_weight` is the paper's lambda."""


class CPSTrainer(TextGuidedTrainer[CPSSettings]):
    """Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision" (CVPR 2021, 2106.01226).

    Two networks of the same architecture that differ in their initial weights: L = L_s + lambda L_cps.

    - eq. 3: L_s, both networks' loss on the labelled samples: nnU-Net's, with deep supervision;
    - eq. 4: L_cps = CE(p_1, y_2) + CE(p_2, y_1), y the other's decision, at full resolution; one mean over
      labelled and unlabelled samples (the paper adds a mean of each, twice as much where both are as many).

    The paper's lambda is 1.5 (VOC) or 6 (Cityscapes) from the first step, of networks pre-trained on ImageNet. From
    random weights that would teach noise: with `consistency=paper` L_cps is eq. 4 with the 0.1 and the Gaussian ramp
    over the training that are usual for volumes. By default it is nnU-Net's Dice + CE with deep supervision, with a
    weight of 1 after 0.4 of the training. The first network is deployed; the second is trained beside it and saved for
    resuming. nnU-Net's `-pretrained_weights` are the first's alone: the two have to differ.
    """

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network)

    def build_auxiliary(self) -> dict[str, nn.Module]:
        channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        heads = self.label_manager.num_segmentation_heads
        second = self.build_network_architecture(
            self.plans_manager, self.configuration_manager, channels, heads, self.enable_deep_supervision
        )
        return super().build_auxiliary() | {"second": second}

    def initialize(self):
        super().initialize()
        second = self.auxiliary["second"]
        if self.settings.bfloat16_on_cpu and self.device.type == "cpu":
            run_in_bfloat16(second)
        if self._do_i_compile():
            compile_parts(second)
        if self.settings.memory == "small":
            run_sample_by_sample(second)

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        weight = self.settings.weight(self.progress)
        networks = self.bare_network, self.auxiliary["second"]
        for images, target, share in batch.streams("strong"):
            passes = [partial(predict, network, images, text) for network in networks]
            for i, prediction, labels in self.in_turn(passes, partial(self.decision, counts=target is None)):
                with self.shared(prediction) as (output, aligned):
                    del prediction
                    if target is not None:
                        yield {f"supervised_{i + 1}": self.loss(output, target)}
                    logits = self.finest(output)
                    if self.settings.consistency == "paper":
                        cps = cross_entropy(logits, labels[1 - i], self.label_manager.has_regions)
                    else:
                        cps = self.pseudo_loss(output, labels[1 - i])
                    yield {"cps": share * weight * cps} | self.cog(aligned, logits, text, share)

    def decision(self, prediction, counts: bool) -> Tensor:
        """What one network says to the other."""
        return self.decide(self.finest(prediction[0]), counts)


def predict(network: MultiDecoderUNet, images: Tensor, text: Tensor | None):
    """The network's output, and the features that are aligned with the text."""
    skips, aligned = network.encode(images, text)
    return network.decode(skips), aligned
