"""Cross pseudo supervision (CVPR 2021): two networks teach each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from nnunet_semiseg.losses.segmentation import cross_entropy
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import ConsistencySettings, OptionalTextSettings, PseudoLabelSettings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.text_guided import TextGuidedTrainer
from nnunet_semiseg.training.two_networks import TwoNetworkTrainer


@dataclass(frozen=True, kw_only=True)
class CPSSettings(ConsistencySettings, OptionalTextSettings, PseudoLabelSettings):
    """Settings of `CPSTrainer`; `consistency_weight` is lambda in its docstring.

    With as many unlabelled as labelled samples, the paper's loss needs twice the paper's lambda here.
    """


class CPSTrainer(TwoNetworkTrainer[CPSSettings], TextGuidedTrainer[CPSSettings]):
    """Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision" (CVPR 2021, 2106.01226).

    Two networks have the same architecture and different initial weights. L = L_s + lambda L_cps.

    - eq. 3: L_s is the loss of both networks on the labelled samples: nnU-Net's, with deep supervision;
    - eq. 4: L_cps = CE(p_1, y_2) + CE(p_2, y_1), y_i the decision of network i, at full resolution. It is one mean over
      labelled and unlabelled samples. (The paper adds two means, which is twice as much if both are equally many.)

    The paper's lambda is 1.5 (VOC) or 6 (Cityscapes) from the first step on; its networks are pre-trained on ImageNet.
    With random weights that would teach noise. So with `consistency=paper` L_cps is eq. 4 with what is usual for
    volumes: the weight 0.1 and a Gaussian ramp over the training. By default L_cps is nnU-Net's Dice + CE with deep
    supervision, and its weight reaches 1 after 0.4 of the training.
    """

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        weight = self.settings.weight(self.progress)
        for images, target, share in batch.streams("strong"):
            passes = [partial(predict, network, images, text) for network in self.networks]
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
        """The decision of one network, which the other network learns. `counts`: whether the log counts its classes."""
        return self.decide(self.finest(prediction[0]), counts)


def predict(network: MultiDecoderUNet, images: Tensor, text: Tensor | None):
    """The network's output, and the features for `category_alignment_loss` (None without text)."""
    skips, aligned = network.encode(images, text)
    return network.decode(skips), aligned
