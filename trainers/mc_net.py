"""MC-Net+."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.config import OptionalTextSettings, require
from nnunet_semiseg.losses.pseudo_labels import probabilities
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet, extra_decoder
from nnunet_semiseg.networks.text_guidance import text_guidance_for
from nnunet_semiseg.training.schedules import gaussian_ramp
from nnunet_semiseg.training.semi_supervised_trainer import SemiSupervisedTrainer, split_streams

UPSAMPLING = ("linear", "nearest")
"""of the second and the third decoder; the plans' own has transposed convolutions"""


@dataclass(frozen=True, kw_only=True)
class MCNetSettings(OptionalTextSettings):
    supervised_weight: float = 0.5
    """lambda, of the sum of the decoders' supervised losses"""
    mutual_weight: float = 1.0
    """beta, of the mutual consistency, at the end of the ramp"""
    sharpening: float = 0.1
    """the temperature T"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("supervised_weight", "mutual_weight"):
            require(self, name, minimum=0)
        require(self, "sharpening", minimum=1e-3, maximum=1)


class MCNetTrainer(SemiSupervisedTrainer):
    """Wu et al., "Mutual consistency learning for semi-supervised medical image segmentation" (MC-Net+).

    Medical Image Analysis 2022, arXiv 2109.09960. A shared encoder and three decoders that differ in how they
    upsample: transposed convolutions, linear and nearest interpolation.

    - sharpening: p* = p^(1/T) / (p^(1/T) + (1 - p)^(1/T)), T = 0.1; for several classes p^(1/T) over its sum over
      them, which is the softmax of logits / T;
    - L_mc = sum over decoders i != j of MSE(p_i, p*_j), over labelled and unlabelled samples;
    - L = lambda sum_i L_seg(i) + beta L_mc, lambda = 0.5, beta a Gaussian ramp to 1 over the training.

    Where the source is silent, or its code differs: p* gets no gradient, as it stands for a label; L_seg is nnU-Net's
    (their code: Dice alone); the ramp is as long as the training (their code: 40 % of it). The decoder with transposed
    convolutions is deployed.
    """

    settings_class = MCNetSettings

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        convolutions = arch_kwargs["n_conv_per_stage_decoder"]
        others = [extra_decoder(network, convolutions, deep_supervision, kind) for kind in UPSAMPLING]
        return MultiDecoderUNet(network, others, text_guidance_for(network, settings))

    def forward_streams(self, batch: dict):
        """Per stream the outputs of the three decoders."""
        images = torch.cat((batch["data"], batch["unlabeled"][self.student_view]))
        return split_streams(self.decode(self.network, images, (0, 1, 2)), len(batch["data"]))

    def supervised_losses(self, labeled, batch: dict) -> dict[str, Tensor]:
        weight = self.settings.supervised_weight
        return {f"supervised_{i}": weight * self.loss(output, batch["target"]) for i, output in enumerate(labeled, 1)}

    def semi_losses(self, labeled, unlabeled, batch: dict) -> dict[str, Tensor]:
        both = zip(labeled, unlabeled, strict=True)
        logits = [torch.cat((self.finest(of_l), self.finest(of_u))) for of_l, of_u in both]
        p = [probabilities(x, self.label_manager) for x in logits]
        sharpened = [probabilities(x.detach().float() / self.settings.sharpening, self.label_manager) for x in logits]
        mutual = sum(F.mse_loss(p[i], sharpened[j]) for i, j in permutations(range(len(p)), 2))
        return {"mutual": self.settings.mutual_weight * gaussian_ramp(self.progress) * mutual}
