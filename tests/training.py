"""What the tests of trainers share: a small untrained text tower, and trainers on tiny data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from safetensors.torch import save_file
from torch import Tensor

from nnunet_semiseg.discovery import iter_classes
from nnunet_semiseg.files import write_json
from nnunet_semiseg.networks.multi_decoder import Encoded
from nnunet_semiseg.runs import Run
from nnunet_semiseg.settings.plans import update_settings
from nnunet_semiseg.text.open_clip_models import load_clip
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.decisions import Decisions
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


TOWERS = TemporaryDirectory()
"""removed when the tests end"""


@cache
def towers() -> tuple[Path, Path]:
    """The folders of a text tower and of a VLM, the same for all tests: none writes to them."""
    return write_text_tower(Path(TOWERS.name) / "text_tower"), write_vlm(Path(TOWERS.name) / "vlm")


def settings_for(**settings) -> dict:
    tower, vlm = towers()
    return {**SHORT, "text_model": str(tower), "text_pretrained": "none", "vlm": str(vlm), **settings}


def make_trainer(
    trainer_class: type[nnUNetTrainer], dataset, fold="all", plans=PLANS, goes_on=False, **settings
) -> nnUNetTrainer:
    """A trainer as `nnUNetv2_train` makes it, on the CPU, with these settings in its plans; `goes_on` is `--c`."""
    plans = update_settings(dataset.plans(plans), settings_for(**settings), trainer_class)
    plans["continue_training"] = goes_on
    dataset_json = json.loads((dataset.preprocessed / "dataset.json").read_text())
    return trainer_class(plans, dataset.configuration, fold, dataset_json, torch.device("cpu"))


class Echo:
    """A network that says what it is shown: its features are the image, its logits are a part of the channels.

    Args:
        decoders: how many; decoder i says the i-th part of the channels.
        main: the one that a call of the network runs.
    """

    def __init__(self, decoders: int = 1, main: int = 0):
        self.decoders, self.main = decoders, main

    def __call__(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x).skips)

    def encode(self, x: Tensor, text: Tensor | None = None) -> Encoded:
        return Encoded([x], None)

    def decode(self, skips: list[Tensor], decoder: int = 0) -> Tensor:
        return skips[-1].chunk(self.decoders, 1)[self.main + decoder]


def bare_trainer(
    trainer_class: type[nnUNetTrainer],
    label_manager=CLASSES,
    progress: float = 1.0,
    network: Callable[[Tensor], Tensor] | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
    **settings,
) -> nnUNetTrainer:
    """A trainer's formulas, without data: the images are the logits, if not said otherwise (`Echo`).

    There is one output, the loss is nnU-Net's cross entropy alone, and nothing is flipped.
    """
    trainer = trainer_class.__new__(trainer_class)
    trainer.settings, trainer.label_manager = trainer_class.settings_class(**settings), label_manager
    trainer.loss, trainer.enable_deep_supervision = nnunet_loss(label_manager.has_regions, weight_dice=0), False
    trainer.step, trainer.num_epochs, trainer.num_iterations_per_epoch = progress, 1, 1
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    trainer.network, trainer.teacher, trainer.auxiliary = network or Echo(), teacher or Echo(), {}
    foreground = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    trainer.decide = Decisions(label_manager, [str(label) for label in foreground], trainer.device)
    trainer.inference_allowed_mirroring_axes = None
    trainer.configuration_manager = SimpleNamespace(patch_size=(8, 8, 8), spacing=(1.0, 1.0, 1.0))
    return trainer


def batch_of(images: Tensor, target=None, extra: dict | None = None, cases=(), **views: Tensor) -> Batch:
    """A batch of these images and views; without a target all voxels are background (of classes)."""
    target = torch.zeros_like(images[:, :1]) if target is None else target
    return Batch(images=images, target=target, views=views, extra=extra or {}, cases=list(cases))


def terms_of(trainer: nnUNetTrainer, batch: Batch, text: Tensor | None = None) -> dict[str, Tensor]:
    """The terms of a step without its backward passes, those of the same name added up.

    Args:
        text: features (K, d), for a method that is guided by them.
    """
    terms: dict[str, Tensor] = {}
    for group in trainer.losses(batch) if text is None else trainer.guided_losses(batch, text):
        for name, term in group.items():
            terms[name] = terms[name] + term if name in terms else term
    return terms


def in_last_epoch(trainer_class: type[nnUNetTrainer], dataset, **settings) -> nnUNetTrainer:
    """A trainer when all that its method has takes part, pseudo-labels of whole cases, too."""
    trainer = make_trainer(trainer_class, dataset, num_epochs=2, dca_start=0.0, **settings)
    trainer.on_train_start()
    begin_last_epoch(trainer)
    return trainer


def begin_last_epoch(trainer: nnUNetTrainer) -> None:
    trainer.current_epoch = trainer.num_epochs - 1
    trainer.step = trainer.current_epoch * trainer.num_iterations_per_epoch
    trainer.on_train_epoch_start()


def write_settings(dataset, plans=PLANS, **settings) -> None:
    """Put settings into the plans' file, for trainings through nnU-Net's commands."""
    file = dataset.preprocessed / f"{plans}.json"
    changed = update_settings(json.loads(file.read_text()), settings_for(**settings))
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
