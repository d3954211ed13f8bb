"""The baseline: nnU-Net's own trainer, which learns from the labelled cases only."""

from nnunet_semiseg.settings.base import TrainingSettings
from nnunet_semiseg.training.plans_trainer import PlansTrainer


class SupervisedTrainer(PlansTrainer[TrainingSettings]):
    """nnU-Net's own trainer, with settings from the plans, such as the length of the training.

    It is the baseline that trains as long as the other methods.
    """
