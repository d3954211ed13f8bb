"""Mean Teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_semiseg.losses.pseudo_labels import probabilities
from nnunet_semiseg.settings.base import ConsistencySettings, TeacherSettings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class MeanTeacherSettings(ConsistencySettings, TeacherSettings):
    """Settings of `MeanTeacherTrainer`, whose ramp is shorter than that of other methods."""

    ramp_length: float = 0.4
    """of the consistency's weight, as a share of the training"""


class MeanTeacherTrainer(SemiSupervisedTrainer[MeanTeacherSettings]):
    """Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017, arXiv 1703.01780).

    L = L_sup + w(t) MSE(student's probabilities on the strong view, teacher's on the weak view), over the
    unlabelled samples (eq. 1, their section 2); the teacher is the EMA of the student (eq. 2), w a Gaussian ramp
    over `ramp_length` of the training to `consistency_weight` (0.1, as usual for volumes: Yu et al., UA-MT, MICCAI
    2019). We depart in leaving the labelled samples out of the consistency, and in nnU-Net's supervised loss.
    """

    views = ("weak", "strong")

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        outputs = self.each(self.network, batch.images, batch.views["strong"])
        yield {"supervised": self.loss(next(outputs), batch.target)}
        with torch.no_grad():
            teacher = probabilities(self.teacher(batch.views["weak"]), self.label_manager)
        student = probabilities(self.finest(next(outputs)), self.label_manager)
        weight = self.settings.consistency_weight * self.settings.ramp(self.progress)
        yield {"consistency": weight * F.mse_loss(student, teacher)}
