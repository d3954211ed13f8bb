"""Masks of other models on the grid of the preprocessed images, and how a loader reads them with unlabelled patches.

The folder `<data_identifier>__masks/NAME/` beside the preprocessed cases holds a file CASE.b2nd for each case, (1, *S),
with the label values of the dataset. The file `masks.json` in it is written last. It has hashes of the plans and of the
`masks.json` in the raw dataset, and the Dice that `add_masks` measured on each labelled case.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_semiseg.data.plans_hash import plans_hash
from nnunet_semiseg.data.preprocessed import opens
from nnunet_semiseg.data.stamps import digest
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import disk_errors, read_json, rewriting, write_json, written_whole
from nnunet_semiseg.parallel import run_jobs
from nnunet_semiseg.schema import check

EXTERNAL, RECORD = "external", "masks.json"
"""The raw dataset has a folder `external`, with a folder for each model. Each of these has a `masks.json` with the
measured Dice and a hash of each mask."""
ENDING = "__masks"
LEAST_DICE = 0.5
"""The smallest Dice on the labelled cases with which the masks of a class are used."""
ABOUT = {"plans_hash": str, "made_of": str, "dice": dict[str, dict]}


def prepare_masks(raw: Path, preprocessed: Path, plans: dict, configuration: str, num_processes: int) -> None:
    """Resample all masks in `external` to the grid of the preprocessed cases.

    Masks that are up to date are not made again.

    A mask is transposed, cropped and resampled like a label in nnU-Net. Masks of cases that are not preprocessed are
    skipped. If a model has no masks any more, what was made from them is removed.

    Raises:
        UserError: a `masks.json` is damaged.
        BusyError: a training uses these cases, or another process rewrites them.
        DiskError: the disk is full or read-only.
    """
    folders = _folders(preprocessed, plans, configuration)
    target = folders[0].with_name(folders[0].name + ENDING)
    sources = {file.parent.name: file.parent for file in sorted((raw / EXTERNAL).glob(f"*/{RECORD}"))}
    for gone in {f.name for f in target.glob("*")} - sources.keys():
        shutil.rmtree(target / gone)
    for name, source in sources.items():
        content = {"plans_hash": plans_hash(plans, configuration), "made_of": digest(source / RECORD)}
        content["dice"] = read_json(source / RECORD, f"run nnunet_semiseg add_masks --name {name} again")["dice"]
        output = target / name
        fresh = (output / RECORD).is_file() and read_json(output / RECORD, "remove it") == content
        jobs = []
        for case, (image, properties) in _cases(folders).items():
            mask = next(source.glob(f"images*/{case}.*"), None)
            made = output / f"{case}.b2nd"
            if mask and not (fresh and made.is_file() and made.stat().st_mtime_ns > properties.stat().st_mtime_ns):
                jobs.append((mask, image, properties, made, plans, configuration))
        if not jobs and fresh:
            continue
        print(f"{configuration}: {len(jobs)} masks of {name} to preprocess")
        with rewriting(folders[0]), disk_errors(output):
            (output / RECORD).unlink(missing_ok=True)  # first: it must not vouch for what changes
            if not fresh:
                shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True, exist_ok=True)
            for _ in run_jobs(_prepare, jobs, num_processes, "Masks"):
                pass
            write_json(content, output / RECORD)


def _folders(preprocessed: Path, plans: dict, configuration: str) -> tuple[Path, Path]:
    """The folders of the labelled and of the unlabelled preprocessed cases."""
    name = PlansManager(plans).get_configuration(configuration).data_identifier
    return preprocessed / name, preprocessed / f"{name}__unlabeled"


def _cases(folders: Sequence[Path]) -> dict[str, tuple[Path, Path]]:
    """The paths of the image and of the properties of each preprocessed case."""
    files = [file for folder in folders for file in sorted(folder.glob("*.pkl"))]
    return {file.stem: (file.with_suffix(".b2nd"), file) for file in files}


def _prepare(mask: Path, image: Path, properties: Path, made: Path, plans: dict, configuration: str) -> None:
    """Preprocess a mask as nnU-Net preprocesses a label, and write it to `made`.

    Args:
        image, properties: the preprocessed image of the case, for its shape only; and the `.pkl` file beside it.
    """
    manager = PlansManager(plans)
    plan, about = manager.get_configuration(configuration), load_pickle(str(properties))
    label = manager.image_reader_writer_class().read_seg(str(mask))[0]
    label = label.transpose([0, *[axis + 1 for axis in manager.transpose_forward]])
    label = label[(slice(None), *[slice(*bounds) for bounds in about["bbox_used_for_cropping"]])]
    spacing = [about["spacing"][axis] for axis in manager.transpose_forward]
    array: Any = blosc2.open(str(image), mode="r")
    of_slices = [spacing[0]] if len(plan.spacing) < len(spacing) else []  # 2d does not resample along the first axis
    resampled: Any = plan.resampling_fn_seg(label, array.shape[1:], spacing, [*of_slices, *plan.spacing])
    resampled = np.ascontiguousarray(resampled, np.int16)
    content: Any = blosc2.asarray(resampled)
    with written_whole(made) as temporary:  # blosc2 would not say that the disk is full
        temporary.write_bytes(content.to_cframe())


def weigh(measured: Mapping[str, Mapping[str, float | None]], classes: Sequence[str] | Mapping) -> dict[str, dict]:
    """For each class, the mean Dice (`dice`), the number of cases it is a mean over (`cases`), and its `weight`.

    The weight is the Dice, or 0 if the Dice is below 0.5. If no case has the class, the Dice is None and the weight 0.

    Args:
        measured: for each labelled case the Dice of each class. None if neither the label nor the mask has the class.
        classes: the classes or regions by name.
    """
    result = {}
    for name in classes:
        scores = [score for dice in measured.values() if (score := dice.get(name)) is not None]
        mean = float(np.mean(scores)) if scores else None
        weight = mean if mean is not None and mean >= LEAST_DICE else 0.0
        result[name] = {"dice": mean, "cases": len(scores), "weight": weight}
    return result


@dataclass(frozen=True)
class PreparedMasks:
    """Masks of several models for one training.

    Attributes:
        folders: the folder of each model.
        weights: for each model the weights of the classes or regions, measured on this training's labelled cases.
    """

    folders: list[Path]
    weights: list[dict[str, float]]

    def lines(self) -> list[str]:
        """The lines of the log that say what is learnt from each model."""
        return [
            f"external_masks {folder.name}: "
            + ", ".join(f"{name} {w:.2f}" if w else f"{name} not used" for name, w in weights.items())
            for folder, weights in zip(self.folders, self.weights, strict=True)
        ]


def load_masks(
    names: Sequence[str], raw: Path | None, preprocessed: Path, plans: dict, configuration: str, fix: str,
    training: Sequence[str], classes: Sequence[str],
) -> PreparedMasks:  # fmt: skip
    """Load the masks of these models. Their weights are measured only on the labelled cases of this training.

    Args:
        raw: the raw dataset. None if this computer has none.
        fix: the command that preprocesses masks.

    Raises:
        UserError: masks with this name do not exist, are not preprocessed for these plans, or have changed since; a
            file is damaged.
    """
    target = _folders(preprocessed, plans, configuration)[0]
    target = target.with_name(target.name + ENDING)
    folders, weights = [target / name for name in names], []
    for name, folder in zip(names, folders, strict=True):
        source = raw / EXTERNAL / name / RECORD if raw and raw.is_dir() else None
        if raw and source and not source.is_file():
            there = ", ".join(file.parent.name for file in sorted((raw / EXTERNAL).glob(f"*/{RECORD}"))) or "none"
            raise UserError(f"setting external_masks={name}: {source.parent} holds no masks (there are: {there}): add"
                            f" them with nnunet_semiseg add_masks --name {name}, or name other masks")  # fmt: skip
        if not (folder / RECORD).is_file():
            raise UserError(f"{folder}: these masks are not (all) preprocessed: {fix}")
        content = read_json(folder / RECORD, fix)
        check(content, ABOUT, folder / RECORD, fix)
        if content["plans_hash"] != plans_hash(plans, configuration):
            raise UserError(
                f"{folder}: was preprocessed with other plans: {plans['plans_name']} have changed since then: {fix}"
            )
        if source and digest(source) != content["made_of"]:
            raise UserError(f"{folder}: was made from masks that differ from those in {source.parent}: {fix}")
        for file in sorted(folder.glob("*.b2nd")):
            if not opens(file):
                raise UserError(f"{file}: half-written or damaged: remove it, then {fix}")
        known = {case: dice for case, dice in content["dice"].items() if case in set(training)}
        weights.append({name: row["weight"] for name, row in weigh(known, classes).items()})
    return PreparedMasks(folders, weights)


class MaskedDataset:
    """Unlabelled cases whose segmentation has one more channel for each model: its mask.

    In these channels, 1 is added to the values of a mask. So 0 means "not known": for a case without a mask, and
    outside the image, where nnU-Net's transforms pad with 0.
    """

    def __init__(self, dataset, folders: Sequence[Path]):
        self.dataset, self.folders, self.identifiers = dataset, list(folders), dataset.identifiers

    def load_case(self, identifier: str) -> tuple:
        data, segmentation, previous, properties = self.dataset.load_case(identifier)
        files = [folder / f"{identifier}.b2nd" for folder in self.folders]
        masks = [blosc2.open(str(f), mode="r", dparams={"nthreads": 1}) if f.is_file() else None for f in files]
        return data, _Stack(segmentation, masks), previous, properties


class _Stack:
    """A segmentation and K masks as one array (1 + K, *S). nnU-Net reads a part of it at a time.

    If a mask is None, its values are not known.
    """

    def __init__(self, segmentation, masks: Sequence):
        self.segmentation, self.masks = segmentation, masks
        self.shape, self.dtype = (1 + len(masks), *segmentation.shape[1:]), np.dtype(np.int16)
        self.ndim = len(self.shape)

    def __getitem__(self, part) -> np.ndarray:
        own = np.asarray(self.segmentation[part], np.int16)
        others = [np.zeros_like(own) if m is None else np.asarray(m[part], np.int16) + 1 for m in self.masks]
        return np.concatenate([own, *others])


def take_masks(labeled_batch: dict, unlabeled_batch: dict) -> dict[str, Tensor]:
    """Take the masks of K other models from an unlabelled batch. The result becomes `Batch.extra`.

    The batch is one of a loader with a `MaskedDataset`. The labelled batch is not used.

    Returns:
        A dictionary with one tensor, `masks` (B, K, *S). Its values are those of the labels, and -1 where a mask is not
        known.
    """
    return {"masks": unlabeled_batch["target"].clamp(min=0) - 1}
