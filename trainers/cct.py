"""Cross-consistency training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.config import ConsistencySettings
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.pseudo_labels import hard_pseudo_label, probabilities
from nnunet_semiseg.networks import feature_perturbation
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet, extra_decoder
from nnunet_semiseg.training.semi_supervised_trainer import SemiSupervisedTrainer

PERTURBATIONS = {
    "noise": feature_perturbation.feature_noise,
    "drop": feature_perturbation.feature_drop,
    "dropout": partial(feature_perturbation.drop_channels, p=0.5),
    "object_mask": feature_perturbation.mask_object,
    "context_mask": feature_perturbation.mask_context,
    "cutout": feature_perturbation.guided_cutout,
}
GUIDED = {"object_mask", "context_mask", "cutout"}
"""those that take the main decoder's foreground"""


@dataclass(frozen=True, kw_only=True)
class CCTSettings(ConsistencySettings):
    perturbations: tuple[str, ...] = ("noise", "drop", "dropout")
    """one auxiliary decoder for each: noise, drop, dropout, object_mask, context_mask, cutout"""

    def __post_init__(self):
        super().__post_init__()
        if not self.perturbations or set(self.perturbations) - set(PERTURBATIONS):
            raise UserError(
                f"setting perturbations={list(self.perturbations)}: must be one or more of {', '.join(PERTURBATIONS)}"
            )


class CCTTrainer(SemiSupervisedTrainer):
    """Ouali et al., "Semi-supervised semantic segmentation with cross-consistency training" (CVPR 2020, 2003.09005).

    A shared encoder, a main decoder that learns from the labels, and auxiliary decoders, each of which reads the
    features of unlabelled samples under a perturbation of its own and has to agree with the main one:

    - eq. 1: L_s, of the main decoder alone: nnU-Net's loss, with deep supervision;
    - eq. 2: L_u = 1/K sum_k MSE(p_k, p_main), the main decoder's output without gradient;
    - eq. 3: L = L_s + w_u(t) L_u.

    Perturbations are those of the paper's section 3.2: noise, drop (of the most active regions), dropout (of whole
    channels), masks of the object or of its context, and cutout within the object's bounding box (one, of all that is
    foreground; the paper has a box an object). Each level of the U-Net draws its own noise and threshold. The default
    three are the ones that volumes' U-Nets are trained with in the field, one decoder each; naming one more often
    gives it more decoders. Left out is the paper's I-VAT. A U-Net's decoder reads skips as well, so these are
    perturbed as the bottleneck is; decoders are the plans' instead of the paper's light ones. The weight is that of
    volumes (0.1; 30 there, for a mean over 21 classes), with a Gaussian ramp.
    """

    settings_class = CCTSettings

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        convolutions = arch_kwargs["n_conv_per_stage_decoder"]
        others = [extra_decoder(network, convolutions, False, finest_only=True) for _ in settings.perturbations]
        return MultiDecoderUNet(network, others)

    def forward_streams(self, batch: dict):
        """The main decoder's output for labelled samples; its logits and the auxiliary ones' for unlabelled ones."""
        n, names = len(batch["data"]), self.settings.perturbations
        images = torch.cat((batch["data"], batch["unlabeled"][self.student_view]))

        def labeled_alone(skips: list[Tensor], outputs: list) -> list[Tensor]:
            return [skip[:n] for skip in skips]

        def unlabeled_alone(skips: list[Tensor], outputs: list) -> list[Tensor]:
            return [skip[n:].detach() for skip in skips]

        # unlabelled samples on their own: the main decoder needs no backward pass for what is a target
        perturbations = (labeled_alone, unlabeled_alone, *(partial(self.perturb, name, n) for name in names))
        labeled, main, *others = self.network(images, None, (0, *range(len(names) + 1)), perturbations)
        return labeled, (self.finest(main).detach(), others)

    def perturb(self, name: str, n: int, skips: list[Tensor], outputs: list) -> list[Tensor]:
        """The unlabelled samples' features, perturbed on every level."""
        arguments = ()
        if name in GUIDED:
            decision = hard_pseudo_label(self.finest(outputs[1]), self.label_manager)
            arguments = ((decision > 0).any(1, keepdim=True),)  # where anything is
        return [PERTURBATIONS[name](skip[n:], *arguments) for skip in skips]

    def semi_losses(self, labeled, unlabeled, batch: dict) -> dict[str, Tensor]:
        logits, others = unlabeled
        main = probabilities(logits, self.label_manager)
        distances = [F.mse_loss(probabilities(other, self.label_manager), main) for other in others]
        weight = self.settings.consistency_weight * self.settings.ramp(self.progress)
        return {"consistency": weight * sum(distances) / len(distances)}
