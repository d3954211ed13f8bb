"""AD-MT (ECCV 2024): two teachers take turns, and the student also learns where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nnunet_semiseg.losses.copy_paste import cut_mix, draw_mixing_box
from nnunet_semiseg.losses.segmentation import confidence, cross_entropy, disagree, entropy, probabilities
from nnunet_semiseg.settings.base import (
    CertainSettings,
    ConsistencySettings,
    Count,
    Share,
    TeacherSettings,
    TurnSettings,
)
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.training.teacher import make_teacher, update_teacher


@dataclass(frozen=True, kw_only=True)
class ADMTSettings(ConsistencySettings, TeacherSettings, CertainSettings, TurnSettings):
    """Settings of `ADMTTrainer`. Of the two teachers, only the first one can be deployed."""

    paper_weight: ClassVar[float] = 2.0
    paper_ramp: ClassVar[float] = 0.4

    match_threshold: Share = 0.8
    """Pseudo-labels with a probability below this do not count."""
    period: Count = 20
    """The largest number of steps in which one teacher follows the student before it is the other teacher's turn."""
    cutmix: Share = 1.0
    """The probability that a weak view gets a box of another sample, in the second teacher's turns."""


class ADMTTrainer(SemiSupervisedTrainer[ADMTSettings]):
    """Zhao et al., "Alternate diverse teaching for semi-supervised medical image segmentation" (ECCV 2024, 2311.17325).

    There are a student and two EMA teachers. Two rules make the teachers differ (random periodic alternate updating):

    - only one teacher follows the student at a time, for 1 to `period` steps. This number is drawn for each turn. So
      the teachers follow the student on different batches;
    - in the turn of the first teacher the student sees the strong view, in that of the second the weak view with
      CutMix.

    The student learns from the teachers' probabilities p_1, p_2 on the weak view (conflict-combating). They are
    averaged in each voxel, with their entropies H:

        p = (exp(-H_1) p_1 + exp(-H_2) p_2) / (exp(-H_1) + exp(-H_2)).

    If the teachers' decisions differ in a voxel, the student's own decision on the weak view can replace that of p: if
    it is another class and has a higher probability. L_u is the mean of CE over the voxels where the probability is at
    least 0.8. L = L_sup + 2 L_u, with a Gaussian ramp over 0.4 of the training.

    With `consistency=paper` this is done at full resolution, as in the paper and its code. By default we differ: L_u is
    nnU-Net's loss with deep supervision, in which all other voxels have the weight 0. L_u itself has the weight 1.

    Both differ from the paper in these points. The student's view is flipped and turned. Entropies have the natural
    logarithm (their code: base 2). In 2d the loss is the same as in 3d (theirs: Dice instead of CE, and the threshold
    0.95). Their period is about half a pass through the unlabelled cases: 19 for LA and 50 for ACDC. Here the second
    teacher begins as a copy of the student in its first turn (theirs: both are copies for 80 steps). With one
    unlabelled sample in a batch nothing is mixed.
    """

    views = ("weak", "strong")

    def initialize(self):
        super().initialize()
        # frozen; saved with the modules that are not deployed
        other = self.auxiliary["other_teacher"] = make_teacher(self.bare_network)
        if self._do_i_compile():
            other.compile()
        first = self.draw_period()
        self.method_state["others_turn"] = torch.tensor(False)
        self.method_state["others_start"] = torch.tensor(first + 1)
        self.method_state["steps_left"] = torch.tensor(first)

    def draw_period(self) -> int:
        """Draw the number of steps of the turn that begins now. It is the same in all processes."""
        generator = np.random.default_rng((self.settings.seed or 0, self.step))
        return int(generator.integers(1, self.settings.period + 1))

    def on_train_start(self):
        super().on_train_start()
        if self.step == 0:  # weights may have been loaded after the teacher was made
            update_teacher(self.auxiliary["other_teacher"], self.network, 0, self.settings.decay)

    def move_teacher(self) -> None:
        state = self.method_state
        if state["others_turn"]:
            since = self.step - int(state["others_start"])  # at 0 it is a copy
            update_teacher(self.auxiliary["other_teacher"], self.network, since, self.settings.decay)
        else:
            super().move_teacher()
        state["steps_left"] -= 1
        if not state["steps_left"]:
            state["others_turn"].logical_not_()
            state["steps_left"].fill_(self.draw_period())

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        turn, box = self.draw_turn(), None
        if self.method_state["others_turn"]:
            box = draw_mixing_box(batch.views["weak"], self.settings.cutmix)

        def seen(x: Tensor) -> Tensor:
            """Change a view, or its pseudo-label, to the form that the student sees in this turn."""
            return turn(x) if box is None else cut_mix(turn(x), box)

        outputs = self.each(self.network, batch.images, seen(batch.views["strong" if box is None else "weak"]))
        yield {"supervised": self.loss(next(outputs), batch.target)}
        decision, weight = (seen(x) for x in self.ask_teachers(batch.views["weak"]))
        yield {"consistency": self.settings.weight(self.progress) * self.taught_loss(next(outputs), decision, weight)}

    def taught_loss(self, output, decision: Tensor, weight: Tensor) -> Tensor:
        """The loss of the student towards a decision. A voxel has the weight 1 or 0.

        It is nnU-Net's loss; with `consistency=paper` the mean of the cross-entropy over the voxels of weight 1.
        """
        if self.settings.consistency == "paper":
            weight = weight / weight.mean().clamp_min(1e-6)
            return cross_entropy(self.finest(output), decision, self.label_manager.has_regions, weight)
        return self.pseudo_loss(output, decision, weight)

    def ask_teachers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Make the pseudo-label, and a mask of 0 and 1, (B, 1, *S), that says where it is certain."""
        manager = self.label_manager
        with self.without_gradients():
            logits = [teacher(images) for teacher in (self.teacher, self.auxiliary["other_teacher"])]
            differ = disagree(logits[0], logits[1], manager)
            taught = combine([probabilities(x, manager) for x in logits], manager.has_regions)
            del logits
            own = self.finest(self.network(images)).float()
            certain, own_certain = (confidence(probabilities(x, manager), manager) for x in (taught, own))
            overruled = differ & disagree(taught, own, manager) & (own_certain > certain)
            certain = torch.where(overruled, own_certain, certain)
            decision = self.decide(torch.where(overruled, own, taught))
            return decision, (certain >= self.settings.match_threshold).float()


def combine(ps: list[Tensor], regions: bool) -> Tensor:
    """The logits of the mean of probabilities (B, heads, *S) with the weights exp(-H).

    Each region has its own entropy H.
    """
    weights = [(-entropy(p, regions)).exp() for p in ps]
    total = sum(weight * p for weight, p in zip(weights, ps, strict=True))
    p: Tensor = total / sum(weights)  # pyright: ignore[reportAssignmentType]: sum's 0 is not left
    return p.logit() if regions else p.log()
