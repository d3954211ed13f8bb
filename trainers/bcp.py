"""Bidirectional copy-paste."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor
from torch.utils._pytree import tree_map

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.pseudo_labels import (
    hard_pseudo_label,
    has_label,
    keep_largest_component,
    weighted_loss,
)
from nnunet_semiseg.networks.feature_perturbation import draw_box, on_grid_of
from nnunet_semiseg.settings.base import TeacherSettings, require
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.checks import check_there_are_pairs
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.training.teacher import update_teacher


@dataclass(frozen=True, kw_only=True)
class BCPSettings(TeacherSettings):
    """Settings of `BCPTrainer`."""

    pretraining: float = 2 / 17
    """share of the training before unlabelled samples come in; the paper's 2,000 of 17,000 iterations"""
    box: float = 2 / 3
    """beta, the box's sides as a share of the patch's"""
    bcp_weight: float = 0.5
    """alpha, of voxels with pseudo-labels"""
    largest_component: bool = False
    """keep the largest component of a class's pseudo-label: right for one organ, wrong for lesions"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "bcp_weight", minimum=0)
        for name in ("pretraining", "box"):
            require(self, name, minimum=0, maximum=1)


class BCPTrainer(SemiSupervisedTrainer[BCPSettings]):
    """Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation" (CVPR 2023, 2305.00673).

    With M = 0 in a box at a random place, whose sides are 2/3 of the patch's, and 1 around it:

    - eq. 1 and 2: X_in = x_l M + x_u (1 - M), X_out = x_u' M + x_l (1 - M), x_u' another sample's than x_u;
    - eq. 4 to 6: the targets are mixed alike, of labels and of the teacher's decisions; L = L_in + L_out, each the
      loss where the label is true plus alpha = 0.5 times that where it is a pseudo-label;
    - before that, a phase of pre-training on mixes of two labelled samples; the teacher begins as its end.

    Where we depart: the pre-training's last weights go on (theirs: the best on the test set), with the same optimizer
    and learning rate schedule; the teacher sees weak views, the mixes are of strong ones; X_in and X_out have the same
    x_l; labels have nnU-Net's deep supervision, pseudo-labels the full resolution alone; the largest component is
    a setting (theirs: always), as it is wrong for lesions and costs time on the CPU. Of more unlabelled samples than
    labelled ones, one more is used. With a single sample of each x_u' is x_u, and the pre-training mixes nothing.
    A training that is resumed with another length keeps the end of its pre-training.
    """

    views = ("weak", "strong")

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        check_there_are_pairs(self.settings, plans, configuration, "BCP")
        return super().prepare(plans, configuration, fold, dataset_json)

    def initialize(self):
        super().initialize()
        first = ceil(self.settings.pretraining * self.num_epochs * self.num_iterations_per_epoch)
        self.method_state["first_step"] = torch.tensor(first)
        self.method_state["pretraining"] = torch.tensor(self.settings.pretraining, dtype=torch.float64)

    def load_checkpoint(self, checkpoint) -> None:
        super().load_checkpoint(checkpoint)
        if (before := self.method_state["pretraining"].item()) != self.settings.pretraining:
            raise UserError(
                f"{self.output_folder}: its pretraining was {before:g}: set it back with --set, or train again"
                " without --c"
            )

    @property
    def first_step(self) -> int:
        """The first that unlabelled samples take part in; it is on the CPU, so that nothing waits."""
        return int(self.method_state["first_step"])

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        x_l, target = batch.images, batch.target
        box = draw_box(x_l, self.settings.box)
        if self.step < self.first_step:
            mixed = tree_map(lambda t: paste(box, t.roll(1, 0), t), target)
            yield {
                "supervised": self.loss(self.network(paste(box, x_l.roll(1, 0), x_l)), mixed),
                "pseudo": x_l.new_zeros(()),
            }
            return
        if self.step == self.first_step:
            update_teacher(self.teacher, self.network, 0, self.settings.ema_decay)  # begins as a copy
        x_u, other = pairs(batch.views["strong"], len(x_l))
        label, other_label = pairs(self.pseudo_label(batch.views["weak"][: len(x_l) + 1]), len(x_l))
        outputs = self.each(self.network, paste(box, x_u, x_l), paste(box, x_l, other))
        for labeled, pseudo_label in ((~box, label), (box, other_label)):  # inwards, outwards: eq. 5 and 6
            with self.shared(next(outputs)) as output:
                yield {"supervised": self.loss_where(labeled, output, target)}
                loss = self.loss_where(~labeled, self.finest(output), pseudo_label)
                yield {"pseudo": self.settings.bcp_weight * loss}

    @torch.no_grad()
    def pseudo_label(self, images: Tensor) -> Tensor:
        """The teacher's decision."""
        label = hard_pseudo_label(self.teacher(images), self.label_manager)
        return keep_largest_component(label, self.label_manager) if self.settings.largest_component else label

    def loss_where(self, mask: Tensor, output, target) -> Tensor:
        """nnU-Net's loss over the voxels of a mask (1, 1, *S); of lists on every grid, as its deep supervision is."""

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            known = has_label(target, self.label_manager)
            weight = (on_grid_of(logits, mask) & known).float()
            target = torch.where(known, target, 0)
            return weighted_loss(self.finest_loss, logits, target, weight / weight.mean().clamp_min(1e-6))

        if isinstance(output, (list, tuple)):
            return DeepSupervisionWrapper(loss, self.loss.weight_factors)(output, target)
        return loss(output, target)


def pairs(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first n samples, and for each of them another: the one before it, of the first the one behind the last."""
    x = x[: n + 1]
    return x[:n], x.roll(1, 0)[:n]


def paste(box: Tensor, x: Tensor, into: Tensor) -> Tensor:
    """x within the box (1, 1, *S), the other around it; on a coarser grid the box is, too. Shape: (B, C, *s)."""
    return torch.where(on_grid_of(x, box), x, into)
