"""Bidirectional copy-paste (CVPR 2023): boxes are pasted between labelled and unlabelled images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nnunet_semiseg.losses.copy_paste import cut_mix, draw_box, pairs, paste
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import (
    OptionalTextSettings,
    PseudoLabelSettings,
    Share,
    TeacherSettings,
    TurnSettings,
    WarmUpSettings,
    Weight,
)
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.checks import check_there_are_pairs
from nnunet_semiseg.training.teacher import update_teacher
from nnunet_semiseg.training.text_guided import TextGuidedTrainer


@dataclass(frozen=True, kw_only=True)
class BCPSettings(OptionalTextSettings, TeacherSettings, PseudoLabelSettings, TurnSettings, WarmUpSettings):
    """Settings of `BCPTrainer`."""

    box: Share = 2 / 3
    """The length of each side of the pasted box, as a share of the patch (beta in the paper)."""
    bcp_weight: Weight = 0.5
    """The weight of voxels with pseudo-labels (alpha in the paper)."""


class BCPTrainer(TextGuidedTrainer[BCPSettings]):
    """Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation" (CVPR 2023, 2305.00673).

    M is 0 in a box at a random place, with 2/3 of the patch's sides, and 1 around it.

    - eq. 1 and 2: X_in = x_l M + x_u (1 - M), X_out = x_u' M + x_l (1 - M), with x_u' of another sample than x_u;
    - eq. 4 to 6: the targets are mixed in the same way from labels and the teacher's decisions. L = L_in + L_out. Each
      is the loss where the label is true, plus alpha = 0.5 times the loss where it is a pseudo-label;
    - before that there is a pre-training on mixes of two labelled samples (`warm_up`). At its end the teacher is made,
      as a copy of the student.

    Differences from the paper: the pre-training ends when every class is learnt (theirs: after 2/17 of the training).
    Its last weights are used (theirs: the best on the test set), and optimizer and learning rate schedule continue. The
    teacher sees weak views, and the mixes are made of strong views. The unlabelled images of a mix are flipped and
    turned together with their pseudo-labels. X_in and X_out have the same x_l. Labels and pseudo-labels have nnU-Net's
    deep supervision. Pseudo-labels keep the largest component of a class if it is in one piece in every labelled case
    (theirs: always). If a batch has n labelled and more unlabelled samples, the first n + 1 unlabelled ones are used.
    With one sample of each kind, x_u' is x_u, and the pre-training mixes nothing.
    """

    views = ("weak", "strong")

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network)

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        check_there_are_pairs(self.settings, plans, configuration, "BCP")
        return super().prepare(plans, configuration, fold, dataset_json)

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        x_l, target = batch.images, batch.target
        box = draw_box(x_l, self.settings.box)
        if self.uses_labels_only:
            mixed = tree_map(lambda t: cut_mix(t, box), target)
            output, aligned = self.predict(cut_mix(x_l, box), text)
            self.warm_up.add(self.finest(output), self.finest(mixed))
            terms = {"supervised": self.loss(output, mixed), "pseudo": x_l.new_zeros(())}
            yield terms | self.cog(aligned, self.finest(output), text, 1)
            return
        if self.step == self.warm_up.first_step:
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
        """The decision of the teacher: the class of each voxel, or the regions that it is in."""
        return self.decide(self.teacher(images))
