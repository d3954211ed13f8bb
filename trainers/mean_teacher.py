"""Mean Teacher (NeurIPS 2017): the student agrees with the moving average of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.segmentation import probabilities
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet
from nnunet_semiseg.settings.base import (
    ConsistencySettings,
    ExternalMaskSettings,
    OptionalTextSettings,
    PseudoLabelSettings,
    TeacherSettings,
    TurnSettings,
)
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.text_guided import TextGuidedTrainer


@dataclass(frozen=True, kw_only=True)
class MeanTeacherSettings(
    ConsistencySettings,
    OptionalTextSettings,
    TeacherSettings,
    PseudoLabelSettings,
    ExternalMaskSettings,
    TurnSettings,
):
    """Settings of `MeanTeacherTrainer`."""

    paper_ramp: ClassVar[float] = 0.4

    def __post_init__(self):
        super().__post_init__()
        if self.external_masks and self.consistency == "paper":
            raise UserError(
                "settings external_masks and consistency=paper: the masks of other models need"
                " consistency=dice_ce: set it"
            )


class MeanTeacherTrainer(TextGuidedTrainer[MeanTeacherSettings]):
    """Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017, arXiv 1703.01780).

    L = L_sup + w(t) L_con(student on the strong view, teacher on the weak view), over the unlabelled samples (eq. 1 in
    their section 2). The teacher is the EMA of the student (eq. 2), and w is a Gaussian ramp.

    With `consistency=paper` L_con is the MSE of probabilities at full resolution, and w ends at 0.1, as is usual for
    volumes (Yu et al., UA-MT, MICCAI 2019). By default we differ: L_con is nnU-Net's loss with deep supervision towards
    the teacher's decision, w ends at 1, and the student's view is flipped and turned. Labelled samples have no
    consistency term. With `external_masks` the masks of other models change the decision and the weights of voxels.
    """

    views = ("weak", "strong")

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        return MultiDecoderUNet(network)

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        turn = self.draw_turn()
        (x_l, target, share_l), (x_u, _, share_u) = batch.streams("strong")
        outputs = self.each(partial(self.predict, text=text), x_l, turn(x_u))
        output, aligned = next(outputs)
        loss = self.loss(output, target)
        yield {"supervised": loss} | self.cog(aligned, self.finest(output), text, share_l)
        del output, aligned, loss
        with torch.no_grad():
            teacher = turn(self.teacher(batch.views["weak"]))
        decision, counts = self.decide_with_masks(teacher, batch, turn)
        output, aligned = next(outputs)
        if self.settings.consistency == "paper":
            student = probabilities(self.finest(output), self.label_manager)
            loss = F.mse_loss(student, probabilities(teacher, self.label_manager))
        else:
            loss = self.pseudo_loss(output, decision, counts)
        terms = {"consistency": self.settings.weight(self.progress) * loss}
        yield terms | self.cog(aligned, self.finest(output), text, share_u)
