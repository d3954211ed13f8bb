"""FixMatch (NeurIPS 2020): pseudo-labels that are certain teach the strong view."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nnunet_semiseg.losses.segmentation import confidence, cross_entropy, probabilities
from nnunet_semiseg.settings.base import MatchSettings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer


class FixMatchTrainer(SemiSupervisedTrainer[MatchSettings]):
    """Sohn et al., "FixMatch: simplifying semi-supervised learning with consistency and confidence" (NeurIPS 2020).

    arXiv 2001.07685, applied to voxels. Eq. 4: L_u is the mean over all voxels of 1(max q >= 0.95) CE(p(strong), argmax
    q). q are the network's own probabilities on the weak view, without gradient. L = L_s + lambda_u L_u, with lambda_u
    = 1 and no ramp, because the threshold acts as one. A batch has as many unlabelled as labelled samples; the setting
    `unlabeled_batch_size` can change that (paper: 7 times as many). L_s is nnU-Net's loss. The strong view has
    nnU-Net's intensity augmentation; it is flipped and turned together with the pseudo-label. For regions a voxel
    counts if all regions are certain.

    With `consistency=paper` L_u is the CE at full resolution. By default it is nnU-Net's Dice + CE with deep
    supervision, where uncertain voxels have weight 0. The Dice is added because the CE is a mean over all voxels, in
    which a few certain foreground voxels have hardly any weight.
    """

    views = ("weak", "strong")

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        turn = self.draw_turn()
        outputs = self.each(self.network, batch.images, turn(batch.views["strong"]))
        yield {"supervised": self.loss(next(outputs), batch.target)}
        with self.without_gradients():
            weak = turn(self.finest(self.network(batch.views["weak"])))
            certain = confidence(probabilities(weak, self.label_manager), self.label_manager)
            weight = (certain >= self.settings.match_threshold).float()
        target = self.decide(weak)
        del weak, certain
        if self.settings.consistency == "paper":
            loss = cross_entropy(self.finest(next(outputs)), target, self.label_manager.has_regions, weight)
        else:
            loss = self.pseudo_loss(next(outputs), target, weight)
        yield {"unsupervised": self.settings.match_weight * loss}
