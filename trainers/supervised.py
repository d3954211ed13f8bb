"""The labelled-only baseline."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_semiseg.config import TrainingSettings, read_settings
from nnunet_semiseg.training.random_state import seed_everything
from nnunet_semiseg.training.semi_supervised_trainer import apply_training_settings


class SupervisedTrainer(nnUNetTrainer):
    """nnU-Net's own trainer, for as long as the settings in the plans say: the baseline at an equal budget."""

    settings_class = TrainingSettings

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")):
        settings = read_settings(self.settings_class, plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        apply_training_settings(self, settings)
        if settings.seed is not None:
            seed_everything(settings.seed)
