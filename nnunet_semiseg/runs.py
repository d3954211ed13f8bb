"""One training of a comparison: its plans, its folders, and its results on disk.

A run with a seed or with fewer labels has its own plans: a copy with another name and these settings. nnU-Net names its
output folders after the plans, so that every run has its own folder. Stock commands load it with `-p PLANS_seed1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_semiseg.discovery import find_class
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import SETTINGS, base_folder, read_json, reading, write_json
from nnunet_semiseg.schema import check, load_plans, read_dataset_json, resolved
from nnunet_semiseg.settings.plans import locked, settings_of, update_settings

RESOURCES = "resources.json"
"""A file in the folder of a run: the peak of the memory that the training needed. It exists if `compare` started it."""

PLAN_FIRST = "plan first with nnunet_semiseg plan_and_preprocess, or name other plans with -p"

RECORD = "prediction.json"
"""A file in a folder of predictions: how they were made, and how long it took. It is written last."""


@dataclass(frozen=True)
class Run:
    """A training, finished or not.

    Attributes:
        dataset: the full name of the dataset.
        fold: the number of the fold, or `all`.
        base_plans: the plans without this run's own settings.
        seed, num_labeled: settings of this run. None: the values of the base plans.
    """

    dataset: str
    configuration: str
    fold: str
    trainer: str
    base_plans: str
    seed: int | None = None
    num_labeled: int | None = None

    @property
    def plans(self) -> str:
        parts = [self.base_plans]
        parts += [f"{self.num_labeled}labeled"] if self.num_labeled is not None else []
        parts += [f"seed{self.seed}"] if self.seed is not None else []
        return "_".join(parts)

    @property
    def name(self) -> str:
        return f"{self.trainer}__{self.plans}"

    @property
    def repetition(self) -> str:
        """Which of the runs of its trainer this is: `seed 1`, or `as in the plans` if the run has no seed of its own.

        For nnU-Net's own trainers it is `run 1`, because they do not use the seed.
        """
        if self.seed is None:
            return "as in the plans"
        return f"{'seed' if has_settings(self.trainer) else 'run'} {self.seed}"

    @property
    def title(self) -> str:
        parts = [f"{self.num_labeled} labelled"] if self.num_labeled is not None else []
        parts += [self.repetition] if self.seed is not None else []
        return ", ".join([self.trainer, *parts])

    @property
    def model_folder(self) -> Path:
        return base_folder("nnUNet_results") / self.dataset / f"{self.name}__{self.configuration}"

    @property
    def folder(self) -> Path:
        return self.model_folder / f"fold_{self.fold}"

    @property
    def fold_name(self) -> str:
        """The name of the model and its fold, without the dataset."""
        return f"{self.model_folder.name}__{self.folder.name}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint_final.pth"

    @property
    def settings_file(self) -> Path:
        """The file with the settings of the training. It is written when the training begins."""
        return self.folder / SETTINGS

    @property
    def is_trained(self) -> bool:
        return self.checkpoint.is_file()

    @property
    def validation(self) -> Path:
        """The folder of nnU-Net's predictions for the validation cases of the fold.

        They are made after the training.
        """
        return self.folder / "validation"

    @property
    def is_validated(self) -> bool:
        """Whether the predictions of the validation cases are complete and from the last checkpoint."""
        summary = self.validation / "summary.json"
        return self.is_trained and summary.is_file() and summary.stat().st_mtime >= self.checkpoint.stat().st_mtime

    def load_checkpoint(self) -> dict:
        """Load the last checkpoint. Its tensors stay on the disk until they are used.

        Raises:
            UserError: the file is damaged, or can run code.
        """
        from nnunet_semiseg.training import checkpoint as checkpoints  # it needs torch

        command = (
            f"nnUNetv2_train {self.dataset} {self.configuration} {self.fold} -tr {self.trainer} -p {self.plans} --c"
        )
        return checkpoints.read(self.checkpoint, f"remove it and continue the training: {command}", mmap=True)

    @property
    def is_begun(self) -> bool:
        return any(self.folder.glob("checkpoint_*.pth"))

    def train_command(self, device: str) -> list[str]:
        """The words that come after `nnUNetv2_train` to train this run."""
        words = [self.dataset, self.configuration, self.fold, "-tr", self.trainer, "-p", self.plans, "-device", device]
        if self.is_trained:
            return [*words, "--val"]
        return [*words, "--c"] if self.is_begun else words

    def check(self) -> None:
        """Raise UserError if there are no base plans, or if the trainer lacks a setting that this run needs."""
        read_json(self._plans_file(self.base_plans), PLAN_FIRST)
        if self.num_labeled is not None and not has_settings(self.trainer):
            raise UserError(
                f"{self.trainer}: this trainer cannot leave labels out: use SupervisedTrainer with --labeled"
            )

    def write_plans(self) -> None:
        """Write the plans of this run, unless they are the base plans or the training has begun.

        Raises:
            UserError: see `check`; the base plans are damaged.
            DiskError: the disk is full or read-only.
        """
        self.check()
        if self.plans == self.base_plans or self.is_begun:
            return
        changes = {"seed": self.seed, "num_labeled": self.num_labeled}
        base = load_plans(self._plans_file(self.base_plans), PLAN_FIRST)
        plans = update_settings(base, {key: value for key, value in changes.items() if value is not None})
        with locked(self._plans_file(self.plans)):
            write_json({**plans, "plans_name": self.plans}, self._plans_file(self.plans))

    def _plans_file(self, name: str) -> Path:
        return base_folder("nnUNet_preprocessed") / self.dataset / f"{name}.json"


def is_fold(text: str) -> bool:
    """Whether the text names a fold as nnU-Net does: `all`, or a number (0, not 00)."""
    return text == "all" or (text.isdecimal() and text == str(int(text)))


def has_settings(trainer: str) -> bool:
    """Whether this trainer uses the section `semiseg` of the plans. nnU-Net's own trainers do not."""
    return hasattr(find_class("trainers", trainer), "settings_class")


@contextmanager
def using_data(dataset: str, configuration: str, trainer: str, plans: str) -> Iterator[None]:
    """Keep other processes from rewriting the data while a trainer of nnU-Net uses it. Our trainers do so themselves.

    Raises:
        BusyError: another process rewrites the data.
    """
    if has_settings(trainer):
        yield
        return
    preprocessed = base_folder("nnUNet_preprocessed") / dataset
    content = load_plans(preprocessed / f"{plans}.json", PLAN_FIRST)
    with reading(preprocessed / resolved(content, configuration)["data_identifier"]):
        yield


class TrainedRun:
    """A finished run, and facts about it."""

    def __init__(self, run: Run):
        self.run = run

    @cached_property
    def _checkpoint(self) -> dict:
        checkpoint = self.run.load_checkpoint()
        # nnU-Net's networks list a weight under several names; only numbers are kept, because there may be many runs
        sizes = {w.data_ptr(): w.numel() for w in checkpoint["network_weights"].values()}
        return {"logging": checkpoint["logging"], "parameters": sum(sizes.values())}

    @property
    def parameters(self) -> int:
        """The number of values in the weights of the deployed network. Each is counted once."""
        return self._checkpoint["parameters"]

    @property
    def curves(self) -> dict[str, list[float]]:
        """nnU-Net's log: for each key a list with one value for each epoch.

        Loss terms of our trainers begin with `loss/`.
        """
        return self._checkpoint["logging"]

    @property
    def hours(self) -> float:
        """The time of all epochs in hours, also of those before an interruption.

        The time before, between and after the epochs is not counted.
        """
        log = self._checkpoint["logging"]
        pairs = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
        return sum(end - start for start, end in pairs) / 3600

    @cached_property
    def peak_memory(self) -> tuple[float, str] | None:
        """The peak memory in MiB, and where it was measured: `GPU` or `RAM`.

        None if `compare` did not start the training.
        """
        file = self.run.folder / RESOURCES
        if not file.is_file():
            return None
        content = read_json(file, "remove it")
        check(content, {"peak_memory_mib": float, "memory": str}, file, "remove it")
        return content["peak_memory_mib"], content["memory"]

    @cached_property
    def _debug(self) -> dict[str, str]:
        file, fix = self.run.folder / "debug.json", "train this run again"
        content = read_json(file, fix)
        check(content, {"num_epochs": str, "num_iterations_per_epoch": str}, file, fix)
        return content

    @property
    def iterations(self) -> int:
        return int(self._debug["num_epochs"]) * int(self._debug["num_iterations_per_epoch"])

    @cached_property
    def plans(self) -> dict:
        return load_plans(self.run.model_folder / "plans.json", "train this run again")

    @cached_property
    def dataset_json(self) -> dict:
        return read_dataset_json(self.run.model_folder)

    @property
    def settings(self) -> dict:
        """The settings with which the training was started, with all defaults. Empty for nnU-Net's own trainers."""
        if not has_settings(self.run.trainer):
            return {}
        if self.run.settings_file.is_file():
            return read_json(self.run.settings_file, "train this run again")
        # a training from before settings were stored for each fold
        trainer: Any = find_class("trainers", self.run.trainer)
        return settings_of(trainer.settings_class, self.plans, trainer)

    @cached_property
    def validated_cases(self) -> set[str] | None:
        if not self.run.is_validated:
            return None
        ending = self.dataset_json["file_ending"]
        return {file.name[: -len(ending)] for file in self.run.validation.glob(f"*{ending}")}


PLANS_KEYS = ("foreground_intensity_properties_per_channel", "transpose_forward", "image_reader_writer")
"""Keys of the plans that change what a network sees. The configuration is compared separately."""
DATASET_KEYS = ("channel_names", "labels", "regions_class_order", "numTraining")


def unequal_conditions(runs: Sequence[Run], upper_bound: Sequence[Run] = ()) -> list[str]:
    """Find conditions that differ between runs although they should be the same.

    For compared runs these conditions are checked: iterations, plans, dataset.json, bfloat16, the labels used, the
    other settings of the same trainer, and the split. The runs of the upper bound use other data. For them, the
    iterations, the configuration in the plans, and bfloat16 are checked.

    Returns:
        A sentence for each difference from the first run, or from the first one of the same trainer. Empty if the
        comparison is fair.
    """
    first, *others = map(TrainedRun, (*runs, *upper_bound))
    found = []
    for other in others:
        bound = other.run in upper_bound
        pair = f"{other.run.title}{f' ({other.run.dataset})' if bound else ''} and {first.run.title}"
        if other.iterations != first.iterations:
            found.append(f"{pair}: {other.iterations} and {first.iterations} training iterations")
        a, b = (t.plans["configurations"][t.run.configuration] for t in (other, first))
        keys = _different(a, b) - ({"data_identifier"} if bound else set())
        if not bound:
            keys |= {key for key in PLANS_KEYS if other.plans.get(key) != first.plans.get(key)}
        if keys:
            found.append(f"{pair}: the plans differ in {', '.join(sorted(keys))}")
        a, b = (t.settings.get("bfloat16_on_cpu", False) for t in (other, first))
        if a != b:
            found.append(f"{pair}: one was trained in bfloat16")
        if bound:
            continue
        keys = [key for key in DATASET_KEYS if other.dataset_json.get(key) != first.dataset_json.get(key)]
        if keys:
            found.append(f"{pair}: dataset.json was another one: {', '.join(keys)}")
        if other.run.num_labeled == first.run.num_labeled:
            a, b = (t.settings.get("num_labeled") or "all" for t in (other, first))
            if a != b:
                found.append(f"{pair}: trained with {a} and {b} of the labels")
        found += _unequal_settings(other, runs)
        if other.run.fold != "all" and None not in (other.validated_cases, first.validated_cases):
            if other.validated_cases != first.validated_cases:
                found.append(f"{pair}: trained with different splits (their validation cases differ)")
    return found


def _unequal_settings(trained: TrainedRun, runs: Sequence[Run]) -> list[str]:
    """A sentence if this run differs from the first one of its trainer, with as many labels, in more than the seed."""
    run = trained.run
    first = next(r for r in runs if (r.trainer, r.num_labeled) == (run.trainer, run.num_labeled))
    a, b = trained.settings, TrainedRun(first).settings
    keys = sorted(_different(a, b) - {"seed"})
    values = "; ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in keys)
    return [f"{run.title} and {first.title}: the settings differ: {values}"] if keys else []


def _different(a: dict, b: dict) -> set[str]:
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
