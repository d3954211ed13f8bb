"""Where a network finds foreground in unlabelled cases, so that patches are drawn where something is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_semiseg.files import written_whole


class PseudoForegroundDataset:
    """Preprocessed cases with the class locations of a folder, or with none; what they know of labels is left out.

    The folder may change while workers read from it: each file is written whole.
    """

    def __init__(self, dataset, folder: Path):
        self.dataset, self.folder, self.identifiers = dataset, folder, dataset.identifiers

    def load_case(self, identifier: str):
        data, segmentation, previous, properties = self.dataset.load_case(identifier)
        try:
            locations = load_pickle(str(self.folder / f"{identifier}.pkl"))
        except FileNotFoundError:
            locations = {}
        return data, segmentation, previous, properties | {"class_locations": locations}


def find_foreground(trainer: nnUNetTrainer, network: nn.Module, dataset, cases: Sequence[str], folder: Path) -> None:
    """Write class locations, as nnU-Net's preprocessing keeps them of labels, of a network's decisions on whole cases.

    Quick rather than exact: neighbouring windows do not overlap, and nothing is mirrored.

    Args:
        trainer: says how images are shown to the network.
        network: without deep supervision.
        dataset: of preprocessed cases.
        cases: those to look at; their files are replaced.
        folder: is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(
        tile_step_size=1,
        use_mirroring=False,
        device=trainer.device,
        perform_everything_on_device=True,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        network,  # pyright: ignore[reportArgumentType]: a network may be compiled
        trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, None,
    )  # fmt: skip
    manager: Any = trainer.label_manager
    classes = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    for case in cases:
        image = torch.from_numpy(dataset.load_case(case)[0][:])
        logits: Any = predictor.predict_sliding_window_return_logits(image)
        label = np.asarray(manager.convert_logits_to_segmentation(logits.cpu()))[None]
        locations = DefaultPreprocessor._sample_foreground_locations(label, classes)
        with written_whole(folder / f"{case}.pkl") as temporary:
            write_pickle(locations, str(temporary))
