"""Bidirectional copy-paste."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor
from torch.utils._pytree import tree_map

from nnunet_semiseg.config import TeacherSettings, require
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.pseudo_labels import (
    hard_pseudo_label,
    has_label,
    keep_largest_component,
    weighted_loss,
)
from nnunet_semiseg.networks.feature_perturbation import draw_box, on_grid_of
from nnunet_semiseg.training.checks import check_there_are_pairs
from nnunet_semiseg.training.semi_supervised_trainer import SemiSupervisedTrainer, split_streams
from nnunet_semiseg.training.teacher import update_teacher


@dataclass(frozen=True, kw_only=True)
class BCPSettings(TeacherSettings):
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


class BCPTrainer(SemiSupervisedTrainer):
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

    settings_class = BCPSettings
    views = ("weak", "strong")

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        check_there_are_pairs(self.settings, plans, configuration, "BCP")
        return super().prepare(plans, configuration, fold, dataset_json)

    def initialize(self):
        super().initialize()
        first = ceil(self.settings.pretraining * self.num_epochs * self.num_iterations_per_epoch)
        self.method_state["first_step"] = torch.tensor(first)
        self.method_state["pretraining"] = torch.tensor(self.settings.pretraining, dtype=torch.float64)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        if (before := self.method_state["pretraining"].item()) != self.settings.pretraining:
            raise UserError(
                f"{filename_or_checkpoint}: its pretraining was {before:g}: set it back with --set, or train again"
                " without --c"
            )

    @property
    def first_step(self) -> int:
        """The first that unlabelled samples take part in; it is on the CPU, so that nothing waits."""
        return int(self.method_state["first_step"])

    def forward_streams(self, batch: dict):
        """In the pre-training the output and None; then twice those of X_in and X_out, which both hold both streams."""
        x_l = batch["data"]
        self.box = draw_box(x_l, self.settings.box)
        if self.step < self.first_step:
            return self.network(paste(self.box, x_l.roll(1, 0), x_l)), None
        if self.step == self.first_step:
            update_teacher(self.teacher, self.network, 0, self.settings.ema_decay)  # begins as a copy
        x_u, other = pairs(batch["unlabeled"]["strong"], len(x_l))
        mixes = torch.cat((paste(self.box, x_u, x_l), paste(self.box, x_l, other)))
        both = split_streams(self.network(mixes), len(x_l))
        return both, both

    def supervised_losses(self, labeled, batch: dict) -> dict[str, Tensor]:
        target = batch["target"]
        if self.step < self.first_step:
            mixed = tree_map(lambda t: paste(self.box, t.roll(1, 0), t), target)
            return {"supervised": self.loss(labeled, mixed)}
        inwards, outwards = labeled
        loss = self.loss_where(~self.box, inwards, target) + self.loss_where(self.box, outwards, target)
        return {"supervised": loss}

    def semi_losses(self, labeled, unlabeled, batch: dict) -> dict[str, Tensor]:
        if unlabeled is None:
            return {"pseudo": self.box.new_zeros((), dtype=torch.float32)}
        with torch.no_grad():
            n = len(batch["data"])
            label = hard_pseudo_label(self.teacher(batch["unlabeled"]["weak"][: n + 1]), self.label_manager)
        if self.settings.largest_component:
            label = keep_largest_component(label, self.label_manager)
        label, other = pairs(label, n)
        inwards, outwards = map(self.finest, unlabeled)
        loss = self.loss_where(self.box, inwards, label) + self.loss_where(~self.box, outwards, other)
        return {"pseudo": self.settings.bcp_weight * loss}

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
