"""The base of methods with two networks that teach each other."""

from __future__ import annotations

from typing import Any, TypeVar

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn

from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import SemiSupervisedSettings
from nnunet_semiseg.training.passes import compile_parts, run_in_bfloat16, run_sample_by_sample
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer

S = TypeVar("S", bound=SemiSupervisedSettings)


class TwoNetworkTrainer(SemiSupervisedTrainer[S]):
    """The base class of methods with two networks. Both are the network of the plans, with different initial weights.

    The first network is deployed. The second one is trained beside it and saved, so that the training can be resumed.
    nnU-Net's `-pretrained_weights` go into the first network only, because the two have to differ.
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

    @property
    def networks(self) -> tuple[Any, Any]:
        """The network that is deployed, and the other one."""
        return self.bare_network, self.auxiliary["second"]
