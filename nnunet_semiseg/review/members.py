"""An ensemble of trained networks, and its prediction of a case."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from torch import Tensor

from nnunet_semiseg.data.image_problems import read_images
from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.review.estimates import classes_of
from nnunet_semiseg.runs import Run
from nnunet_semiseg.training import checkpoint as checkpoints

BEST = "checkpoint_best.pth"
TITLES = {
    "folds": "folds of the model",
    "seeds": "trainings with other seeds",
    "mirroring": "mirrored predictions of the model",
    "teacher": "student and teacher of the model",
    "snapshots": "last and best checkpoint of the model",
    "single": "one prediction",
}
"""The kinds of ensembles. Those that ranked cases better by their agreement come first (docs/review.md). Mirrored
predictions cost half as much as the two kinds below them."""


@dataclass(frozen=True)
class Member:
    """One member of an ensemble.

    Attributes:
        name: what `review.html` calls the model, such as `fold 0` or `teacher`.
        checkpoint: the file with its weights.
        part: which weights of the file are used: `deployed`, `student` or `teacher`.
        flips: the axes along which the image is mirrored for this member.
    """

    name: str
    checkpoint: Path
    part: str = "deployed"
    flips: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The prediction of a case by an ensemble, on the grid of the image.

    Attributes:
        mask: the mask from the mean logits of all members, (*S).
        members: the mask of each member. It is on the grid of the network, so that no resampling is needed.
        probabilities: the probabilities from the mean logits of all members, (K, *S).
        features: the deepest features of the encoder of the first member, averaged over the image. Empty if the network
            has no encoder.
        image: as nnU-Net's reader returns it, (C, *S).
        properties: those of the reader, and what preprocessing adds to them.
    """

    mask: np.ndarray
    members: list[np.ndarray]
    probabilities: np.ndarray
    features: list[float]
    image: np.ndarray
    properties: dict


def find_members(run: Run, kind: str, mirroring: bool) -> tuple[str, list[Member]]:
    """Find the members of an ensemble of this kind. For `auto`, take the first kind that has several members.

    Args:
        run: a finished training.
        kind: a key of `TITLES`, or `auto`.
        mirroring: whether each mirrored prediction of a model is a member. If False, a model is one member. The kinds
            `mirroring` and `single` do not depend on it.

    Raises:
        UserError: there is no such ensemble; or a checkpoint is damaged.
    """
    for each in [kind] if kind != "auto" else [k for k in TITLES if k != "mirroring" or mirroring]:
        models = list(_models(run, each))
        if len(models) > 1 or each == "single":
            return each, list(_mirrored(models, run)) if mirroring and each != "single" else models
        if each == "mirroring" and len(members := list(_mirrored(models, run))) > 1:
            return each, members
    fix = {"folds": "train further folds", "seeds": "train with compare --seeds"}
    how = fix.get(kind, "use --ensemble auto")
    raise UserError(f"{run.model_folder}: --ensemble {kind}: this ensemble has fewer than two members: {how}")


def _mirrored(models: Sequence[Member], run: Run) -> Iterator[Member]:
    axes = run.load_checkpoint().get("inference_allowed_mirroring_axes") or ()
    for n in range(len(axes) + 1):
        for flips in itertools.combinations(axes, n):
            yield from (replace(model, flips=flips) for model in models)


def _models(run: Run, kind: str) -> Iterator[Member]:
    if kind == "folds" and run.fold != "all":
        for folder in sorted(run.model_folder.glob("fold_[0-9]*")):
            if (folder / run.checkpoint.name).is_file():
                yield Member(folder.name.replace("_", " "), folder / run.checkpoint.name)
    elif kind == "seeds":
        name = f"{run.trainer}__{run.base_plans.partition('_seed')[0]}"
        for folder in sorted(run.model_folder.parent.glob(f"{name}*__{run.configuration}")):
            plans = folder.name.split("__")[1].removeprefix(run.base_plans.partition("_seed")[0])
            if (plans == "" or plans.removeprefix("_seed").isdecimal()) and (
                file := folder / run.folder.name / run.checkpoint.name
            ).is_file():
                yield Member(plans.lstrip("_") or "as in the plans", file)
    elif kind == "teacher":
        content = run.load_checkpoint()
        if content.get("teacher") is not None:
            yield Member("student", run.checkpoint, "student")
            yield Member("teacher", run.checkpoint, "teacher")
    elif kind == "snapshots":
        yield Member("last", run.checkpoint)
        if (best := run.folder / BEST).is_file() and _epoch(best) != _epoch(run.checkpoint):  # else they are equal
            yield Member("best", best)
    else:
        yield Member("last", run.checkpoint)


def _epoch(checkpoint: Path) -> int:
    return checkpoints.read(checkpoint, "train this model again", mmap=True)["current_epoch"]


def weights_of(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """Read a member's weights. Raises UserError if the checkpoint is damaged."""
    content = checkpoints.read(checkpoint, "train this model again", mmap=True)
    if part == "teacher":
        return content["teacher"]
    student = content.get("semiseg", {}).get("student") if part == "student" else None
    return student or content["network_weights"]


class Ensemble:
    """Members that predict one after the other. They share one network, and each loads its weights into it.

    Args:
        run: a model with the same network as all members.
        device: cuda, cpu or mps.
        mirroring: whether each member is averaged over mirrored images, as nnU-Net does.
    """

    def __init__(self, run: Run, members: Sequence[Member], device: str, mirroring: bool):
        with contextlib.redirect_stdout(io.StringIO()):
            self.predictor: Any = load_predictor(run)
        self.predictor.device = torch.device(device)
        self.predictor.perform_everything_on_device = device == "cuda"
        self.predictor.use_mirroring = mirroring
        read = cache(weights_of)
        self.members = [(member, read(member.checkpoint, member.part)) for member in members]
        self.plans_manager, self.configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        self.dataset_json, self.label_manager = self.predictor.dataset_json, self.predictor.label_manager
        self.reader = self.plans_manager.image_reader_writer_class

    @property
    def labels(self) -> dict:
        """The labels in the model's dataset.json."""
        return self.dataset_json["labels"]

    def of_classes(self, probabilities: np.ndarray) -> Mapping[str, np.ndarray]:
        """The probability (*S) of each class or region, by name."""
        names = list(classes_of(self.labels))
        if self.label_manager.has_regions:
            return dict(zip(names, probabilities, strict=True))
        return {name: probabilities[self.labels[name]] for name in names}

    def predict(self, images: list[str]) -> Prediction:
        """Predict the case in these files with all members. Nothing is written.

        Raises:
            UserError: a file is damaged or cannot be read; see `read_images`.
        """
        image, properties = read_images(images, self.reader)
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        with contextlib.redirect_stdout(io.StringIO()):
            data, _, properties = preprocessor.run_case_npy(
                image, None, properties, self.plans_manager, self.configuration, self.dataset_json
            )
            total: Any = 0.0
            masks, features = [], []
            for i, (member, weights) in enumerate(self.members):
                with self._watched(features if i == 0 else []):
                    logits = self._logits(torch.from_numpy(data), member, weights)
                masks.append(np.asarray(self.label_manager.convert_logits_to_segmentation(logits)).astype(np.int16))
                total = total + logits
            mask, probabilities = self._on_image(total / len(self.members), properties)
        pooled = torch.stack(features).mean(0).tolist() if features else []
        return Prediction(mask, masks, probabilities, pooled, image, properties)

    def _logits(self, data: Tensor, member: Member, weights: dict[str, Tensor]) -> Tensor:
        axes = [axis + data.ndim - len(self.configuration.patch_size) for axis in member.flips]
        self.predictor.list_of_parameters = [weights]
        logits = self.predictor.predict_logits_from_preprocessed_data(data.flip(axes) if axes else data)
        return (logits.flip(axes) if axes else logits).float()

    def _on_image(self, logits: Tensor, properties: dict) -> Any:
        """Convert logits to the mask and the probabilities on the image's grid."""
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans_manager, self.configuration, self.label_manager, properties, True,
            torch.get_num_threads(),
        )  # fmt: skip

    @contextlib.contextmanager
    def _watched(self, features: list[Tensor]) -> Iterator[None]:
        """Collect the deepest features of every patch that the network sees in this `with` block."""
        encoder = getattr(self.predictor.network, "encoder", None)
        if encoder is None:
            yield
            return

        def take(module, inputs, outputs):
            deepest = outputs[-1] if isinstance(outputs, (list, tuple)) else outputs
            features.append(deepest.float().flatten(2).mean((0, 2)).cpu())

        handle = encoder.register_forward_hook(take)
        try:
            yield
        finally:
            handle.remove()
