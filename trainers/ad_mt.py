"""AD-MT (ECCV 2024): two teachers take turns, and the student also learns where they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_semiseg.losses.segmentation import entropy, hard_pseudo_label, probabilities, weighted_loss
from nnunet_semiseg.settings.base import ConsistencySettings, Count, PseudoLabelSettings, TeacherSettings, TurnSettings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.training.teacher import make_teacher, update_teacher


@dataclass(frozen=True, kw_only=True)
class ADMTSettings(ConsistencySettings, TeacherSettings, PseudoLabelSettings, TurnSettings):
    """Settings of `ADMTTrainer`; the teacher that can be deployed is the first."""

    paper_weight: ClassVar[float] = 1.0

    period: Count = 100
    """The number of steps in which one of the two teachers follows the student, before it is the other's turn."""


class ADMTTrainer(SemiSupervisedTrainer[ADMTSettings]):
    """Zhao et al., "Alternate diverse teaching for semi-supervised medical image segmentation" (ECCV 2024, 2311.17325).

    There are a student and two EMA teachers. Only one teacher at a time follows the student, so that the two differ.
    Let p_1 and p_2 be their probabilities on the weak view, and H_1 and H_2 the entropies of these. For each voxel

        p = (exp(-H_1) p_1 + exp(-H_2) p_2) / (exp(-H_1) + exp(-H_2)).

    From the strong view the student learns the decision of p, both where the teachers agree and where they do not.

    Differences from the paper, of which we know the abstract and the idea only: the turns have equal length (theirs are
    random). Both teachers see the same kinds of batches and augmentation (theirs differ). Where the teachers' decisions
    differ, a voxel has the weight 1 - H / max H, with H the entropy of p. L_u is nnU-Net's loss with deep supervision;
    its weight reaches 1 after 0.4 of the training. With `consistency=paper` it is Dice + CE at full resolution only,
    and the ramp is as long as the training. The student's view is flipped and turned.
    """

    views = ("weak", "strong")

    def initialize(self):
        super().initialize()
        # frozen; saved with the modules that are not deployed
        other = self.auxiliary["other_teacher"] = make_teacher(self.bare_network)
        if self._do_i_compile():
            other.compile()

    def on_train_start(self):
        super().on_train_start()
        if self.step == 0:  # weights may have been loaded after the teacher was made
            update_teacher(self.auxiliary["other_teacher"], self.network, 0, self.settings.decay)

    def move_teacher(self) -> None:
        if (self.step - 1) // self.settings.period % 2 == 0:
            super().move_teacher()
        else:
            update_teacher(self.auxiliary["other_teacher"], self.network, self.step, self.settings.decay)

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        turn = self.draw_turn()
        outputs = self.each(self.network, batch.images, turn(batch.views["strong"]))
        yield {"supervised": self.loss(next(outputs), batch.target)}
        decision, weight = (turn(x) for x in self.ask_teachers(batch.views["weak"]))
        yield {"consistency": self.settings.weight(self.progress) * self.taught_loss(next(outputs), decision, weight)}

    def taught_loss(self, output, decision: Tensor, weight: Tensor) -> Tensor:
        """The student's weighted loss: with deep supervision, or (paper) at full resolution only."""
        if self.settings.consistency == "paper":
            return weighted_loss(self.finest_loss, self.finest(output), decision, weight)
        return self.pseudo_loss(output, decision, weight)

    @torch.no_grad()
    def ask_teachers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teachers' common decision as a target, and the weight of each voxel, (B, 1, *S)."""
        regions = self.label_manager.has_regions
        logits = [teacher(images) for teacher in (self.teacher, self.auxiliary["other_teacher"])]
        decisions = [hard_pseudo_label(x, self.label_manager) for x in logits]
        p = combine([probabilities(x, self.label_manager) for x in logits], regions)
        del logits
        certain = 1 - entropy(p, regions) / math.log(2 if regions else p.shape[1])
        differ = (decisions[0] != decisions[1]).any(1, keepdim=True)
        return self.decide(p.logit() if regions else p.log()), torch.where(differ, certain.amin(1, keepdim=True), 1.0)


def combine(ps: list[Tensor], regions: bool) -> Tensor:
    """The mean of probabilities (B, heads, *S) with the weights exp(-H). For regions each region has its own H."""
    weights = [(-entropy(p, regions)).exp() for p in ps]
    total = sum(weight * p for weight, p in zip(weights, ps, strict=True))
    return total / sum(weights)  # pyright: ignore[reportReturnType]: sum's 0 is not left
