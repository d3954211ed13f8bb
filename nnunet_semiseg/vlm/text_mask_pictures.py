"""`nnunet_semiseg text_masks`: pictures of the text masks of a trained AMVLM, and how well they find the labels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nnunet_semiseg.data.labeled_subset import JoinedDataset
from nnunet_semiseg.data.texts import has_texts, read_texts
from nnunet_semiseg.discovery import find_class
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import disk_errors, written_whole
from nnunet_semiseg.runs import Run
from nnunet_semiseg.settings.plans import read_settings
from nnunet_semiseg.text.prompts import class_names, read_prompts
from nnunet_semiseg.vlm.pairs import open_cases
from nnunet_semiseg.vlm.pretrained import load_vlm, read_about, seen_cases
from nnunet_semiseg.vlm.text_mask_generator import TextMaskGenerator

PREFIX = "text_masks."
"""The beginning of the names of the weights of the text mask generator in a checkpoint."""


@dataclass(frozen=True)
class TrainedMasks:
    """A trained text mask generator, with the cases and the texts of its dataset.

    Attributes:
        data: nnU-Net's preprocessed cases, labelled and unlabelled.
        labeled_cases: the labelled cases whose labels the pre-training did not see. If it saw all labels: all labelled
            cases.
        texts: for each case the text of each mask, by its name. It has no entry for a case without a text.
        labels: for every mask the value of its label, or the values of its region.
    """

    generator: TextMaskGenerator
    data: JoinedDataset
    labeled_cases: list[str]
    unlabeled_cases: list[str]
    texts: dict[str, dict[str, list[str]]]
    labels: list[int] | list[tuple[int, ...]]
    ignore_label: int | None

    def of(self, image: Tensor, texts: dict[str, list[str]]) -> tuple[Tensor, Tensor]:
        """The masks (K, H, W) of an image (C, H, W), before and after PAMR."""
        features = torch.stack([self.generator.encode_texts(t).mean(0) for t in texts.values()])
        with torch.no_grad():
            raw, masks, _ = self.generator(image[None], F.normalize(features, dim=1)[None])
        return F.interpolate(raw, size=image.shape[1:], mode="bilinear")[0], masks[0]


def load_text_masks(run: Run) -> TrainedMasks:
    """Load the text masks of a trained model.

    Args:
        run: a finished training with a text mask generator.

    Raises:
        UserError: the model is not trained, or has no text masks; its pre-training (`load_vlm`), its preprocessed cases
            (`open_cases`) or its texts cannot be read.
    """
    if not run.is_trained:
        raise UserError(f"{run.checkpoint}: no such file: finish the training of {run.trainer} first")
    checkpoint = run.load_checkpoint()
    auxiliary = checkpoint.get("semiseg", {}).get("auxiliary", {})
    weights = {key.removeprefix(PREFIX): value for key, value in auxiliary.items() if key.startswith(PREFIX)}
    if not weights:
        raise UserError(f"{run.checkpoint}: has no text masks: give a model that was trained with AMVLMTrainer")
    plans, dataset_json = (checkpoint["init_args"][key] for key in ("plans", "dataset_json"))
    trainer = find_class("trainers", run.trainer)
    settings = read_settings(trainer.settings_class, plans, trainer)
    generator = TextMaskGenerator(load_vlm(settings.vlm), settings.mask_cosines == "relative")
    generator.load_state_dict(weights)
    data, unlabeled_cases = open_cases(run.dataset, run.plans, run.configuration)
    labeled_cases = [case for case in data.identifiers if case not in set(unlabeled_cases)]
    seen = seen_cases(read_about(Path(settings.vlm), "pre-train again"), run.dataset)
    labeled_cases = [case for case in labeled_cases if case not in seen] or labeled_cases
    texts = texts_of(run, data.identifiers, settings, dataset_json)
    manager = PlansManager(plans).get_label_manager(dataset_json)
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    return TrainedMasks(generator, data, labeled_cases, unlabeled_cases, texts, labels, manager.ignore_label)


def write_text_masks(trained: TrainedMasks, output: str | Path, n_cases: int = 20) -> list[Path]:
    """Write a picture for each of the first unlabelled cases with a text: image, text, mask before and after PAMR.

    For a volume the middle slice is shown. If there are several classes, each has a row.

    Raises:
        UserError: `output` is a file.
        DiskError: it cannot be written.
    """
    output = Path(output)
    if output.is_file():
        raise UserError(f"-o {output}: is a file: name a folder")
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    files = []
    cases = [case for case in trained.unlabeled_cases if case in trained.texts][:n_cases]
    for case in tqdm(cases, "Pictures", delay=10, disable=None):
        image = torch.from_numpy(np.asarray(trained.data.load_case(case)[0][:], dtype=np.float32))
        image, texts = image[:, image.shape[1] // 2], trained.texts[case]
        files.append(output / f"{case}.png")
        figure = plot_masks(image.mean(0), *trained.of(image, texts), [" / ".join(t) for t in texts.values()])
        with written_whole(files[-1]) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    return files


def how_well_labels_are_found(trained: TrainedMasks, n_cases: int = 20) -> dict[str, float]:
    """Measure how well masks find a label: the area under the ROC curve, as a mean over cases and classes.

    0.5 is chance. With the text of another case the area should be smaller; what remains comes from the image only. For
    a volume, the slice with the most labelled voxels is used.

    Returns:
        "before PAMR", "after it" and, if cases have different texts, "with the next case's text". Empty if no labelled
        case has a text and shows a class.
    """
    cases = [case for case in trained.labeled_cases if case in trained.texts][:n_cases]
    found = defaultdict(list)
    for case, other in zip(cases, cases[1:] + cases[:1], strict=True):
        image, label = (np.asarray(x[:]) for x in trained.data.load_case(case)[:2])
        known = (label[0] >= 0) & (label[0] != trained.ignore_label)
        i = int(((label[0] > 0) & known).sum((1, 2)).argmax())
        known, label, image = known[i], label[0, i], torch.from_numpy(image[:, i].astype(np.float32))
        masks = dict(zip(("before PAMR", "after it"), trained.of(image, trained.texts[case]), strict=True))
        if trained.texts[other] != trained.texts[case]:
            masks["with the next case's text"] = trained.of(image, trained.texts[other])[1]
        for name, of_classes in masks.items():
            for mask, values in zip(of_classes, trained.labels, strict=True):
                is_label = np.isin(label, values)[known]
                if is_label.any() and not is_label.all():
                    found[name].append(roc_auc_score(is_label, mask.numpy()[known]))
    return {name: float(np.mean(areas)) for name, areas in found.items()}


def texts_of(run: Run, cases: list[str], settings, dataset_json: dict) -> dict[str, dict[str, list[str]]]:
    """For each case, the text of every mask, by the name of the mask."""
    source = str(run.checkpoint)
    names, prompts = class_names(dataset_json, source), read_prompts(dataset_json, source)
    if settings.texts == "cases" or settings.texts == "auto" and len(names) == 2 and has_texts(run.dataset):
        return {case: {names[1]: [text]} for case, text in read_texts(run.dataset, cases, "skip").items()}
    return {case: {name: list(prompts[name]) for name in names[1:]} for case in cases}


def plot_masks(image: Tensor, raw: Tensor, masks: Tensor, texts: list[str]) -> Figure:
    """Draw a row for each mask: the image (H, W), then the mask (K, H, W), in 0 to 1, before and after PAMR."""
    figure = Figure(figsize=(9, 3.4 * len(texts)), layout="constrained")
    axes = figure.subplots(len(texts), 3, squeeze=False)
    for row, before, after, text in zip(axes, raw, masks, texts, strict=True):
        for ax, mask, title in zip(row, (None, before, after), (text, "before PAMR", "the mask"), strict=True):
            ax.imshow(image, cmap="gray")
            if mask is not None:
                ax.imshow(mask, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
            ax.set_title(title, fontsize=8, wrap=True, parse_math=False)
            ax.axis("off")
    return figure
