"""The recommended method: one network on nnU-Net's plans, which sets itself up from the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from torch import Tensor
from torch.utils._pytree import tree_map

from nnunet_semiseg.data.foreground_chance import chance_of_foreground
from nnunet_semiseg.data.pseudo_foreground import (
    LEAST_CASES,
    PseudoForegroundDataset,
    classes_of_all,
    leave_out,
    look_at_cases,
)
from nnunet_semiseg.losses.copy_paste import cut_mix, draw_box, pairs, paste
from nnunet_semiseg.losses.deep_supervision import mixed_loss
from nnunet_semiseg.losses.segmentation import confidence, probabilities
from nnunet_semiseg.settings.base import (
    CertainSettings,
    ExternalMaskSettings,
    Probability,
    Share,
    TeacherSettings,
    TurnSettings,
    WarmUpSettings,
    Weight,
)
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.checks import check_there_are_pairs
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer

REFRESHES = 3
"""How often the teacher predicts whole unlabelled cases. This happens at equal distances after the warm-up."""
LIKELY = 2 / 3
"""If at least this share of random patches has foreground, all unlabelled patches are taken at random places."""
CASES_OF_A_REFRESH = 100
"""The largest number of cases that the teacher predicts each time. If there are more, it takes some at random."""


@dataclass(frozen=True, kw_only=True)
class SemiSegSettings(TeacherSettings, CertainSettings, ExternalMaskSettings, TurnSettings, WarmUpSettings):
    """Settings of `SemiSegTrainer`. You do not have to set any of them."""

    deploy: Literal["student", "teacher"] = "teacher"
    """Which network validates and predicts: the student or its EMA teacher."""
    turns: bool = False
    """Whether the student's view is flipped and turned by right angles, along the axes that nnU-Net mirrors. The
    pseudo-label is flipped and turned in the same way."""
    contrast_probability: Probability | None = 0.8
    """The probability of each of nnU-Net's transforms of brightness, contrast and gamma on labelled patches. `null`
    keeps nnU-Net's own: 0.1 to 0.3."""
    strong_transforms: Literal["all", "contrast"] = "contrast"
    """The transforms that have `strong_probability`. `contrast`: only those of brightness, contrast and gamma. Noise,
    blur and low resolution, which can hide small structures, keep nnU-Net's own probabilities."""
    pseudo_weight: Weight = 0.5
    """The weight of voxels with pseudo-labels; a voxel with a true label has the weight 1."""
    match_threshold: Share = 0.0
    """A voxel does not count if the probability of the teacher's decision is below this. This does not
    hold where the masks of other models have replaced the decision."""
    box: Share = 2 / 3
    """The length of each side of the pasted box, as a share of the patch."""
    paste_share: Share = 0.5
    """The share of the steps in which boxes are pasted into labelled patches. In the other steps these stay whole.
    Unlabelled patches always get a box."""
    unlabeled_foreground: Share | None = None
    """The share of unlabelled patches that are taken where the teacher finds foreground. With 0 all are taken at random
    places. By default it is one third if fewer than two thirds of random patches of labelled cases have foreground,
    else 0."""
    leave_out: Share = 0.2
    """The largest share of unlabelled cases that are not used, because the teacher predicts something else on their
    mirrored image. With 0 all cases are used."""


def strong_view(settings: SemiSegSettings) -> str:
    """How a strong view is made, in words."""
    if settings.strong_probability is None:
        return "nnU-Net's intensity transforms with their own probabilities"
    changed = "brightness, contrast and gamma" if settings.strong_transforms == "contrast" else "all of them"
    return f"nnU-Net's intensity transforms, {changed} with probability {settings.strong_probability}"


class SemiSegTrainer(SemiSupervisedTrainer[SemiSegSettings]):
    """One network and its EMA teacher. Boxes are pasted between labelled and unlabelled patches.

    It combines what the best methods of the field have in common, for nnU-Net. No setting has to be chosen.

    - Warm-up: until every class is learnt, only labels are used. In half of the steps boxes are pasted between labelled
      patches, as BCP (CVPR 2023) does in every step.
    - The teacher is the EMA of the student and labels the weak views. Its decay is larger in longer trainings, and its
      weights are deployed.
    - The student sees labelled patches with boxes of strong views in them, and strong views with boxes of labelled
      patches. The box goes through all slices if nnU-Net augments in 2d. In half of the steps labelled patches stay
      whole (`paste_share`), because the network predicts whole images.
    - Brightness, contrast and gamma of labelled patches change as often as those of strong views.
    - The loss is nnU-Net's with deep supervision, on each mix as a whole: one Dice over true and pseudo-labels, which
      count half (BCP has one for each part, but the Dice of a part without foreground has no information).
    - Pseudo-labels keep the largest component of a class if it is in one piece in every labelled case.
    - The teacher predicts up to 100 whole unlabelled cases, three times in a training. If random patches of labelled
      cases often have no foreground, a third of the unlabelled patches are taken around foreground that the teacher
      finds, as nnU-Net does with labelled ones.
    - Unlabelled cases are not used if the teacher contradicts itself on them far more than on others. Its decisions on
      the image and on the mirrored image are compared; without mirroring, its decisions at two of these times. At
      least four fifths of the cases are used, and all if there are fewer than ten.

    The network is that of the plans. All choices are in the training's log and in `decisions.txt` in its folder.
    """

    views = ("weak", "strong")

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        check_there_are_pairs(self.settings, plans, configuration, "SemiSegTrainer")
        return super().prepare(plans, configuration, fold, dataset_json)

    # ------------------------------------------------------------------------------------------------- decisions

    def on_train_start(self):
        if self.current_epoch == 0 and not self.ranks.number and self.foreground_folder.exists():
            shutil.rmtree(self.foreground_folder)  # from an earlier training
        self.ranks.wait()
        super().on_train_start()
        if not self.ranks.number:
            text = "\n".join(self.decisions()) + "\n"
            Path(self.output_folder, "decisions.txt").write_text(text, encoding="utf-8")

    def decisions(self) -> list[str]:
        settings, epochs = self.settings, self.num_epochs
        cases = self.num_unlabeled
        axes = self.inference_allowed_mirroring_axes
        shape = "through all slices, as nnU-Net augments in 2d" if self.augments_in_2d else "in all directions"
        drawn = "all drawn at random" if not self.foreground_share else f"{self.foreground_share:.0%} around foreground"
        why = f"{self.chance_of_foreground:.0%} of random patches of labelled cases contain foreground"
        predicted = f"{min(cases, CASES_OF_A_REFRESH)} of {cases} cases, {REFRESHES} times"
        p = settings.contrast_probability
        contrast = "" if p is None else f", brightness, contrast and gamma with probability {p}"
        local = f"with probability {settings.local_probability}" if settings.local_probability else "none"
        if not self.looks_at_cases:
            too_few = f"there are fewer than {LEAST_CASES} unlabelled cases"
            predicted = f"no whole case, as {too_few if settings.leave_out else 'none is left out'}"
        return [
            f"labels only {self.warm_up} (warm_up)",
            f"EMA decay {settings.decay:.4f} for {epochs * self.num_iterations_per_epoch} iterations (ema_decay)",
            *super().decisions(),
            f"strong views: {strong_view(settings)} (strong_probability)",
            f"labelled patches: nnU-Net's transforms{contrast} (contrast_probability)",
            f"local changes of brightness and gamma: {local} (local_probability)",
            f"flips and turns: {'along axes ' + str(axes) if axes and settings.turns else 'none'} (turns)",
            f"boxes are pasted into labelled patches in {settings.paste_share:.0%} of the steps (paste_share)",
            f"boxes have {settings.box:.0%} of the patch's sides, {shape} (box)",
            f"unlabelled patches: {drawn}, as {why} (unlabeled_foreground)",
            f"at most {settings.leave_out:.0%} of unlabelled cases left out; teacher predicts {predicted} (leave_out)",
        ]

    @property
    def augments_in_2d(self) -> bool:
        """Whether nnU-Net treats patches of these plans as stacks of slices."""
        patch = self.configuration_manager.patch_size
        return len(patch) == 3 and max(patch) / patch[0] > ANISO_THRESHOLD

    # ------------------------------------------------------------------------------------------ unlabelled patches

    @property
    def foreground_folder(self) -> Path:
        return Path(self.output_folder, "pseudo_foreground")

    @cached_property
    def chance_of_foreground(self) -> float:
        """The probability that a random patch of a labelled case has foreground."""
        return chance_of_foreground(self.labeled_dataset(), self.configuration_manager.patch_size)

    def labeled_dataset(self):
        return self.dataset_class(self.preprocessed_dataset_folder, self.labeled_cases)

    @property
    def foreground_share(self) -> float:
        """The share of the unlabelled patches that are drawn where the teacher finds foreground."""
        if self.settings.unlabeled_foreground is not None:
            return self.settings.unlabeled_foreground
        return 0.0 if self.chance_of_foreground >= LIKELY else 1 / 3

    @property
    def looks_at_cases(self) -> bool:
        """Whether the teacher predicts whole unlabelled cases during the training.

        It does so if patches are taken around foreground (`foreground_share`), or if cases may be left out
        (`leave_out`) and there are at least `LEAST_CASES`.
        """
        scores = self.settings.leave_out > 0 and self.num_unlabeled >= LEAST_CASES
        return self.foreground_share > 0 or scores

    def unlabeled_dataset(self) -> PseudoForegroundDataset:
        return PseudoForegroundDataset(super().unlabeled_dataset(), self.foreground_folder)

    @property
    def searches(self) -> list[int]:
        """The epochs in which the teacher predicts whole cases. They change if the warm-up ends early."""
        first = ceil(self.warm_up.first_step / self.num_iterations_per_epoch)
        return np.linspace(first, self.num_epochs, REFRESHES, endpoint=False).astype(int).tolist()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        if self.looks_at_cases and self.current_epoch in self.searches:
            dataset = super().unlabeled_dataset()
            cases = np.random.default_rng((self.settings.seed or 0, self.current_epoch)).permutation(
                dataset.identifiers
            )
            cases = cases[:CASES_OF_A_REFRESH].tolist()
            self.print_to_log_file(
                f"the teacher predicts {len(cases)} unlabelled cases (leave_out, unlabeled_foreground)"
            )
            expected = classes_of_all(self.labeled_dataset())
            look_at_cases(self, self.teacher, dataset, cases, self.foreground_folder, expected)
            if not self.ranks.number:
                names = ", ".join(leave_out(self.foreground_folder, self.settings.leave_out)) or "none"
                self.print_to_log_file(f"left out, because the teacher is not sure of them: {names}")
            self.ranks.wait()

    # ---------------------------------------------------------------------------------------------------- a step

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        x_l, target = batch.images, batch.target
        box = draw_box(x_l, self.settings.box, whole_first_axis=self.augments_in_2d)
        into_labeled = box & bool(torch.rand(()) < self.settings.paste_share)  # random number of the CPU: no waiting
        if self.uses_labels_only:
            mixed = tree_map(lambda t: cut_mix(t, into_labeled), target)
            output = self.network(cut_mix(x_l, into_labeled))
            self.warm_up.add(self.finest(output), self.finest(mixed))
            yield {"mixed": self.loss(output, mixed)}
            return
        turn = self.draw_turn()
        x_u, other = pairs(turn(batch.views["strong"]), len(x_l))
        logits = turn(self.teacher(batch.views["weak"][: len(x_l) + 1]))
        label, counts = self.decide_with_masks(logits, batch, turn)
        if self.settings.match_threshold and counts is None:
            sure = confidence(probabilities(logits, self.label_manager), self.label_manager)
            counts = (sure >= self.settings.match_threshold).float()
        del logits
        label, other_label = pairs(label, len(x_l))
        counts, other_counts = (1.0, 1.0) if counts is None else pairs(counts, len(x_l))
        outputs = self.each(self.network, paste(into_labeled, x_u, x_l), paste(box, x_l, other))
        for is_labeled, pseudo_label, counted in ((~into_labeled, label, counts), (box, other_label, other_counts)):
            weight = self.settings.pseudo_weight * counted
            yield {
                "mixed": mixed_loss(
                    self.loss, next(outputs), target, pseudo_label, is_labeled, weight, self.label_manager
                )
            }
