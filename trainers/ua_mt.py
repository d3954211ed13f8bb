"""Uncertainty-aware mean teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_semiseg.config import ConsistencySettings, OptionalTextSettings, TeacherSettings, require
from nnunet_semiseg.losses.pseudo_labels import entropy, probabilities
from nnunet_semiseg.networks.feature_perturbation import drop_channels
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.networks.text_guidance import text_guidance_for
from nnunet_semiseg.training.semi_supervised_trainer import SemiSupervisedTrainer, split_streams


@dataclass(frozen=True, kw_only=True)
class UAMTSettings(ConsistencySettings, OptionalTextSettings, TeacherSettings):
    mc_passes: int = 8
    """0: everywhere is certain"""
    mc_dropout: float = 0.5
    """of the bottleneck, in the student and in the teacher's passes"""
    input_noise: float = 0.1
    """standard deviation of what is added to the teacher's images, cut off at twice that"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("input_noise", "mc_passes"):
            require(self, name, minimum=0)
        require(self, "mc_dropout", minimum=0, maximum=0.99)


class UAMTTrainer(SemiSupervisedTrainer):
    """Yu et al., "Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation".

    MICCAI 2019, arXiv 1907.07034. Mean Teacher, whose consistency counts only where the teacher is certain:

    - eq. 2: mu = the mean of p over T = 8 passes of the teacher, each with dropout and noise on the image;
      u = -sum mu log mu;
    - eq. 3: L_c = sum 1(u < H) ||p_student - p_teacher||^2 / sum 1(u < H), over the unlabelled samples, with the
      threshold H from 3/4 to all of the greatest entropy, by the same Gaussian ramp as the weight of L_c.

    The student sees the strong view, the teacher the weak one, for its target without noise and dropout; in the paper
    both see the same with other noise, and labelled samples take part in L_c (in their later code they do not). Their
    V-Net has dropout at the bottleneck and before the head: nnU-Net's networks have none, so it is put on the
    bottleneck, of whole channels as in their code. For more than two classes the distance is the mean over them; a
    region is judged by its own entropy.
    """

    settings_class = UAMTSettings
    views = ("weak", "strong")

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network, guidance=text_guidance_for(network, settings))

    def drop(self, skips: list[Tensor], outputs: list) -> list[Tensor]:
        return [*skips[:-1], drop_channels(skips[-1], self.settings.mc_dropout)]

    def forward_streams(self, batch: dict):
        images = torch.cat((batch["data"], batch["unlabeled"][self.student_view]))
        (output,) = self.decode(self.network, images, (0,), (self.drop,))
        return split_streams(output, len(batch["data"]))

    def semi_losses(self, labeled, unlabeled, batch: dict) -> dict[str, Tensor]:
        ramp = self.settings.ramp(self.progress)
        with torch.no_grad():
            images, regions = batch["unlabeled"]["weak"], self.label_manager.has_regions
            teacher = probabilities(self.teacher(images), self.label_manager)
            passes = self.settings.mc_passes
            mean = sum(self.sample(images) for _ in range(passes)) / max(passes, 1)
            uncertainty = entropy(mean, regions) if passes else torch.zeros_like(teacher[:, :1])
            greatest = math.log(2 if regions else teacher.shape[1])
            certain = uncertainty < (0.75 + 0.25 * ramp) * greatest
        student = probabilities(self.finest(unlabeled), self.label_manager)
        weight = self.settings.consistency_weight * ramp
        return {"consistency": weight * masked_mse(student, teacher, certain)}

    def sample(self, images: Tensor) -> Tensor:
        """Probabilities of one pass with dropout and noise."""
        std = self.settings.input_noise
        noise = (std * torch.randn_like(images)).clamp(-2 * std, 2 * std)
        (logits,) = self.teacher(images + noise, None, (0,), (self.drop,))
        return probabilities(logits, self.label_manager)


def masked_mse(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """The mean squared difference of (B, heads, *S), where the mask (B, 1 or heads, *S) is True; 0 where nowhere."""
    squared = (a - b).square() * mask
    return squared.sum() / mask.expand_as(squared).sum().clamp_min(1)
