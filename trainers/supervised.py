"""The labelled-only baseline."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_semiseg.config import TrainingSettings, read_settings
from nnunet_semiseg.data.labeled_subset import take_labeled
from nnunet_semiseg.data.two_streams import seed_workers
from nnunet_semiseg.training.augmentation import repeatable
from nnunet_semiseg.training.random_state import seed_everything
from nnunet_semiseg.training.semi_supervised_trainer import apply_network_settings, apply_training_settings


class SupervisedTrainer(nnUNetTrainer):
    """nnU-Net's own trainer, for as long as the settings in the plans say: the baseline at an equal budget."""

    settings_class = TrainingSettings

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        self.settings = read_settings(self.settings_class, plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        apply_training_settings(self, self.settings)
        if self.settings.seed is not None:
            seed_everything(self.settings.seed)

    def initialize(self):
        super().initialize()
        apply_network_settings(self.network, self.device, self.settings)

    def get_training_transforms(self, *args, **kwargs):
        transforms = super().get_training_transforms(*args, **kwargs)
        return transforms if self.settings.seed is None else repeatable(transforms)

    def do_split(self):
        return take_labeled(*super().do_split(), self.settings.num_labeled, self.dataset_json)[:2]

    def get_dataloaders(self):
        train, val = super().get_dataloaders()
        if self.settings.seed is not None:
            seed_workers(train, self.settings.seed, self.current_epoch * self.num_iterations_per_epoch)
            next(train)  # starts the workers here, as nnU-Net does
        return train, val
