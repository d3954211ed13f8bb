"""The base of every trainer of this package: nnU-Net's trainer with settings from the plans."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule

from nnunet_semiseg.data.labeled_subset import take_labeled
from nnunet_semiseg.data.two_streams import seed_workers
from nnunet_semiseg.files import base_folder
from nnunet_semiseg.schema import PLANS, check, check_configuration, check_dataset_json
from nnunet_semiseg.settings.base import TrainingSettings
from nnunet_semiseg.settings.plans import read_settings
from nnunet_semiseg.training import checkpoint as checkpoints
from nnunet_semiseg.training.augmentation import repeatable
from nnunet_semiseg.training.loss_term_logger import LossTermLogger
from nnunet_semiseg.training.passes import run_in_bfloat16
from nnunet_semiseg.training.random_state import seed_everything
from nnunet_semiseg.training.workers import quiet_loaders, stop

PLAN_AGAIN = "plan again with nnunet_semiseg plan_and_preprocess"
CHECKPOINT_FIX = "remove it, and go on from another checkpoint of its folder, or train again without --c"

S = TypeVar("S", bound=TrainingSettings)


class PlansTrainer(nnUNetTrainer, Generic[S]):
    """nnU-Net's trainer, with the length, the seed, and the number of labels that the plans' settings say.

    Class attributes:
        settings_class: the type argument of the base class, `PlansTrainer[MySettings]`.
    """

    settings_class: type[TrainingSettings] = TrainingSettings
    settings: S
    # by nnU-Net's annotations these can be None; from `initialize` on they are not
    network: Any
    loss: Any
    optimizer: Any
    dataset_class: Any
    num_input_channels: Any
    output_folder: Any

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for base in vars(cls).get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type):
                    cls.settings_class = argument

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        # before nnU-Net's own __init__, which makes the output folder: what is refused leaves nothing behind
        self.settings = cast(S, read_settings(self.settings_class, plans))
        if self.settings.seed is not None:
            seed_everything(self.settings.seed)
        plans = self.prepare(plans, configuration, fold, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            setattr(self, name, getattr(self.settings, name))
        self.logger.local_logger = LossTermLogger()
        self.hidden_cases: list[str] = []  # labelled cases whose labels must not be seen

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        """Refuse what cannot be trained, before anything is written.

        Returns:
            The plans, or a copy with what was found in the data (`with_found`). They reach the checkpoint and the
            predictor.

        Raises:
            UserError: plans or `dataset.json` are damaged; no such configuration.
        """
        about = Path(dataset_json_file(plans))
        file, fix = about.with_name(f"{plans.get('plans_name')}.json"), PLAN_AGAIN
        check(plans, PLANS, file, fix)
        check_configuration(plans, configuration, file, fix)
        check_dataset_json(dataset_json, about)
        return plans

    def run_training(self):
        """nnU-Net's; however it ends, no process and no thread of the loaders is left to print after the reason."""
        with quiet_loaders():
            try:
                super().run_training()
            finally:
                for loader in (self.dataloader_train, self.dataloader_val):
                    stop(loader)

    @property
    def bare_network(self) -> Any:
        """The network without the wrapper of torch.compile."""
        return bare(self.network)

    def initialize(self):
        super().initialize()
        if self.settings.bfloat16_on_cpu and self.device.type == "cpu":
            run_in_bfloat16(self.network)

    def trained_modules(self) -> list[nn.Module]:
        """What the optimizer trains."""
        return [self.network]

    def configure_optimizers(self):
        """nnU-Net's SGD and schedule; on CUDA fused, so that the gradient scaler does not wait for the GPU."""
        parameters = [p for module in self.trained_modules() for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters,
            self.initial_lr,
            weight_decay=self.weight_decay,
            momentum=0.99,
            nesterov=True,
            fused=self.device.type == "cuda",
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def get_training_transforms(self, *args, **kwargs):
        transforms = super().get_training_transforms(*args, **kwargs)
        return transforms if self.settings.seed is None else repeatable(transforms)

    def do_split(self):
        split: Any = super().do_split()  # names of cases, which nnU-Net's annotations call arrays
        training, validation, self.hidden_cases = take_labeled(
            split[0], split[1], self.settings.num_labeled, self.dataset_json
        )
        return training, validation

    def get_dataloaders(self):
        train, val = super().get_dataloaders()
        try:
            self.extend_loader(train)
            seed_workers(train, self.settings.seed, self.current_epoch * self.num_iterations_per_epoch)
            next(train)  # starts the workers here, as nnU-Net does
        except BaseException:
            stop(train)
            stop(val)
            raise
        return train, val

    def extend_loader(self, augmenter) -> None:
        """Change nnU-Net's training loader, in place, before its workers start."""

    def load_checkpoint(self, checkpoint: dict | str | os.PathLike) -> None:
        """nnU-Net's; a dictionary is taken, too, as its signature says (nnU-Net 2.8.1 itself fails on one).

        Raises:
            UserError: the file is damaged, can run code, or is of another network.
        """
        name = "the checkpoint" if isinstance(checkpoint, dict) else str(checkpoint)
        content = checkpoints.read(checkpoint, CHECKPOINT_FIX, mmap=True)  # nnU-Net itself would run what is in it
        with checkpoints.fitting(self.settings_class, content, self.plans_manager.plans, name, CHECKPOINT_FIX):
            if not isinstance(checkpoint, dict):
                return super().load_checkpoint(os.fspath(checkpoint))
            with tempfile.NamedTemporaryFile(suffix=".pth") as file:
                torch.save(checkpoint, file.name)
                super().load_checkpoint(file.name)


def dataset_json_file(plans: dict) -> str:
    """The file that a trainer's `dataset_json` is from, for messages."""
    return str(base_folder("nnUNet_preprocessed") / str(plans.get("dataset_name")) / "dataset.json")


def bare(module: nn.Module) -> Any:
    """The module without the wrapper of torch.compile."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module
