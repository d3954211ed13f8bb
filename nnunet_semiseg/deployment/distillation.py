"""`nnunet_semiseg distill`: train the network of the plans to predict like a trained model of any trainer."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.data.augmentation import limited
from nnunet_semiseg.data.empty_channels import keep_empty
from nnunet_semiseg.data.unlabeled_manifest import load_manifest
from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.devices import check_device
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import LOCK, SETTINGS, dataset_folder, disk_errors, only_one, read_json, write_json
from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.runs import Run
from nnunet_semiseg.schema import load_plans, read_dataset_json
from nnunet_semiseg.settings.base import SemiSupervisedSettings, Weight
from nnunet_semiseg.settings.plans import FOUND_KEY, PLANS_KEY, parse_assignments, settings_from
from nnunet_semiseg.training import checkpoint as checkpoints
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.passes import run_in_bfloat16
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer

STOCK_TRAINER = "nnUNetTrainer"
ORIGIN = "distillation.json"
"""The file in the folder of a fold that says which checkpoint and settings the distillation uses."""
STOCK_KEYS = (
    "network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch", "init_args",
    "inference_allowed_mirroring_axes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(SemiSupervisedSettings):
    """Settings of `DistillationTrainer`: temperature T, and weight w of the loss towards the model that teaches."""

    temperature: Annotated[float, Bounds(1e-3)] = 2.0
    """The temperature of the softmax of both models. The higher it is, the softer the probabilities that are learnt."""
    distillation_weight: Weight = 1.0
    """The weight of the loss towards the predictions of the model that is distilled."""


class DistillationTrainer(SemiSupervisedTrainer[DistillationSettings]):
    """Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (arXiv 1503.02531).

    L = nnU-Net's loss on the labelled patches + w `soft_target_loss` on all patches, at full resolution. Of an
    unlabelled patch, the model that teaches sees the weak view, and the network that is trained sees the strong view.
    This trainer is not in `trainers/`, because it cannot be trained by name: it needs a model.
    """

    views = ("weak", "strong")
    model: nn.Module
    """The model that teaches. It turns images into logits. Set it before the training."""
    mirroring_axes: Sequence[int] | None
    """The axes along which the model that teaches may be mirrored when it predicts. The new model may be mirrored along
    them, too."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Take nnU-Net's ranges. If the model that teaches may not be mirrored along an axis, leave out that flip.

        Then rotations are limited, too, because a large one also exchanges sides.
        """
        rotation, dummy_2d, patch_size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        allowed = tuple(axis for axis in axes if axis in (self.mirroring_axes or ()))
        if allowed != axes:
            rotation = limited(rotation)
        self.inference_allowed_mirroring_axes = allowed or None
        return rotation, dummy_2d, patch_size, allowed

    def get_training_transforms(self, *args, **kwargs):
        """Take nnU-Net's transforms.

        But an empty channel stays empty: otherwise it becomes noise, which looks like an image.
        """
        transforms = super().get_training_transforms(*args, **kwargs)
        return keep_empty(transforms, self.plans_manager, self.configuration_manager)

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        streams = batch.streams("strong")
        outputs = self.each(self.network, *(images for images, _, _ in streams))
        for seen, (_, target, share) in zip((batch.images, batch.views["weak"]), streams, strict=True):
            with torch.no_grad():
                taught = self.model(seen)
            output = next(outputs)
            terms = {} if target is None else {"supervised": self.loss(output, target)}
            loss = soft_target_loss(
                self.finest(output), taught, self.settings.temperature, self.label_manager.has_regions
            )
            del output
            yield terms | {"distillation": share * self.settings.distillation_weight * loss}


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float, regions: bool) -> Tensor:
    """T^2 KL(teacher || student) of the probabilities at temperature T: the mean over voxels (and over regions).

    Args:
        student, teacher: logits (B, heads, *S). The logits of the teacher get no gradient.
        regions: each head has a sigmoid and its own KL. If False, the heads share a softmax.
    """
    student, teacher = student.float() / temperature, teacher.detach().float() / temperature
    if regions:
        p = teacher.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(student, p)
        entropy = torch.special.entr(torch.stack((p, 1 - p))).sum(0).mean()
        return temperature**2 * (cross_entropy - entropy)
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    return temperature**2 * kl.sum(1).mean()


def distill(run: Run, settings: Iterable[str] = (), device: str = "cuda") -> Path:
    """Train nnU-Net's own network on the output of a model, and save it as a model of `nnUNetTrainer`.

    An interrupted distillation is continued; a finished one is not repeated. The plans get the name PLANS_from_TRAINER.

    Args:
        run: the finished training of the model that teaches.
        settings: `KEY=VALUE`, settings of the distillation (`DistillationSettings`). The plans give all other settings.

    Returns:
        The folder of the new model.

    Raises:
        UserError: the model is not trained, or its checkpoint is damaged; a setting does not belong to the
            distillation; there is no unlabelled data or no such device; another distillation is in the same place.
        BusyError: another process distils this model.
        DiskError: the disk is full or read-only.
    """
    check_device(device)
    predictor = load_predictor(run)
    # until the end: the trainer's own lock is free between training, validation and the last steps
    with only_one(run.model_folder.with_name(f".{run.model_folder.name}__fold_{run.fold}.lock"), "distils this model"):
        return _distill(run, predictor, settings, device)


def _distill(run: Run, predictor: nnUNetPredictor, settings: Iterable[str], device: str) -> Path:
    plans = load_plans(run.model_folder / "plans.json", "train this model again")
    plans = with_settings(plans, parse_assignments(settings)) | {"plans_name": f"{run.plans}_from_{run.trainer}"}
    digest = hashlib.sha256(run.checkpoint.read_bytes()).hexdigest()
    origin = {"checkpoint": digest, "settings": plans[PLANS_KEY]}
    stock = run.model_folder.parent / f"{STOCK_TRAINER}__{plans['plans_name']}__{run.configuration}"
    training = Run(run.dataset, run.configuration, run.fold, DistillationTrainer.__name__, plans["plans_name"])
    if (stock / run.folder.name / "checkpoint_final.pth").is_file():
        check_same(origin, stock / run.folder.name / ORIGIN, "finished")
        discard(training)  # it has been published
        print(f"{stock / run.folder.name}: exists already; remove it to distil again")
        return stock
    begun = training.is_begun
    if begun:
        check_same(origin, training.folder / ORIGIN, "begun")

    if device == "cuda":  # as in nnU-Net's training command
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
    dataset_json = read_dataset_json(run.model_folder)
    fold = run.fold if run.fold == "all" else int(run.fold)
    # the trainer checks this, too, but here the message can name the plans that exist
    load_manifest(dataset_folder("nnUNet_preprocessed", run.dataset), plans | {"plans_name": run.plans},
                  run.configuration, run.dataset)  # fmt: skip
    # nnU-Net's own key, which its command sets in the same way
    trainer = DistillationTrainer(
        plans | {"continue_training": begun}, run.configuration, fold, dataset_json, torch.device(device)
    )
    trainer.model, trainer.mirroring_axes = predictor.network.to(trainer.device), predictor.allowed_mirroring_axes
    if trainer.settings.bfloat16_on_cpu and device == "cpu":
        run_in_bfloat16(trainer.model)
    write_json(origin, Path(trainer.output_folder) / ORIGIN)
    maybe_load_checkpoint(trainer, begun, False)
    trainer.run_training()
    trainer.perform_actual_validation()
    publish(Path(trainer.output_folder), stock, plans["plans_name"])
    discard(training)
    return stock


def check_same(origin: dict, file: Path, state: str) -> None:
    """Raise UserError if a distillation of another model, or with other settings, would be continued or reused."""
    before = read_json(file, f"remove {file.parent} to distil again")
    old, new = before["settings"], origin["settings"]
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changed += ["the trained model"] if before["checkpoint"] != origin["checkpoint"] else []
    if changed:
        raise UserError(
            f"{file.parent}: holds a distillation that was {state}, but {', '.join(changed)} changed since then:"
            " remove that folder to begin again"
        )


def discard(training: Run) -> None:
    """Remove the folder of a training after `publish` has copied what is needed from it.

    If it was the last fold of `DistillationTrainer`, its model's folder is removed, too.
    """
    shutil.rmtree(training.folder, ignore_errors=True)
    if not any(training.model_folder.glob("fold_*")):
        shutil.rmtree(training.model_folder, ignore_errors=True)


def with_settings(plans: dict, changes: dict) -> dict:
    """A copy of the plans with these settings of the distillation.

    Raises:
        UserError: the distillation has no such setting, or its value is wrong.
    """
    settings_from(DistillationSettings, changes)
    return {**plans, PLANS_KEY: {**plans.get(PLANS_KEY, {}), **changes}}


def publish(trained: Path, stock: Path, plans_name: str) -> None:
    """Make a model of `nnUNetTrainer` (a stock model) from a trained fold. Its checkpoint is written last.

    Args:
        trained: the folder of a trained fold, whose network is that of the plans.
        stock: the folder of the stock model.
        plans_name: the name of its plans.

    Raises:
        UserError: the plans or the checkpoint of the trained fold are damaged.
        DiskError: the disk is full or read-only. Run the same command again to continue.
    """
    fold = stock / trained.name
    with disk_errors(stock):
        shutil.copytree(trained, fold, ignore=shutil.ignore_patterns("*.pth", SETTINGS, LOCK), dirs_exist_ok=True)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            if (trained.parent / name).is_file():
                shutil.copy(trained.parent / name, stock)
        plans = load_plans(trained.parent / "plans.json", "train again")
        write_json(without_settings(plans) | {"plans_name": plans_name}, stock / "plans.json")
        checkpoint = checkpoints.read(trained / "checkpoint_final.pth", f"remove {trained} and train again")
        checkpoint = {key: checkpoint[key] for key in STOCK_KEYS} | {"trainer_name": STOCK_TRAINER}
        own = without_settings(checkpoint["init_args"]["plans"]) | {"plans_name": plans_name}
        checkpoint["init_args"] = checkpoint["init_args"] | {"plans": own}
        checkpoints.write(checkpoint, fold / "checkpoint_final.pth")


def without_settings(plans: dict) -> dict:
    """The plans as nnU-Net's own trainers have them, without the settings and results that this package adds."""
    return {key: value for key, value in plans.items() if key not in (PLANS_KEY, FOUND_KEY)}
