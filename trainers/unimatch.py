"""UniMatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nnunet_semiseg.config import MatchSettings, require
from nnunet_semiseg.losses.pseudo_labels import confidence, hard_pseudo_label, probabilities, weighted_loss
from nnunet_semiseg.networks.feature_perturbation import draw_box, drop_channels
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.training.semi_supervised_trainer import SemiSupervisedTrainer

BOX_VOLUME = (0.02, 0.4)
"""of CutMix, as a share of the patch's"""


@dataclass(frozen=True, kw_only=True)
class UniMatchSettings(MatchSettings):
    feature_dropout: float = 0.5
    """p of the channel dropout of the feature stream"""
    cutmix: float = 0.5
    """how often a strong view gets a box of another sample"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "feature_dropout", minimum=0, maximum=0.99)
        require(self, "cutmix", minimum=0, maximum=1)


class UniMatchTrainer(SemiSupervisedTrainer):
    """Yang et al., "Revisiting weak-to-strong consistency in semi-supervised semantic segmentation" (UniMatch).

    CVPR 2023, arXiv 2208.09910. FixMatch with two strong views of each sample and a stream whose features, of the
    weak view, are perturbed by channel dropout (eq. 3 to 6):

        L = L_x + L_u, L_u = 1/2 L(fp) + 1/4 (L(s1) + L(s2)) (there half of it),

    L(.) the loss towards the decision on the weak view, where its probability is at least 0.95. Strong views have
    nnU-Net's intensity augmentation and CutMix, the pseudo-labels are cut alike. All of a step's images go through
    the encoder once and together; the weak view's features give both the pseudo-label, by a pass of the decoder that
    is not followed by a backward one, and the feature stream. L is Dice + CE, each voxel weighted by whether it is
    certain (paper: CE; their medical code: Dice). A box has the patch's aspect, and is the same for all samples of a
    view; with a single unlabelled sample in a batch nothing is mixed.
    """

    settings_class = UniMatchSettings
    views = ("weak", "strong_1", "strong_2")

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network)

    def forward_streams(self, batch: dict):
        """The labelled output; the logits of the weak view, of both strong ones, and of the weak one's features."""
        unlabeled, n = batch["unlabeled"], len(batch["data"])
        n_u = len(unlabeled["weak"])
        self.boxes = [self.draw_box(unlabeled["weak"]) for _ in range(2)]
        strong = [self.cut_mix(unlabeled[f"strong_{i}"], box) for i, box in enumerate(self.boxes, 1)]
        images = torch.cat((batch["data"], unlabeled["weak"], *strong))

        def weak_alone(skips: list[Tensor], outputs: list) -> list[Tensor]:
            return [skip[n : n + n_u].detach() for skip in skips]

        def weak_dropped(skips: list[Tensor], outputs: list) -> list[Tensor]:
            sizes = (n, n_u, 2 * n_u)
            parts = (skip.split(sizes) for skip in skips)
            return [torch.cat((x, drop_channels(w, self.settings.feature_dropout), s)) for x, w, s in parts]

        # the weak view on its own: a pseudo-label needs no backward pass through the decoder
        weak, output = self.network(images, None, (0, 0), (weak_alone, weak_dropped))
        perturbed, *strong = self.finest(output)[n:].split(n_u)
        return tree_map(lambda t: t[:n], output), (self.finest(weak).detach(), *strong, perturbed)

    def draw_box(self, x: Tensor) -> Tensor:
        """The box of CutMix, in some steps empty."""
        low, high = BOX_VOLUME
        volume = (torch.rand(()) < self.settings.cutmix) * (low + (high - low) * torch.rand(()))
        return draw_box(x, float(volume) ** (1 / (x.ndim - 2)))

    def cut_mix(self, x: Tensor, box: Tensor) -> Tensor:
        """Another sample's x within the box."""
        return torch.where(box, x.roll(1, 0), x)

    def semi_losses(self, labeled, unlabeled, batch: dict) -> dict[str, Tensor]:
        weak, *strong, perturbed = unlabeled
        target = hard_pseudo_label(weak, self.label_manager)
        certain = confidence(probabilities(weak, self.label_manager), self.label_manager)
        weight = (certain >= self.settings.match_threshold).float()

        def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
            return self.settings.match_weight * weighted_loss(self.finest_loss, logits, target, weight)

        terms = {"feature": 0.5 * loss(perturbed, target, weight)}
        for i, (logits, box) in enumerate(zip(strong, self.boxes, strict=True), 1):
            terms[f"strong_{i}"] = 0.25 * loss(logits, self.cut_mix(target, box), self.cut_mix(weight, box))
        return terms
