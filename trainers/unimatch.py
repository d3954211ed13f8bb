"""UniMatch (CVPR 2023): FixMatch with two strong views and perturbed features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_semiseg.losses.copy_paste import cut_mix, draw_box
from nnunet_semiseg.losses.segmentation import confidence, probabilities, weighted_loss
from nnunet_semiseg.networks.feature_perturbation import drop_channels
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import Dropout, MatchSettings, Share
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer

BOX_VOLUME = (0.02, 0.4)
"""The smallest and the largest volume of the box of CutMix, as shares of the volume of the patch."""


@dataclass(frozen=True, kw_only=True)
class UniMatchSettings(MatchSettings):
    """Settings of `UniMatchTrainer`."""

    feature_dropout: Dropout = 0.5
    """The probability that a channel is dropped in the stream with perturbed features."""
    cutmix: Share = 0.5
    """The probability that a box of another sample is pasted into a strong view."""


class UniMatchTrainer(SemiSupervisedTrainer[UniMatchSettings]):
    """Yang et al., "Revisiting weak-to-strong consistency in semi-supervised semantic segmentation" (UniMatch).

    CVPR 2023, arXiv 2208.09910. FixMatch with two strong views of each sample, and with a feature stream: features of
    the weak view under channel dropout (eq. 3 to 6):

        L = L_x + L_u, L_u = 1/2 L(fp) + 1/4 (L(s1) + L(s2)) (in the paper half of it).

    L(fp) is for the feature stream, L(s1) and L(s2) are for the strong views. Each is the loss towards the decision on
    the weak view, where its probability is at least 0.95. Strong views have nnU-Net's intensity augmentation, flips and
    turns, and CutMix; the pseudo-labels are flipped, turned and cut in the same way. The features of the weak view give
    both the feature stream and the pseudo-label (by a pass of the decoder without gradients). L is Dice + CE, where
    only certain voxels have a weight (paper: CE; their medical code: Dice). It has deep supervision, or with
    `consistency=paper` full resolution only. A box has the shape of the patch and is the same for all samples of a
    view. With one unlabelled sample in a batch nothing is mixed.
    """

    views = ("weak", "strong_1", "strong_2")

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network)

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        network, views = self.bare_network, batch.views
        yield {"supervised": self.loss(self.network(batch.images), batch.target)}

        skips = network.encode(views["weak"]).skips
        target, weight = self.pseudo_label(skips)
        perturbed = network.decode([drop_channels(skip, self.settings.feature_dropout) for skip in skips])
        del skips
        yield {"feature": 0.5 * self.match_loss(perturbed, target, weight)}
        del perturbed

        names = ("strong_1", "strong_2")
        boxes = [self.draw_box(views["weak"]) for _ in names]
        turns = [self.draw_turn() for _ in names]
        strong = [cut_mix(turn(views[name]), box) for name, turn, box in zip(names, turns, boxes, strict=True)]
        outputs = self.each(self.network, *strong)
        for name, turn, box in zip(names, turns, boxes, strict=True):
            loss = self.match_loss(next(outputs), cut_mix(turn(target), box), cut_mix(turn(weight), box))
            yield {name: 0.25 * loss}

    def pseudo_label(self, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The decision for the features `skips`, and a mask of 0 and 1, (B, 1, *S), that says where it is certain."""
        with self.without_gradients():
            logits = self.finest(self.bare_network.decode(skips))
            certain = confidence(probabilities(logits, self.label_manager), self.label_manager)
        return self.decide(logits), (certain >= self.settings.match_threshold).float()

    def match_loss(self, output, target: Tensor, weight: Tensor) -> Tensor:
        """The weighted Dice + CE: with deep supervision, or (`consistency=paper`) at full resolution only."""
        if self.settings.consistency == "paper":
            return self.settings.match_weight * weighted_loss(self.finest_loss, self.finest(output), target, weight)
        return self.settings.match_weight * self.pseudo_loss(output, target, weight)

    def draw_box(self, x: Tensor) -> Tensor:
        """Draw the box of CutMix. In some steps it is empty."""
        low, high = BOX_VOLUME
        volume = (torch.rand(()) < self.settings.cutmix) * (low + (high - low) * torch.rand(()))
        return draw_box(x, float(volume) ** (1 / (x.ndim - 2)))
