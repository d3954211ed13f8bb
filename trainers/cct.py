"""Cross-consistency training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.pseudo_labels import hard_pseudo_label, probabilities
from nnunet_semiseg.networks import feature_perturbation
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet, extra_decoder
from nnunet_semiseg.settings.base import ConsistencySettings
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
"""those that take the main decoder's foreground"""


@dataclass(frozen=True, kw_only=True)
class CCTSettings(ConsistencySettings):
    """Settings of `CCTTrainer`."""

    perturbations: tuple[str, ...] = ("noise", "drop", "dropout")
    """one auxiliary decoder for each: noise, drop, dropout, object_mask, context_mask, cutout"""

    def __post_init__(self):
        super().__post_init__()
        if not self.perturbations or set(self.perturbations) - set(PERTURBATIONS):
            raise UserError(
                f"setting perturbations={list(self.perturbations)}: must be one or more of {', '.join(PERTURBATIONS)}"
            )


class CCTTrainer(SemiSupervisedTrainer[CCTSettings]):
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

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        convolutions = arch_kwargs["n_conv_per_stage_decoder"]
        others = [extra_decoder(network, convolutions, False, finest_only=True) for _ in settings.perturbations]
        return MultiDecoderUNet(network, others, recompute=settings.memory == "stock")

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        network, names = self.bare_network, self.settings.perturbations
        encoded = self.each(network.encode, batch.images, batch.views["strong"])
        yield {"supervised": self.loss(network.decode(next(encoded).skips), batch.target)}
        weight = self.settings.consistency_weight * self.settings.ramp(self.progress) / len(names)
        with self.shared(next(encoded).skips) as skips:
            with self.without_gradients():  # a target needs no backward pass through the main decoder
                logits = self.finest(network.decode(skips))
                main = probabilities(logits, self.label_manager)
                foreground = (hard_pseudo_label(logits, self.label_manager) > 0).any(1, keepdim=True)
                del logits
            for i, name in enumerate(names, 1):
                arguments = (foreground,) if name in GUIDED else ()
                perturbed = [PERTURBATIONS[name](skip, *arguments) for skip in skips]
                p = probabilities(network.decode(perturbed, i), self.label_manager)
                del perturbed
                yield {"consistency": weight * F.mse_loss(p, main)}
                del p
