"""Pseudo-labels of whole cases, stored as files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from tqdm import tqdm

from nnunet_semiseg.data.two_streams import patch_sizes
from nnunet_semiseg.data.written_images import refuse_half_written
from nnunet_semiseg.files import written_whole
from nnunet_semiseg.losses.components import keep_largest_components
from nnunet_semiseg.losses.segmentation import hard_pseudo_label


class PseudoLabeledDataset:
    """Preprocessed cases with the pseudo-labels from a folder. The cases' own labels are not used."""

    def __init__(self, dataset, folder: Path):
        self.dataset, self.folder, self.identifiers = dataset, folder, dataset.identifiers

    def load_case(self, identifier: str):
        data, _, previous, properties = self.dataset.load_case(identifier)
        label = blosc2.open(str(self.folder / f"{identifier}.b2nd"), mode="r", dparams={"nthreads": 1})
        return data, label, previous, properties | load_pickle(str(self.folder / f"{identifier}.pkl"))


def pseudo_label_loader(
    labeled_loader: nnUNetDataLoader, data: PseudoLabeledDataset, batch_size: int, label_manager
) -> nnUNetDataLoader:
    """Make a loader of cases with pseudo-labels.

    It samples foreground and augments like the loader of labelled cases.
    """
    loader = nnUNetDataLoader(
        data,  # pyright: ignore[reportArgumentType]: the loader uses no more of a dataset than this one has
        batch_size, *patch_sizes(labeled_loader), label_manager, labeled_loader.oversample_foreground_percent,
        probabilistic_oversampling=labeled_loader.get_do_oversample == labeled_loader._probabilistic_oversampling,
        transforms=labeled_loader.transforms,
    )  # fmt: skip
    loader.has_ignore = False  # a pseudo-label has no ignored voxels
    return loader


def take_pseudo_label(labeled_batch: dict, unlabeled_batch: dict) -> dict:
    """Take the pseudo-labels from the unlabelled batch, which a `pseudo_label_loader` made.

    They become `pseudo` in `Batch.extra`. The labelled batch is not used.
    """
    return {"pseudo": unlabeled_batch["target"]}


def without_label(dataset, folder: Path) -> list[str]:
    """The cases that have no complete pseudo-label in the folder."""
    return [case for case in dataset.identifiers if not (folder / f"{case}.pkl").is_file()]


def label_cases(trainer: Any, dataset, folder: Path) -> None:
    """Write a pseudo-label for each case that has none in the folder; see `label_case`.

    If there are several processes, each labels a part of the cases, and they wait for each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = without_label(dataset, folder)
    trainer.ranks.wait()  # so that no process sees what another one has just labelled
    trainer.print_to_log_file(f"labelling {len(todo)} unlabelled cases: {folder}")
    with contextlib.redirect_stdout(None):  # the predictor prints that a CPU is no GPU
        predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=True, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    trainer.set_deep_supervision_enabled(False)
    own, is_first = todo[trainer.ranks.number :: trainer.ranks.of], trainer.ranks.number == 0
    for case in tqdm(own, "Unlabelled cases", disable=None if is_first else True):  # None: only on a terminal
        label_case(predictor, dataset, case, folder, trainer.decide.heads)
    trainer.ranks.wait()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)


def label_case(predictor: Any, dataset, case: str, folder: Path, heads: Sequence[int]) -> None:
    """Write the pseudo-label of a case twice: on the grid of the image for the user, and preprocessed for the loader.

    Args:
        predictor: an initialised `nnUNetPredictor`.
        heads: the classes or regions of which only the largest component is kept.

    Raises:
        DiskError: the disk is full or read-only.
    """
    data, outside, _, properties = dataset.load_case(case)
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data[:])).cpu()
    planar = len(predictor.configuration_manager.patch_size) == 2
    logits = without_islands(logits, heads, predictor.label_manager, planar)
    label = np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits))
    export_prediction_from_logits(
        logits, properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
        str(folder / case),
    )  # fmt: skip
    refuse_half_written(folder.glob(f"{case}.nii*"))
    label = np.where(outside[:][0] < 0, -1, label)  # nnU-Net marks voxels outside of the nonzero mask with -1
    write_pseudo_label(label, folder, case, predictor.label_manager)


def without_islands(logits: torch.Tensor, heads: Sequence[int], label_manager, planar: bool) -> torch.Tensor:
    """Change the logits of a case, (heads, Z, Y, X), so that some classes or regions keep only their largest component.

    In the other components, the background gets the largest logit instead of the class. For a region the sign of the
    logit is changed.

    Args:
        heads: the numbers of these classes or regions.
        planar: find the largest component in each slice along the first axis, as for 2d patches.
    """
    if not len(heads):
        return logits
    samples = logits.transpose(0, 1) if planar else logits[None]
    before = hard_pseudo_label(samples, label_manager)
    gone = before != keep_largest_components(before, heads, label_manager.has_regions)
    if label_manager.has_regions:
        samples = torch.where(gone[:, : len(logits)], -samples, samples)
    else:
        background = torch.where(gone, samples.amax(1, keepdim=True) + 1, samples[:, :1])
        samples = torch.cat((background, samples[:, 1:]), 1)
    return samples.transpose(0, 1) if planar else samples[0]


def write_pseudo_label(label: np.ndarray, folder: Path, case: str, label_manager) -> None:
    """Write the label map (*S) for the loader, then the locations of its classes.

    After that the pseudo-label is complete.
    """
    label = label.astype(np.int16 if max(label_manager.all_labels) > 127 else np.int8)[None]
    array: Any = np.ascontiguousarray(label)  # blosc2's annotation does not allow NumPy arrays
    content: Any = blosc2.asarray(array)
    with written_whole(folder / f"{case}.b2nd") as temporary:  # blosc2 does not report a full disk
        temporary.write_bytes(content.to_cframe())
    classes = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    locations = DefaultPreprocessor._sample_foreground_locations(label, classes)
    with written_whole(folder / f"{case}.pkl") as temporary:
        write_pickle({"class_locations": locations}, str(temporary))
