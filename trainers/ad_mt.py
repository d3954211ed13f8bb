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
    """Settings of `ADMTTrainer`; the teacher that can be deployed is the first."""

    paper_weight: ClassVar[float] = 2.0
    paper_ramp: ClassVar[float] = 0.4

    match_threshold: Share = 0.8
    """The least probability of a pseudo-label that counts."""
    period: Count = 20
    """The most steps in which one of the two teachers follows the student, before it is the other's turn."""
    cutmix: Share = 1.0
    """The probability that a weak view gets a box of another sample, in the second teacher's turns."""


class ADMTTrainer(SemiSupervisedTrainer[ADMTSettings]):
    """Zhao et al., "Alternate diverse teaching for semi-supervised medical image segmentation" (ECCV 2024, 2311.17325).

    A student and two EMA teachers. What makes them differ (random periodic alternate updating):

    - one at a time follows the student, for 1 to `period` steps, drawn anew at each turn: with other batches, then;
    - in the first one's turn the student sees the strong view, in the other one's the weak view with CutMix.

    What the student learns (conflict-combating): of the teachers' probabilities p_1, p_2 on the weak view and the
    entropies H of these, voxel by voxel,

        p = (exp(-H_1) p_1 + exp(-H_2) p_2) / (exp(-H_1) + exp(-H_2)).

    Where the teachers' decisions differ, and the student's own decision on the weak view is another than that of p and
    has the higher probability, it stands in place of p. L_u is the mean of CE over the voxels where the probability is
    at least 0.8; L = L_sup + 2 L_u, after a Gaussian ramp over 0.4 of the training.

    That is `consistency=paper`, of the full resolution, read from paper and public code. By default we depart: L_u is
    nnU-Net's loss with deep supervision over these voxels, with the weight 1. In both: the student's view is flipped
    and turned; entropies are natural logarithms, as usual on paper (their code: to base 2); in 2d theirs is Dice in
    place of CE, with 0.95, and here the same as in 3d; `period` is about half a pass through the unlabelled cases
    there, 19 of LA and 50 of ACDC. The other teacher begins as a copy of the student in its first turn (theirs: both
    are copies for 80 steps). With a single unlabelled sample in a batch nothing is mixed.
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
        """The length of a turn that begins now: the same in all processes."""
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
            """What the student is shown, or is taught, of a weak view, or of what is said of it."""
            return turn(x) if box is None else cut_mix(turn(x), box)

        outputs = self.each(self.network, batch.images, seen(batch.views["strong" if box is None else "weak"]))
        yield {"supervised": self.loss(next(outputs), batch.target)}
        decision, weight = (seen(x) for x in self.ask_teachers(batch.views["weak"]))
        yield {"consistency": self.settings.weight(self.progress) * self.taught_loss(next(outputs), decision, weight)}

    def taught_loss(self, output, decision: Tensor, weight: Tensor) -> Tensor:
        """The student's loss over the voxels with weight 1; with `consistency=paper` a mean over these."""
        if self.settings.consistency == "paper":
            weight = weight / weight.mean().clamp_min(1e-6)
            return cross_entropy(self.finest(output), decision, self.label_manager.has_regions, weight)
        return self.pseudo_loss(output, decision, weight)

    def ask_teachers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The decision to be learnt, and where it is certain, (B, 1, *S), 0 or 1."""
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
    """The logits of the mean of probabilities (B, heads, *S), weighted with exp(-H), of each region its own."""
    weights = [(-entropy(p, regions)).exp() for p in ps]
    total = sum(weight * p for weight, p in zip(weights, ps, strict=True))
    p: Tensor = total / sum(weights)  # pyright: ignore[reportAssignmentType]: sum's 0 is not left
    return p.logit() if regions else p.log()
