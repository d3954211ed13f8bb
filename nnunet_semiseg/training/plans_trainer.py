"""The base of all trainers of this package: nnU-Net's trainer, with settings that it reads from the plans."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from os.path import join
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, autocast, distributed, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_map

from nnunet_semiseg.data.augmentation import repeatable, strengthened, with_local_changes
from nnunet_semiseg.data.labeled_subset import take_labeled
from nnunet_semiseg.data.preprocessed import preprocess_again
from nnunet_semiseg.data.readable import ReadableCases
from nnunet_semiseg.data.two_streams import seed_workers
from nnunet_semiseg.data.written_images import check_written
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import LOCK, SETTINGS, DiskError, base_folder, disk_errors, only_one, reading, write_json
from nnunet_semiseg.schema import OTHER_PLANS, PLANS, check, check_architecture, check_configuration, check_dataset_json
from nnunet_semiseg.settings.base import TrainingSettings
from nnunet_semiseg.settings.plans import ACCEPT_CHANGES, changed_settings, read_settings, store_given, with_given
from nnunet_semiseg.training import checkpoint as checkpoints
from nnunet_semiseg.training import log_lines, tensorboard
from nnunet_semiseg.training.checks import check_batch_fits, check_depth, check_labeled_cases
from nnunet_semiseg.training.distributed import Ranks, told
from nnunet_semiseg.training.finite import what_is_not_finite
from nnunet_semiseg.training.loss_term_logger import LossTermLogger
from nnunet_semiseg.training.passes import run_in_bfloat16
from nnunet_semiseg.training.pretrained_encoder import check_is_there, load_pretrained_encoder
from nnunet_semiseg.training.random_state import seed_everything
from nnunet_semiseg.training.workers import quiet_loaders, stop

PLAN_AGAIN = "plan again with nnunet_semiseg plan_and_preprocess"

S = TypeVar("S", bound=TrainingSettings)

LAST = ("checkpoint_latest.pth", "checkpoint_best.pth")


class PlansTrainer(nnUNetTrainer, Generic[S]):
    """nnU-Net's trainer with settings from the plans: the length, the seed, the number of labelled cases and more.

    Class attributes:
        settings_class: the class of the settings. It comes from the type argument of the base class,
            `PlansTrainer[MySettings]`.
    """

    settings_class: type[TrainingSettings] = TrainingSettings
    settings: S
    # nnU-Net's annotations allow None; from `initialize` on these are not None (but grad_scaler is, without CUDA)
    network: Any
    loss: Any
    optimizer: Any
    dataset_class: Any
    num_input_channels: Any
    output_folder: Any
    preprocessed_dataset_folder: Any
    grad_scaler: Any
    ranks = Ranks()
    """The processes that train together, and the number of this process."""

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
        # before nnU-Net's own __init__, which makes the output folder: a refused training must leave nothing behind
        plans = with_given(plans, type(self))
        try:
            self.settings = cast(S, read_settings(self.settings_class, plans, type(self)))
        except UserError as error:  # each value of --set was checked alone before, so the error is mostly in the plans
            raise UserError(f"{plans_file(plans)}: {error}") from None
        self.goes_on = plans.get("continue_training", False)
        self.ranks = Ranks()
        if (seed := self.ranks.seed(self.settings.seed)) is not None:
            seed_everything(seed)
        plans = self.prepare(plans, configuration, fold, dataset_json)
        batch_size = PlansManager(plans).get_configuration(configuration).batch_size
        self.ranks.check_even(f"plans {plans['plans_name']}: {configuration}: batch_size", batch_size)
        self.ranks.check_even("setting unlabeled_batch_size", getattr(self.settings, "unlabeled_batch_size", None))
        wants_tensorboard = tensorboard.is_wanted()
        with disk_errors(str(nnUNet_results)):
            self.refuse_a_second(plans, configuration, fold)
            super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:  # nnU-Net itself has several processes only on GPUs of one computer
            self.device = self.ranks.device(device)
            self.grad_scaler = self.grad_scaler if self.device.type == "cuda" else None
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            setattr(self, name, getattr(self.settings, name))
        self.logger.local_logger = LossTermLogger()
        if wants_tensorboard and not self.local_rank:
            self.logger.loggers.append(tensorboard.TensorBoardLogger(self.output_folder))
        self.labeled_cases: list[str] = []  # training cases whose labels are used; known when the cases are split
        self.hidden_cases: list[str] = []  # labelled cases whose labels must not be used
        self.validation_cases: list[str] = []
        self.reasons = multiprocessing.SimpleQueue()  # messages of loader processes that could not read a case

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        """Raise an error if this configuration and fold cannot be trained, before anything is written.

        Returns:
            The plans, or a copy that also holds what was found in the data (`with_found`). They are stored in the
            checkpoint, and the predictor reads them.

        Raises:
            UserError: plans or `dataset.json` are damaged; the configuration does not exist; or see `check_depth`,
                `check_is_there`, `check_batch_fits` and `check_labeled_cases`.
        """
        about, file, fix = Path(dataset_json_file(plans)), plans_file(plans), PLAN_AGAIN
        check(plans, PLANS, file, fix)
        check_configuration(plans, configuration, file, fix)
        check_dataset_json(dataset_json, about)
        check_depth(plans, configuration)
        check_is_there(self.settings.pretrained_encoder)
        samples = PlansManager(plans).get_configuration(configuration).batch_size
        what = f"{file}: the batches of {configuration} are too large: {fix}"
        check_batch_fits(plans, configuration, samples, dataset_json, what)
        check_labeled_cases(join(nnUNet_preprocessed, plans["dataset_name"]), plans, configuration, fold)
        return plans

    def _set_batch_size_and_oversample(self):
        with told(self, self.ranks.of > 1):
            super()._set_batch_size_and_oversample()

    def _build_loss(self):
        with np.errstate(invalid="ignore"):
            loss: Any = super()._build_loss()
        if self.enable_deep_supervision and len(loss.weight_factors) == 1:
            # a network of two stages has one output; nnU-Net gives the last one weight 0, and divides 0 by 0
            loss.weight_factors = (1.0,)
        # a batch Dice is that of the batch of all ranks
        (loss.loss if self.enable_deep_supervision else loss).dc.ddp = self.ranks.of > 1
        return loss

    @staticmethod
    def build_network_architecture(
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build nnU-Net's network.

        The predictor calls this, too, with the plans of a model; see `check_architecture`.
        """
        check_architecture(configuration_manager.configuration, plans_manager.plans["plans_name"], OTHER_PLANS)
        return nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    @property
    def bare_network(self) -> Any:
        """The network inside the wrapper of torch.compile, or the network itself."""
        return bare(self.network)

    def initialize(self):
        with told(self, several=False):
            super().initialize()
        if self.ranks.of > 1 and self.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.ranks.copy_first(*self.trained_modules())
        self.dataset_class = ReadableCases(self.dataset_class, self.fixes(), self.reasons)
        self._take_first_weights()
        if self.settings.bfloat16_on_cpu and self.device.type == "cpu":
            run_in_bfloat16(self.network)

    def _take_first_weights(self) -> None:
        """Begin a new training with the weights of another model or of an encoder, if these are given."""
        if self.goes_on:
            return
        if model := os.environ.get(checkpoints.CONTINUE_FROM):
            fix = "give a model of the same trainer with the same network"
            with checkpoints.fitting({}, model, fix):
                self.begin_with(checkpoints.read(model, fix))
            self.print_to_log_file(f"this new training begins with the weights of {model}")
        elif encoder := self.settings.pretrained_encoder:
            self.print_to_log_file(load_pretrained_encoder(self.bare_network, encoder))

    def fixes(self) -> dict[str, str]:
        """For each folder of preprocessed cases, what to do if a case in it cannot be read."""
        fix = preprocess_again(self.plans_manager.plans, self.configuration_name)
        return {self.preprocessed_dataset_folder: f"{fix}, then continue with --c"}

    def set_deep_supervision_enabled(self, enabled: bool):
        with told(self, several=False):
            super().set_deep_supervision_enabled(enabled)

    def trained_modules(self) -> list[nn.Module]:
        """The modules whose parameters are trained, if they need a gradient.

        All processes begin with the same weights of these modules. Trained weights must stay finite.
        """
        return [self.network]

    def configure_optimizers(self):
        """Make nnU-Net's SGD and its learning rate schedule.

        On CUDA the SGD is fused, so that the gradient scaler does not wait for the GPU.
        """
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
        made, settings = super().get_training_transforms(*args, **kwargs), self.settings
        transforms = cast(ComposeTransforms, made)  # nnU-Net's annotation says less
        if settings.contrast_probability is not None:
            transforms = strengthened(transforms, settings.contrast_probability, "contrast")
        if settings.local_probability:
            transforms = with_local_changes(transforms, settings.local_probability)
        return transforms if settings.seed is None else repeatable(transforms)

    def do_split(self):
        with self.ranks.one_first():  # nnU-Net writes the splits if they are missing
            split: Any = super().do_split()  # names of cases; nnU-Net's annotations call them arrays
        self.labeled_cases, self.validation_cases, self.hidden_cases = take_labeled(
            split[0], split[1], self.settings.num_labeled, self.dataset_json
        )
        return self.labeled_cases, self.validation_cases

    @property
    def num_unlabeled(self) -> int:
        """The number of cases that are used without a label."""
        return 0

    def get_dataloaders(self):
        train, val = super().get_dataloaders()
        try:
            self.extend_loader(train)
            seed_workers(train, self.ranks.seed(self.settings.seed), self.current_epoch * self.num_iterations_per_epoch)
            next(train)  # starts the workers, as nnU-Net does
        except BaseException:
            stop(train)
            stop(val)
            raise
        return train, val

    def extend_loader(self, augmenter) -> None:
        """Change nnU-Net's training loader in place, before its workers start. Here it stays unchanged."""

    # ---------------------------------------------------------------------------------------------------- a training

    @contextmanager
    def alone(self, does: str) -> Iterator[None]:
        """While this block runs, no other process may use the folder of this training or preprocess its data again.

        Only commands and trainers of this package keep to it. Of several ranks the first one holds the locks.

        Raises:
            BusyError: another process uses the folder, or rewrites the preprocessed data.
            DiskError: the folder cannot be written.
        """
        with disk_errors(self.output_folder):
            if self.local_rank:
                yield
                return
            Path(self.output_folder).mkdir(parents=True, exist_ok=True)
            with only_one(Path(self.output_folder, LOCK), does), reading(Path(self.preprocessed_dataset_folder)):
                yield

    def refuse_a_second(self, plans: dict, configuration: str, fold) -> None:
        """Raise BusyError if another process runs this training already.

        Otherwise nnU-Net would begin a second log in the same folder.
        """
        name = f"{type(self).__name__}__{plans['plans_name']}__{configuration}"
        lock = Path(str(nnUNet_results), plans["dataset_name"], name, f"fold_{fold}", LOCK)
        if lock.exists() and not (distributed.is_available() and distributed.is_initialized()):
            with only_one(lock, "trains this model"):
                pass

    def run_training(self):
        """Run nnU-Net's training, and then end all processes and threads of the loaders, so that none prints later.

        Raises:
            BusyError, DiskError: see `alone`.
            UserError: see `quiet_loaders` and `end_unless_finite`.
        """
        with self.alone("trains this model"), quiet_loaders(self.reasons):
            if not self.local_rank:
                for half in Path(self.output_folder).glob("*.tmp"):  # from a training that was killed
                    half.unlink(missing_ok=True)
            try:
                super().run_training()
            except DiskError as error:
                there = any(Path(self.output_folder, file).is_file() for file in LAST)
                raise DiskError(f"{error}, with --c") if there else error from None
            finally:
                for loader in (self.dataloader_train, self.dataloader_val):
                    stop(loader)

    def perform_actual_validation(self, save_probabilities: bool = False):
        with self.alone("validates this model"), check_written(Path(self.output_folder, "validation")):
            super().perform_actual_validation(save_probabilities)

    def on_train_start(self):
        super().on_train_start()
        if not self.local_rank:
            plans = self.plans_manager  # first: if they cannot be stored, the settings of an older model stay
            store_given(Path(nnUNet_preprocessed, plans.dataset_name, f"{plans.plans_name}.json"), type(self))
            write_json(asdict(self.settings), Path(self.output_folder, SETTINGS))
        counts = len(self.labeled_cases), self.num_unlabeled, len(self.validation_cases)
        self.print_to_log_file(log_lines.cases_line(*counts))
        self.print_to_log_file(log_lines.settings_line(self.settings))

    def train_step(self, batch: dict) -> dict:
        """Run nnU-Net's training step. Several processes take the mean of their gradients."""
        if self.ranks.of == 1:
            return super().train_step(batch)
        data, target = tree_map(lambda x: x.to(self.device, non_blocking=True), (batch["data"], batch["target"]))
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(self.network(data), target)
        self.scaled(loss).backward()
        self.take_step([p for p in self.network.parameters() if p.requires_grad])
        return {"loss": loss.detach().cpu().numpy()}

    def autocast(self, enabled: bool = True):
        """A context with nnU-Net's mixed precision on CUDA. On other devices it does nothing."""
        return autocast(self.device.type, enabled=enabled) if self.device.type == "cuda" else dummy_context()

    def scaled(self, loss: Tensor) -> Tensor:
        """Scale the loss for the backward pass under mixed precision."""
        return loss if self.grad_scaler is None else self.grad_scaler.scale(loss)

    def take_step(self, parameters: list[nn.Parameter]) -> None:
        """Average, unscale and clip the gradients, then let the optimizer step, as nnU-Net does."""
        self.ranks.mean_gradients(parameters)
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(parameters, 12)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()

    def print_to_log_file(self, *args, **kwargs):
        if not self.local_rank:
            super().print_to_log_file(*args, **kwargs)

    def on_train_epoch_end(self, train_outputs: list[dict]):
        super().on_train_epoch_end(train_outputs)
        self.end_unless_finite()

    def on_epoch_end(self):
        super().on_epoch_end()
        if left := self.num_epochs - self.current_epoch:
            starts, ends = (self.logger.get_value(f"epoch_{name}_timestamps", None) for name in ("start", "end"))
            durations = [end - start for start, end in zip(starts, ends, strict=True)]
            self.print_to_log_file(log_lines.expected_end(durations, left, datetime.now()))

    def end_unless_finite(self) -> None:
        """End a training whose loss or weights are not finite, before its weights replace the last good ones.

        It is called once for each epoch, because the CPU must wait for the GPU to look at the weights.

        Raises:
            UserError: the loss of the epoch or the weights are not finite.
        """
        weights = (p for module in self.trained_modules() for p in module.parameters() if p.requires_grad)
        what = what_is_not_finite(self.logger.local_logger.my_fantastic_logging, weights)
        if what is None:
            return
        there = [file for file in LAST if Path(self.output_folder, file).is_file()]
        kept = f"{there[0]} is kept" if there else "no checkpoint was written"
        again = "continue with --c or train again" if there else "train again"
        raise UserError(
            f"{self.output_folder}: epoch {self.current_epoch}: {what}: the training ends here; {kept}: look for images"
            f" with extreme intensities, or give a loss term a smaller weight, and {again}"
        )

    # --------------------------------------------------------------------------------------------------- checkpoints

    def collect_checkpoint(self) -> dict:
        """nnU-Net's checkpoint with one more key, `settings`: all settings of the trainer, with those not given."""
        with told(self, several=False):
            return checkpoints.collect(super().save_checkpoint) | {"settings": asdict(self.settings)}

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint completely or not at all. Only the first rank writes.

        Raises:
            DiskError: the disk is full or read-only.
        """
        if self.local_rank:
            return None
        if self.disable_checkpointing:
            return super().save_checkpoint(filename)
        checkpoints.write(self.collect_checkpoint(), filename)

    def load_checkpoint(self, checkpoint: dict | str | os.PathLike) -> None:
        """Load a checkpoint from a file or from a dictionary, to continue or to validate.

        nnU-Net's signature allows a dictionary, but version 2.8.1 fails on one.

        Raises:
            UserError: the file is damaged; the checkpoint does not fit; or, with `--c`, it was trained with other
                settings, and the user has not accepted the new ones.
        """
        plans = self.plans_manager
        command = f"nnUNetv2_train {plans.dataset_name} {self.configuration_name} {self.fold}"
        command += f" -tr {type(self).__name__} -p {plans.plans_name} --c"
        fix = f"remove it and run {command}, which continues from another checkpoint or begins again"
        name = "the checkpoint" if isinstance(checkpoint, dict) else str(checkpoint)
        content = checkpoints.read(checkpoint, fix)
        self.check_checkpoint(content, name)
        before = content["init_args"].get("plans", plans.plans)
        used = content.get("settings")
        changed = changed_settings(type(self), before, plans.plans, used if isinstance(used, dict) else None)
        if self.goes_on and not os.environ.get(ACCEPT_CHANGES):
            self._refuse_other_settings(changed, name)
        own = self.my_init_kwargs
        with checkpoints.fitting(changed, name, fix), told(self, several=False):
            with checkpoints.as_file(checkpoint) as file:
                super().load_checkpoint(file)
            self.restore(content)
        self.my_init_kwargs = own  # nnU-Net has taken the checkpoint's, which hold the old settings
        for setting, (old, new) in changed.items() if self.goes_on else ():
            self.print_to_log_file(f"continuing with another setting: {setting} was {old} and is {new}")

    def _refuse_other_settings(self, changed: dict[str, tuple[Any, Any]], name: str) -> None:
        """The same as `refuse_other_settings`. It also removes the new log, because nothing was trained."""
        try:
            checkpoints.refuse_other_settings(changed, name)
        except UserError:
            Path(self.log_file).unlink(missing_ok=True)
            raise

    def begin_with(self, checkpoint: dict) -> None:
        """Take the weights of another training, and nothing else. This training begins at epoch 0."""
        self.bare_network.load_state_dict(checkpoint["network_weights"])

    def check_checkpoint(self, checkpoint: dict, name: str) -> None:
        """Raises UserError if the checkpoint is of another kind of training. Here every kind is accepted."""

    def restore(self, checkpoint: dict) -> None:
        """Restore from a checkpoint what nnU-Net itself does not restore."""


def dataset_json_file(plans: dict) -> str:
    """The path of the `dataset.json` that a trainer reads, for messages."""
    return str(base_folder("nnUNet_preprocessed") / str(plans.get("dataset_name")) / "dataset.json")


def plans_file(plans: dict) -> Path:
    """The path of the plans that a trainer reads, for messages."""
    return Path(dataset_json_file(plans)).with_name(f"{plans.get('plans_name')}.json")


def bare(module: nn.Module) -> Any:
    """The module inside the wrapper of torch.compile, or the module itself."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module
