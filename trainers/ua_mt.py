"""UA-MT (MICCAI 2019): a Mean Teacher whose consistency counts only where the teacher is certain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.losses.segmentation import entropy, probabilities
from nnunet_semiseg.networks.feature_perturbation import drop_channels
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import (
    ConsistencySettings,
    Dropout,
    OptionalTextSettings,
    PseudoLabelSettings,
    TeacherSettings,
    TurnSettings,
)
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.plans_trainer import bare
from nnunet_semiseg.training.text_guided import TextGuidedTrainer


@dataclass(frozen=True, kw_only=True)
class UAMTSettings(ConsistencySettings, OptionalTextSettings, TeacherSettings, PseudoLabelSettings, TurnSettings):
    """Settings of `UAMTTrainer`. The weight of the loss and the threshold of uncertainty have the same ramp."""

    mc_passes: Annotated[int, Bounds(0)] = 8
    """The number of passes with dropout that measure where the teacher is certain. With 0 the teacher counts as certain
    everywhere."""
    mc_dropout: Dropout = 0.5
    """The dropout probability at the bottleneck, in the student and in the passes that measure where the teacher is
    certain."""
    input_noise: Annotated[float, Bounds(0)] = 0.1
    """The standard deviation of the noise on the images in the passes that measure where the teacher is certain. Noise
    beyond twice this value is cut off."""


class UAMTTrainer(TextGuidedTrainer[UAMTSettings]):
    """Yu et al., "Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation".

    MICCAI 2019, arXiv 1907.07034. A Mean Teacher whose consistency counts only where the teacher is certain:

    - eq. 2: mu is the mean of p over T = 8 passes of the teacher, each with dropout and with noise on the image;
      u = -sum mu log mu;
    - eq. 3: L_c = sum 1(u < H) ||p_student - p_teacher||^2 / sum 1(u < H), over the unlabelled samples. The threshold H
      grows from 3/4 of the largest possible entropy to all of it, with the same Gaussian ramp as the weight of L_c.

    The student sees the strong view, and the teacher the weak one; its target has no noise and no dropout. In the paper
    both see the same view with different noise, and L_c also covers labelled samples (in their later code it does not).
    Their V-Net has dropout at the bottleneck and before the head. nnU-Net's networks have none, so we add dropout of
    whole channels, as in their code, at the bottleneck. For more than two classes the distance is the mean over them.
    Each region is judged by its own entropy.

    With `consistency=paper` L_c is eq. 3, its weight ends at 0.1, and the ramp is as long as the training. By default
    L_c is nnU-Net's loss with deep supervision towards the teacher's decision, in which uncertain voxels have the
    weight 0 (for regions: where any of them is uncertain). Its weight ends at 1, and the student's view is flipped and
    turned.
    """

    views = ("weak", "strong")

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network)

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        network = self.bare_network

        def student(images: Tensor):
            skips, aligned = network.encode(images, text)
            return network.decode(self.drop(skips)), aligned

        turn = self.draw_turn()
        ramp = self.settings.ramp(self.progress)
        teacher: Any = None
        certain: Any = None
        streams = batch.streams("strong")
        outputs = self.each(student, *(images if target is not None else turn(images) for images, target, _ in streams))
        for _, target, share in streams:
            if target is None:
                teacher, certain = (turn(x) for x in self.ask_teacher(batch.views["weak"], ramp))
            output, aligned = next(outputs)
            logits = self.finest(output)
            terms = self.cog(aligned, logits, text, share)
            if target is None:
                loss = self.distance(output, teacher, certain)
                terms["consistency"] = self.settings.weight(self.progress) * loss
            else:
                terms["supervised"] = self.loss(output, target)
            del output, aligned, logits
            yield terms

    def distance(self, output, teacher: Tensor, certain: Tensor) -> Tensor:
        """The consistency loss of the student's output. Voxels where the teacher is uncertain have the weight 0.

        It is nnU-Net's loss towards the teacher's decision; with `consistency=paper`, the squared difference of the
        probabilities, as a mean over the other voxels.

        Args:
            teacher: the logits of the teacher, (B, heads, *S).
            certain: (B, 1 or heads, *S), bool.
        """
        decision = self.decide(teacher)
        if self.settings.consistency == "paper":
            student, teacher = (probabilities(x, self.label_manager) for x in (self.finest(output), teacher))
            return masked_mse(student, teacher, certain)
        return self.pseudo_loss(output, decision, certain.all(1, keepdim=True).float())

    @torch.no_grad()
    def ask_teacher(self, images: Tensor, ramp: float) -> tuple[Tensor, Tensor]:
        """The logits of the teacher (B, heads, *S), and where the teacher is certain: (B, 1 or heads, *S), bool."""
        regions, passes = self.label_manager.has_regions, self.settings.mc_passes
        teacher = self.teacher(images)
        if not passes:
            return teacher, torch.ones_like(teacher[:, :1], dtype=torch.bool)
        mean = self.sample(images)
        for _ in range(passes - 1):
            mean += self.sample(images)
        greatest = math.log(2 if regions else teacher.shape[1])
        return teacher, entropy(mean / passes, regions) < (0.75 + 0.25 * ramp) * greatest

    def sample(self, images: Tensor) -> Tensor:
        """The teacher's probabilities from one pass with dropout and noise."""
        std, teacher = self.settings.input_noise, bare(self.teacher)
        noise = (std * torch.randn_like(images)).clamp(-2 * std, 2 * std)
        skips = teacher.encode(images + noise).skips
        return probabilities(teacher.decode(self.drop(skips)), self.label_manager)

    def drop(self, skips: list[Tensor]) -> list[Tensor]:
        return [*skips[:-1], drop_channels(skips[-1], self.settings.mc_dropout)]


def masked_mse(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """The mean squared difference of two tensors (B, heads, *S) over a mask (B, 1 or heads, *S).

    It is 0 if the mask is empty.
    """
    squared = (a - b).square() * mask
    return squared.sum() / mask.expand_as(squared).sum().clamp_min(1)
