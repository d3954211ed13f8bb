"""What the tests of trainers share: a small untrained text tower, and trainers on tiny data sets."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from safetensors.torch import save_file

from nnunet_semiseg.discovery import iter_classes
from nnunet_semiseg.files import write_json
from nnunet_semiseg.runs import Run
from nnunet_semiseg.settings.plans import update_settings
from nnunet_semiseg.text.open_clip_models import load_clip
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.vlm.model import AMVLM

TRAINERS = sorted(
    (t for t in iter_classes("trainers") if issubclass(t, SemiSupervisedTrainer)), key=lambda t: t.__name__
)
"""every semi-supervised method there is; a new one is tested by being there"""

SHORT = {"num_epochs": 3, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "save_every": 1, "seed": 7}

PLANS = "nnUNetSemiSegSmallPlans"

CLASSES = LabelManager({"background": 0, "a": 1}, None)
REGIONS = LabelManager({"background": 0, "both": (1, 2), "b": (2,)}, [1, 2])


def write_text_tower(folder: Path) -> Path:
    """A text encoder small enough for tests, in open_clip's own format, with no weights: untrained."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    return folder


def write_vlm(folder: Path) -> Path:
    """What `pretrain_vlm` leaves, of small towers with random weights."""
    write_text_tower(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"image_size": 32, "patch_size": 8}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    vlm = AMVLM(*load_clip(str(folder), "none"), dim=16, hidden=32)
    save_file(vlm.state_dict(), folder / "vlm.safetensors")
    (folder / "vlm.json").write_text(json.dumps({"settings": {"dim": 16, "hidden": 32}}))
    return folder


def settings_for(dataset, **settings) -> dict:
    base = dataset.raw.parent
    tower = write_text_tower(base / "text_tower")
    vlm = base / "vlm" if (base / "vlm").is_dir() else write_vlm(base / "vlm")
    return {**SHORT, "text_model": str(tower), "text_pretrained": "none", "vlm": str(vlm), **settings}


def make_trainer(trainer_class: type[nnUNetTrainer], dataset, fold="all", plans=PLANS, **settings) -> nnUNetTrainer:
    """A trainer as `nnUNetv2_train` makes it, on the CPU, with these settings in its plans."""
    plans = update_settings(dataset.plans(plans), settings_for(dataset, **settings))
    plans["continue_training"] = False
    dataset_json = json.loads((dataset.preprocessed / "dataset.json").read_text())
    return trainer_class(plans, dataset.configuration, fold, dataset_json, torch.device("cpu"))


def bare_trainer(
    trainer_class: type[nnUNetTrainer], label_manager=CLASSES, progress: float = 1.0, **settings
) -> nnUNetTrainer:
    """A trainer's formulas, without data and network: one output, the loss is nnU-Net's cross entropy alone."""
    trainer = trainer_class.__new__(trainer_class)
    trainer.settings, trainer.label_manager = trainer_class.settings_class(**settings), label_manager
    trainer.loss, trainer.enable_deep_supervision = nnunet_loss(label_manager.has_regions, weight_dice=0), False
    trainer.step, trainer.num_epochs, trainer.num_iterations_per_epoch = progress, 1, 1
    return trainer


def in_last_epoch(trainer_class: type[nnUNetTrainer], dataset, **settings) -> nnUNetTrainer:
    """A trainer when all that its method has takes part, pseudo-labels of whole cases, too."""
    trainer = make_trainer(trainer_class, dataset, num_epochs=2, dca_start=0.0, **settings)
    trainer.on_train_start()
    trainer.current_epoch, trainer.step = 1, trainer.num_iterations_per_epoch
    trainer.on_train_epoch_start()
    return trainer


def write_settings(dataset, plans=PLANS, **settings) -> None:
    """Put settings into the plans' file, for trainings through nnU-Net's commands."""
    file = dataset.preprocessed / f"{plans}.json"
    changed = update_settings(json.loads(file.read_text()), settings_for(dataset, **settings))
    file.write_text(json.dumps(changed))


def nnunet_loss(regions: bool, **weights):
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        return DC_and_BCE_loss({}, dice, dice_class=MemoryEfficientSoftDiceLoss, **weights)
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss, **weights)


def save_untrained(trainer_class: type[nnUNetTrainer], dataset) -> tuple[Run, nnUNetTrainer]:
    """What is left of a training that ended at once: a model folder with the last checkpoint."""
    write_settings(dataset)
    trainer = make_trainer(trainer_class, dataset)
    trainer.initialize()
    run = Run(dataset.name, dataset.configuration, "all", trainer_class.__name__, PLANS)
    run.folder.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(run.checkpoint))
    write_json(trainer.plans_manager.plans, run.model_folder / "plans.json")
    write_json(trainer.dataset_json, run.model_folder / "dataset.json")
    return run, trainer
