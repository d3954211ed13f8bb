"""Cross pseudo supervision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn

from nnunet_semiseg.config import OptionalTextSettings, require
from nnunet_semiseg.losses.pseudo_labels import cross_entropy, hard_pseudo_label
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.networks.text_guidance import text_guidance_for
from nnunet_semiseg.training.schedules import gaussian_ramp
from nnunet_semiseg.training.semi_supervised_trainer import (
    SemiSupervisedTrainer,
    apply_network_settings,
    split_streams,
)


@dataclass(frozen=True, kw_only=True)
class CPSSettings(OptionalTextSettings):
    cps_weight: float = 0.1
    """lambda, at the end of the ramp"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "cps_weight", minimum=0)


class CPSTrainer(SemiSupervisedTrainer):
    """Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision" (CVPR 2021, 2106.01226).

    Two networks of the same architecture that differ in their initial weights: L = L_s + lambda L_cps.

    - eq. 3: L_s, both networks' loss on the labelled samples: nnU-Net's, with deep supervision;
    - eq. 4: L_cps = CE(p_1, y_2) + CE(p_2, y_1), y the other's decision, at full resolution; one mean over
      labelled and unlabelled samples (the paper adds a mean of each, twice as much where both are as many).

    The paper's lambda is 1.5 (VOC) or 6 (Cityscapes) from the first step, of networks pre-trained on ImageNet. From
    random weights that would teach noise: we take the 0.1 with a Gaussian ramp over the training that is usual for
    volumes. The first network is deployed; the second is trained beside it and saved for resuming. nnU-Net's
    `-pretrained_weights` are the first's alone: the two have to differ.
    """

    settings_class = CPSSettings

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network, guidance=text_guidance_for(network, settings))

    def build_auxiliary(self) -> dict[str, nn.Module]:
        channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        heads = self.label_manager.num_segmentation_heads
        second = self.build_network_architecture(
            self.plans_manager, self.configuration_manager, channels, heads, self.enable_deep_supervision
        )
        return super().build_auxiliary() | {"second": second}

    def initialize(self):
        super().initialize()
        apply_network_settings(self.auxiliary["second"], self.device, self.settings)
        if self._do_i_compile():
            self.auxiliary["second"].compile()

    def forward_streams(self, batch: dict):
        """Per stream the outputs of both networks."""
        images = torch.cat((batch["data"], batch["unlabeled"][self.student_view]))
        outputs = [self.decode(network, images)[0] for network in (self.network, self.auxiliary["second"])]
        return split_streams(outputs, len(batch["data"]))

    def supervised_losses(self, labeled, batch: dict) -> dict[str, Tensor]:
        return {f"supervised_{i}": self.loss(output, batch["target"]) for i, output in enumerate(labeled, 1)}

    def semi_losses(self, labeled, unlabeled, batch: dict) -> dict[str, Tensor]:
        first, second = (
            torch.cat((self.finest(of_l), self.finest(of_u))) for of_l, of_u in zip(labeled, unlabeled, strict=True)
        )
        regions = self.label_manager.has_regions
        cps = sum(
            cross_entropy(logits, hard_pseudo_label(other, self.label_manager), regions)
            for logits, other in ((first, second), (second, first))
        )
        return {"cps": self.settings.cps_weight * gaussian_ramp(self.progress) * cps}
