"""The recipe: one network on nnU-Net's plans that configures itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.utils._pytree import tree_map

from nnunet_semiseg.losses.copy_paste import draw_box, pairs, paste
from nnunet_semiseg.settings.base import PseudoLabelSettings, TeacherSettings, TurnSettings, require
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.checks import check_there_are_pairs
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class SemiSegSettings(TeacherSettings, PseudoLabelSettings, TurnSettings):
    """Settings of `SemiSegTrainer`."""

    deploy: Literal["student", "teacher"] = "teacher"
    """whose weights validation and prediction use"""
    warm_up: float = 0.1
    """share of the training with labels only"""
    ramp: float = 0.2
    """share of the training, after the warm-up, over which the weight of pseudo-labels grows"""
    first_weight: float = 0.5
    """of pseudo-labelled voxels, at the end of the warm-up"""
    pseudo_weight: float = 1.0
    """of pseudo-labelled voxels, at the end of the ramp"""
    box: float = 2 / 3
    """the box's sides, as a share of the patch's"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("warm_up", "ramp", "box"):
            require(self, name, minimum=0, maximum=1)
        for name in ("first_weight", "pseudo_weight"):
            require(self, name, minimum=0)

    def weight(self, progress: float) -> float:
        """Of pseudo-labelled voxels at this share of the training: linear between both ends of the ramp."""
        share = min(max(progress - self.warm_up, 0.0) / max(self.ramp, 1e-9), 1.0)
        return self.first_weight + (self.pseudo_weight - self.first_weight) * share


class SemiSegTrainer(SemiSupervisedTrainer[SemiSegSettings]):
    """One network, its EMA teacher, and mixes of labelled and unlabelled patches."""

    views = ("weak", "strong")

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        check_there_are_pairs(self.settings, plans, configuration, "SemiSegTrainer")
        return super().prepare(plans, configuration, fold, dataset_json)

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        x_l, target = batch.images, batch.target
        box = draw_box(x_l, self.settings.box)
        if self.progress < self.settings.warm_up:
            mixed = tree_map(lambda t: paste(box, t.roll(1, 0), t), target)
            yield {
                "supervised": self.loss(self.network(paste(box, x_l.roll(1, 0), x_l)), mixed),
                "pseudo": x_l.new_zeros(()),
            }
            return
        turn = self.draw_turn()
        x_u, other = pairs(turn(batch.views["strong"]), len(x_l))
        label, other_label = pairs(turn(self.decide(self.ask_teacher(batch.views["weak"][: len(x_l) + 1]))), len(x_l))
        outputs = self.each(self.network, paste(box, x_u, x_l), paste(box, x_l, other))
        weight = self.settings.weight(self.progress)
        for labeled, pseudo_label in ((~box, label), (box, other_label)):
            with self.shared(next(outputs)) as output:
                yield {"supervised": self.loss_where(labeled, output, target)}
                yield {"pseudo": weight * self.loss_where(~labeled, output, pseudo_label)}

    def ask_teacher(self, images: Tensor) -> Tensor:
        """The teacher's logits."""
        return self.teacher(images)
