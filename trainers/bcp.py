"""Bidirectional copy-paste (CVPR 2023): boxes are pasted between labelled and unlabelled images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.copy_paste import draw_box, pairs, paste
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import (
    OptionalTextSettings,
    PseudoLabelSettings,
    Share,
    TeacherSettings,
    TurnSettings,
    Weight,
)
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.checks import check_there_are_pairs
from nnunet_semiseg.training.teacher import update_teacher
from nnunet_semiseg.training.text_guided import TextGuidedTrainer


@dataclass(frozen=True, kw_only=True)
class BCPSettings(OptionalTextSettings, TeacherSettings, PseudoLabelSettings, TurnSettings):
    """Settings of `BCPTrainer`."""

    pretraining: Share = 2 / 17
    """The share of the training that uses labelled samples only. The paper has 2,000 of 17,000 iterations."""
    box: Share = 2 / 3
    """The length of each side of the pasted box, as a share of the patch (beta in the paper)."""
    bcp_weight: Weight = 0.5
    """The weight of voxels with pseudo-labels (alpha in the paper)."""


class BCPTrainer(TextGuidedTrainer[BCPSettings]):
    """Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation" (CVPR 2023, 2305.00673).

    With M = 0 in a box at a random place, whose sides are 2/3 of the patch's, and 1 around it:

    - eq. 1 and 2: X_in = x_l M + x_u (1 - M), X_out = x_u' M + x_l (1 - M), x_u' another sample's than x_u;
    - eq. 4 to 6: the targets are mixed alike, of labels and of the teacher's decisions; L = L_in + L_out, each the
      loss where the label is true plus alpha = 0.5 times that where it is a pseudo-label;
    - before that, a phase of pre-training on mixes of two labelled samples; the teacher begins as its end.

    Where we depart: the pre-training's last weights go on (theirs: the best on the test set), with the same optimizer
    and learning rate schedule; the teacher sees weak views, the mixes are of strong ones; the unlabelled images of
    a mix are flipped and turned with their pseudo-labels; X_in and X_out have the same x_l; labels and pseudo-labels
    have
    nnU-Net's deep supervision; the largest component is kept where each labelled case has the class in one piece
    (theirs: always). Of more unlabelled samples than labelled ones, one more is used. With a single sample of each x_u'
    is x_u, and the pre-training mixes nothing. A training that is resumed with another length keeps the end of its
    pre-training.
    """

    views = ("weak", "strong")

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network)

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

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        x_l, target = batch.images, batch.target
        box = draw_box(x_l, self.settings.box)
        if self.step < self.first_step:
            mixed = tree_map(lambda t: paste(box, t.roll(1, 0), t), target)
            output, aligned = self.predict(paste(box, x_l.roll(1, 0), x_l), text)
            terms = {"supervised": self.loss(output, mixed), "pseudo": x_l.new_zeros(())}
            yield terms | self.cog(aligned, self.finest(output), text, 1)
            return
        if self.step == self.first_step:
            update_teacher(self.teacher, self.network, 0, self.settings.decay)  # begins as a copy
        turn = self.draw_turn()
        x_u, other = pairs(turn(batch.views["strong"]), len(x_l))
        label, other_label = pairs(turn(self.pseudo_label(batch.views["weak"][: len(x_l) + 1])), len(x_l))
        outputs = self.each(partial(self.predict, text=text), paste(box, x_u, x_l), paste(box, x_l, other))
        for is_labeled, pseudo_label in ((~box, label), (box, other_label)):  # inwards, outwards: eq. 5 and 6
            with self.shared(next(outputs)) as (output, aligned):
                yield {"supervised": self.loss_where(is_labeled, output, target)}
                loss = self.loss_where(~is_labeled, output, pseudo_label)
                yield {"pseudo": self.settings.bcp_weight * loss}
                yield self.cog(aligned, self.finest(output), text, 0.5)

    @torch.no_grad()
    def pseudo_label(self, images: Tensor) -> Tensor:
        """The teacher's decision."""
        return self.decide(self.teacher(images))
