"""Foreground that a network finds in unlabelled cases. It says where to take patches, and which cases to leave out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, load_pickle, write_pickle
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from torch import nn
from tqdm import tqdm

from nnunet_semiseg.data.agreement import mean_agreement
from nnunet_semiseg.files import write_json, written_whole

SCORES, LEFT_OUT = "scores.json", "left_out.json"
"""Files beside the class locations: one has the score of each case that the network predicted, the other lists the
cases from which the loader now takes no patches."""
LEAST_CASES = 10
"""If fewer unlabelled cases than this have a score, all are used."""


class PseudoForegroundDataset:
    """Preprocessed cases whose class locations are in another folder, in a file CASE.pkl.

    A case without such a file has no class locations.

    The cases' own class locations are not used. The folder may change while workers read it, because each file in it is
    always complete.
    """

    def __init__(self, dataset, folder: Path):
        self.dataset, self.folder, self.identifiers = dataset, folder, dataset.identifiers
        self._left_out: tuple[int, set[str]] = (0, set())  # the names, and the time of the file they were read from

    def load_case(self, identifier: str):
        data, segmentation, previous, properties = self.dataset.load_case(identifier)
        try:
            locations = load_pickle(str(self.folder / f"{identifier}.pkl"))
        except FileNotFoundError:
            locations = {}
        return data, segmentation, previous, properties | {"class_locations": locations}

    @property
    def left_out(self) -> set[str]:
        """The names of the cases from which the loader takes no patches now, as the file `LEFT_OUT` lists them."""
        file = self.folder / LEFT_OUT
        try:
            changed = file.stat().st_mtime_ns
        except FileNotFoundError:
            return set()
        if changed != self._left_out[0]:
            self._left_out = changed, set(load_json(str(file)))
        return self._left_out[1]


def classes_of_all(dataset) -> list[int | tuple[int, ...]]:
    """The classes or regions that every labelled case has."""
    in_cases = []
    for case in dataset.identifiers:
        locations = dataset.load_case(case)[3]["class_locations"]
        in_cases.append({labels for labels, places in locations.items() if len(places)})
    return sorted(set.intersection(*in_cases), key=str)


def look_at_cases(
    trainer: Any, network: nn.Module, dataset, cases: Sequence[str], folder: Path, expected: Sequence = ()
) -> None:
    """Write where a network finds foreground in whole cases, and how stable its prediction of each case is.

    The class locations have the form that nnU-Net's preprocessing gives to those of labels. The score of a case
    (`SCORES`) says how much two predictions of it agree: the mean Dice between that of the image and that of the
    mirrored image. If nnU-Net does not mirror, the second one is the prediction of the last call; the score is NaN if
    there was none. Scores of the two
    kinds cannot be compared, as the network changes between calls. To be fast, neighbouring windows do not overlap,
    so the result is not exact.

    Args:
        trainer: the trainer whose settings say how the network gets the images. If there are several processes
            (`ranks`), each predicts a part of the cases.
        network: the network, without deep supervision.
        dataset: a dataset of preprocessed cases.
        cases: the cases to look at. Their files are replaced, unless an interrupted call in the same epoch has
            written them.
        folder: the folder for the files. It is made if necessary.
        expected: the classes or regions that every case must have. If one is not found, its Dice counts as 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_gpu = trainer.device.type == "cuda"
    with contextlib.redirect_stdout(None):  # the predictor prints that a CPU is no GPU
        predictor = nnUNetPredictor(
            tile_step_size=1,
            use_mirroring=False,
            device=trainer.device,
            perform_everything_on_device=is_gpu,
            allow_tqdm=False,
        )
    predictor.manual_initialization(
        network,  # pyright: ignore[reportArgumentType]: a network may be compiled
        trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, None,
    )  # fmt: skip
    manager: Any = trainer.label_manager
    classes = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    axes = [int(axis) + 1 for axis in trainer.inference_allowed_mirroring_axes or ()]
    if len(trainer.configuration_manager.patch_size) == 2:
        axes = [axis + 1 for axis in axes]  # the first axis is that of the slices

    def decision(image: torch.Tensor) -> np.ndarray:
        logits: Any = predictor.predict_sliding_window_return_logits(image)
        return np.asarray(manager.convert_logits_to_segmentation(logits.cpu())).astype(np.int16)

    found: dict[str, float] = {}
    own, epoch = cases[trainer.ranks.number :: trainer.ranks.of], trainer.current_epoch
    for case in tqdm(own, "Unlabelled cases", disable=None if trainer.ranks.number == 0 else True):
        file, other = folder / f"{case}.npz", None
        last: Any = np.load(file) if file.is_file() else {}
        if last.get("epoch") == epoch:  # an interrupted call did this case; the network is the same
            found[case] = float(last["score"])
            continue
        image = torch.from_numpy(dataset.load_case(case)[0][:])
        label = decision(image)
        if axes:
            other = np.flip(decision(image.flip(axes)), tuple(axis - 1 for axis in axes))
        elif (
            last.get("epoch", epoch) < epoch
        ):  # else it is of a later epoch: this training went on from an older checkpoint
            other = last["label"]
        found[case] = float("nan") if other is None else mean_agreement([label, other], classes, expected)
        locations = DefaultPreprocessor._sample_foreground_locations(label[None], classes)
        with written_whole(folder / f"{case}.pkl") as temporary:
            write_pickle(locations, str(temporary))
        with written_whole(file) as temporary, open(temporary, "wb") as whole:  # last: now this case is done
            kept: Any = {} if axes else {"label": label}  # for the next search
            np.savez_compressed(whole, score=found[case], epoch=epoch, **kept)
    scores = {case: score for of_rank in trainer.ranks.gather(found) for case, score in of_rank.items()}
    if not trainer.ranks.number:
        write_json(scores, folder / SCORES)
    trainer.ranks.wait()


def outliers(scores: Mapping[str, float], at_most: float) -> list[str]:
    """The cases whose score is far below that of the others, the worst first.

    Far means: more than 3 robust standard deviations below the median. A robust standard deviation is 1.4826 times the
    median distance to the median. There are no outliers if fewer than 10 scores are known.

    Args:
        scores: the scores of the cases. NaN if a score is not known.
        at_most: the largest share of the cases with a known score that is returned.
    """
    known = {case: score for case, score in scores.items() if np.isfinite(score)}
    if len(known) < LEAST_CASES:
        return []
    middle = np.median(list(known.values()))
    spread = 1.4826 * np.median([abs(score - middle) for score in known.values()])
    far = [case for case in sorted(known, key=known.__getitem__) if known[case] < middle - 3 * spread]
    return far[: int(at_most * len(known))]


def leave_out(folder: Path, at_most: float) -> list[str]:
    """Keep the loaders from using the `outliers` among the scores in the folder. Returns their names."""
    cases = outliers(load_json(str(folder / SCORES)), at_most)
    write_json(cases, folder / LEFT_OUT)
    return cases
