"""Pseudo-labels of whole cases, on disk."""

from __future__ import annotations

import os
from pathlib import Path

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor


class PseudoLabeledDataset:
    """Preprocessed cases with the pseudo-labels of a folder; what else the cases know of labels is not looked at."""

    def __init__(self, dataset, folder: Path):
        self.dataset, self.folder, self.identifiers = dataset, folder, dataset.identifiers

    def load_case(self, identifier: str):
        data, _, previous, properties = self.dataset.load_case(identifier)
        label = blosc2.open(str(self.folder / f"{identifier}.b2nd"), mode="r", dparams={"nthreads": 1})
        return data, label, previous, properties | load_pickle(str(self.folder / f"{identifier}.pkl"))


def take_pseudo_label(labeled: dict, unlabeled: dict) -> dict:
    """The targets that a `nnUNetDataLoader` of pseudo-labelled cases made."""
    target = unlabeled["target"]
    return {"pseudo": target} if isinstance(target, list) or target.numel() else {}  # views have no target


def is_labeled(folder: Path, case: str) -> bool:
    """Whether the folder has the whole pseudo-label of this case."""
    return (folder / f"{case}.pkl").is_file()


def write_pseudo_label(label: np.ndarray, folder: Path, case: str, label_manager) -> None:
    """The label map (*S) for the loader, and where its classes are; the latter comes last and makes the case done."""
    label = label.astype(np.int16 if max(label_manager.all_labels) > 127 else np.int8)[None]
    blosc2.asarray(np.ascontiguousarray(label), urlpath=str(folder / f"{case}.b2nd"), mode="w")
    classes = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    locations = DefaultPreprocessor._sample_foreground_locations(label, classes)
    write_pickle({"class_locations": locations}, str(folder / f"{case}.tmp"))
    os.replace(folder / f"{case}.tmp", folder / f"{case}.pkl")
