"""Cross-consistency training (CVPR 2020): perturbed decoders agree with the main one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.segmentation import hard_pseudo_label, probabilities
from nnunet_semiseg.networks import feature_perturbation
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet, extra_decoder
from nnunet_semiseg.settings.base import ConsistencySettings, PseudoLabelSettings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer

PERTURBATIONS = {
    "noise": feature_perturbation.feature_noise,
    "drop": feature_perturbation.feature_drop,
    "dropout": partial(feature_perturbation.drop_channels, p=0.5),
    "object_mask": feature_perturbation.mask_object,
    "context_mask": feature_perturbation.mask_context,
    "cutout": feature_perturbation.guided_cutout,
}
GUIDED = {"object_mask", "context_mask", "cutout"}
"""The perturbations that need the foreground that the main decoder finds."""


@dataclass(frozen=True, kw_only=True)
class CCTSettings(ConsistencySettings, PseudoLabelSettings):
    """Settings of `CCTTrainer`."""

    paper_weight: ClassVar[float] = 30.0
    paper_ramp: ClassVar[float] = 0.1

    perturbations: tuple[str, ...] = ("noise", "drop", "dropout")
    """The perturbations of the features, with an auxiliary decoder for each. Choose from noise, drop, dropout,
    object_mask, context_mask and cutout."""

    def __post_init__(self):
        super().__post_init__()
        if not self.perturbations or set(self.perturbations) - set(PERTURBATIONS):
            raise UserError(
                f"setting perturbations={list(self.perturbations)}: must be one or more of {', '.join(PERTURBATIONS)}"
            )


class CCTTrainer(SemiSupervisedTrainer[CCTSettings]):
    """Ouali et al., "Semi-supervised semantic segmentation with cross-consistency training" (CVPR 2020, 2003.09005).

    One encoder is shared. The main decoder learns from the labels. Each auxiliary decoder reads the features of
    unlabelled samples under its own perturbation, and learns to agree with the main decoder:

    - eq. 1: L_s, of the main decoder only: nnU-Net's loss with deep supervision;
    - eq. 2: L_u = 1/K sum_k MSE(p_k, p_main); the main decoder's output gets no gradient;
    - eq. 3: L = L_s + w_u(t) L_u.

    The perturbations are those of section 3.2: noise, drop (of the most active regions), dropout (of whole channels),
    masks of the object or of its context, and cutout within the bounding box of the object (here one box for all
    foreground, in the paper one for each object). Each level of the U-Net has its own random noise and threshold. The
    three defaults are usual for U-Nets of volumes, with one decoder each. To give a perturbation several decoders, name
    it several times. We do not have the paper's I-VAT. A U-Net's decoder also reads skips, so these are perturbed like
    the bottleneck. The decoders are those of the plans, not the paper's light ones.

    With `consistency=paper` L_u is eq. 2 with the paper's weight, 30 after a ramp over a tenth of the training. Then
    the auxiliary decoders learn only from the soft output of the main one, as in the paper. By default we differ: L_u
    is nnU-Net's loss with deep supervision towards the main decoder's decision. The auxiliary decoders also learn from
    the labels, on perturbed features. In each step only one of them does so, in turn, because every pass makes a step
    longer.
    """

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        convolutions, paper = arch_kwargs["n_conv_per_stage_decoder"], settings.consistency == "paper"
        others = [
            extra_decoder(network, convolutions, deep_supervision and not paper, finest_only=paper)
            for _ in settings.perturbations
        ]
        return MultiDecoderUNet(network, others, recompute=settings.memory == "stock")

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        network, names = self.bare_network, self.settings.perturbations
        paper = self.settings.consistency == "paper"
        encoded = self.each(network.encode, batch.images, batch.views["strong"])
        with self.shared(next(encoded).skips) as skips:
            with self.shared(network.decode(skips)) as output:
                yield {"supervised": self.loss(output, batch.target)}
                foreground = self.foreground(hard_pseudo_label(self.finest(output), self.label_manager))
            del output
            if not paper:
                i = int(self.step) % len(names)
                yield {"supervised_other": self.loss(self.perturbed(skips, i, foreground), batch.target)}
        weight = self.settings.weight(self.progress) / len(names)
        with self.shared(next(encoded).skips) as skips:
            with self.without_gradients():  # the target needs no backward pass through the main decoder
                logits = self.finest(network.decode(skips))
            decision = self.decide(logits)
            main = probabilities(logits, self.label_manager) if paper else decision
            foreground = self.foreground(decision)
            del logits, decision
            for i in range(len(names)):
                yield {"consistency": weight * self.distance(self.perturbed(skips, i, foreground), main)}

    def perturbed(self, skips: list[Tensor], i: int, foreground: Tensor):
        """The output of auxiliary decoder i, which reads features under its perturbation."""
        name = self.settings.perturbations[i]
        arguments = (foreground,) if name in GUIDED else ()
        return self.bare_network.decode([PERTURBATIONS[name](skip, *arguments) for skip in skips], i + 1)

    def distance(self, output, main: Tensor) -> Tensor:
        """How far the output of an auxiliary decoder is from that of the main decoder.

        The target is the decision of the main decoder; with `consistency=paper`, its probabilities.
        """
        if self.settings.consistency == "paper":
            return F.mse_loss(probabilities(self.finest(output), self.label_manager), main)
        return self.pseudo_loss(output, main)

    def foreground(self, decision: Tensor) -> Tensor:
        """Where there is any class or region but the background: (B, 1, *S), bool."""
        return (decision > 0).any(1, keepdim=True)
