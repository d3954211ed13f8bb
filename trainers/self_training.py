"""Self-training: train on the labels, label the unlabelled cases, train again on all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nnunet_semiseg.data.pseudo_label_files import (
    PseudoLabeledDataset,
    label_cases,
    pseudo_label_loader,
    take_pseudo_label,
    without_label,
)
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.settings.base import Count, PseudoLabelSettings, Weight
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.schedules import RestartingPolyLR
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class SelfTrainingSettings(PseudoLabelSettings):
    """Settings of `SelfTrainingTrainer`."""

    rounds: Count = 1
    """How often the network labels the unlabelled cases and is trained again on all cases. The epochs are divided among
    all trainings."""
    pseudo_weight: Weight = 1.0
    """The weight of the loss on pseudo-labels; the loss on labels has the weight 1."""


class SelfTrainingTrainer(SemiSupervisedTrainer[SelfTrainingSettings]):
    """Train on the labelled cases, label the unlabelled ones, then train again from scratch on both.

    nnU-Net's maintainers advise to do this by hand (MIC-DKFZ/nnUNet, issue 2338). It is pseudo-labelling after Lee,
    "Pseudo-label" (ICML workshops 2013). The epochs are divided equally among the first training and the `rounds` that
    follow. Each of these trainings has new weights and the whole of nnU-Net's learning rate schedule. Whole cases are
    labelled with nnU-Net's sliding window. A batch has as many patches with labels as with pseudo-labels. Both have
    nnU-Net's augmentation, foreground sampling and deep supervision. (By hand all cases are treated alike, so that a
    few labelled cases are rarely seen.) If a class is in one piece in every labelled case, pseudo-labels keep only its
    largest component in the whole case, or in a 2d configuration in each slice.

    The folder `pseudo_labels/round_N` of the training holds the pseudo-labels twice: in the geometry of the images, for
    you to look at, and in the form for training. If the labelling is interrupted, the training continues with the cases
    that have no pseudo-label yet. nnU-Net's `-pretrained_weights` are used for the first training only.
    """

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        if self.settings.num_epochs <= self.settings.rounds:
            raise UserError(
                f"setting num_epochs={self.settings.num_epochs}: too few for rounds={self.settings.rounds}: set it to"
                f" {self.settings.rounds + 1} or more"
            )
        return super().prepare(plans, configuration, fold, dataset_json)

    # -------------------------------------------------------------------------------------------------- the rounds

    @property
    def starts(self) -> list[int]:
        """The first epoch, counted from 0, of the training on labels only, and then of each round."""
        return [self.num_epochs * i // (self.settings.rounds + 1) for i in range(self.settings.rounds + 1)]

    @property
    def round(self) -> int:
        """The number of the present round. It is 0 while the training uses labels only."""
        return sum(self.current_epoch >= start for start in self.starts[1:])

    def folder(self, number: int) -> Path:
        return Path(self.output_folder) / "pseudo_labels" / f"round_{number}"

    def initialize(self):
        super().initialize()
        self.method_state["starts"] = torch.tensor([*self.starts, self.num_epochs])

    def restore(self, checkpoint: dict) -> None:
        super().restore(checkpoint)
        if self.goes_on and self.method_state["starts"].tolist() != [*self.starts, self.num_epochs]:
            raise ValueError("the rounds begin in other epochs")  # `load_checkpoint` says which setting changed

    def configure_optimizers(self):
        optimizer, _ = super().configure_optimizers()
        return optimizer, RestartingPolyLR(optimizer, self.initial_lr, [*self.starts, self.num_epochs])

    def on_train_start(self):
        for number in range(self.round + 1, self.settings.rounds + 1):  # from an earlier training
            if self.folder(number).exists() and not self.ranks.number:
                shutil.rmtree(self.folder(number))
        self.ranks.wait()
        super().on_train_start()

    def on_train_epoch_start(self):
        if self.current_epoch in self.starts[1:]:
            label_cases(self, self.unlabeled_dataset(), self.folder(self.round))
            self.start_again()
        super().on_train_epoch_start()

    def on_epoch_end(self):
        every = self.save_every
        if self.current_epoch + 1 in self.starts:
            self.save_every = 1  # a checkpoint, so that the labelling can be continued if it is interrupted
        super().on_epoch_end()
        self.save_every = every

    def start_again(self) -> None:
        """Make new weights, a new optimizer, and loaders with the new pseudo-labels."""
        fresh = self.build_network_architecture(
            self.plans_manager, self.configuration_manager, self.num_input_channels,
            self.label_manager.num_segmentation_heads, self.enable_deep_supervision,
        )  # fmt: skip
        self.bare_network.load_state_dict(fresh.state_dict())
        self.ranks.copy_first(self.bare_network)
        self._best_ema = None  # for `checkpoint_best.pth`: it belongs to the old network
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        super().on_validation_epoch_end(val_outputs)
        if self.current_epoch in self.starts:  # the moving average must not begin with values of the old network
            values = self.logger.local_logger.my_fantastic_logging
            values["ema_fg_dice"][-1] = values["mean_fg_dice"][-1]

    # ---------------------------------------------------------------------------------------------------- a step

    def make_unlabeled_loader(self, labeled_loader):
        folder, dataset = self.folder(self.round), self.unlabeled_dataset()
        missing = without_label(dataset, folder)
        if not self.round or (missing and self.current_epoch in self.starts):
            return None  # there are no pseudo-labels yet; when they are made, the loaders are made again
        if missing:
            raise UserError(f"{folder / missing[0]}.pkl: the pseudo-label is missing: train again, without --c")
        batch_size = self.ranks.part(self.settings.unlabeled_batch_size) or self.batch_size
        return pseudo_label_loader(
            labeled_loader, PseudoLabeledDataset(dataset, folder), batch_size, self.label_manager
        )

    def target_maker(self):
        return take_pseudo_label

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        outputs = self.each(self.network, batch.images, *batch.views.values())
        yield {"supervised": self.loss(next(outputs), batch.target)}
        if not self.round:
            yield {"pseudo": batch.images.new_zeros(())}
            return
        self.decide.count(self.finest(batch.extra["pseudo"]))
        yield {"pseudo": self.settings.pseudo_weight * self.loss(next(outputs), batch.extra["pseudo"])}
