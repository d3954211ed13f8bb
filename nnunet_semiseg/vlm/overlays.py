"""`nnunet_semiseg text_masks`: what a trained AMVLM takes its texts to mean, to be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from nnunet_semiseg.config import read_settings
from nnunet_semiseg.data.texts import has_texts, read_texts
from nnunet_semiseg.discovery import find_class
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.runs import Run
from nnunet_semiseg.text.prompts import class_names, read_prompts
from nnunet_semiseg.vlm.pairs import open_cases
from nnunet_semiseg.vlm.text_masks import TextMaskGenerator, load_vlm

PREFIX = "text_masks."
"""of the generator's weights among a checkpoint's auxiliary ones"""


def write_text_masks(run: Run, output: str | Path, n_cases: int = 20) -> list[Path]:
    """A picture for each of the first unlabelled cases: the image, its text, the mask before and after PAMR.

    Of a volume the middle slice is shown; of several classes each has a row.

    Args:
        run: trained, with a text mask generator.

    Raises:
        UserError: not trained, or trained without text masks.
    """
    if not run.is_trained:
        raise UserError(f"{run.checkpoint}: no such file: train {run.trainer} first, to its end")
    checkpoint = torch.load(run.checkpoint, map_location="cpu", weights_only=False)
    auxiliary = checkpoint.get("semiseg", {}).get("auxiliary", {})
    weights = {key.removeprefix(PREFIX): value for key, value in auxiliary.items() if key.startswith(PREFIX)}
    if not weights:
        raise UserError(f"{run.checkpoint}: has no text masks: give a model that was trained with AMVLMTrainer")
    plans, dataset_json = (checkpoint["init_args"][key] for key in ("plans", "dataset_json"))
    settings = read_settings(find_class("trainers", run.trainer).settings_class, plans)
    vlm = load_vlm(settings.vlm)
    generator = TextMaskGenerator(vlm, vlm.heads["text_cls"][-1].out_features)
    generator.load_state_dict(weights)
    data, unlabeled = open_cases(run.dataset, run.plans, run.configuration)
    texts = texts_of(run, unlabeled, settings, dataset_json)
    output = Path(output)
    if output.is_file():
        raise UserError(f"-o {output}: is a file: name a folder")
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for case in [case for case in unlabeled if case in texts][:n_cases]:
        image = torch.from_numpy(np.asarray(data.load_case(case)[0], dtype=np.float32))
        image = image[:, image.shape[1] // 2]
        features = torch.stack([generator.encode_texts(t).mean(0) for t in texts[case].values()])
        with torch.no_grad():
            raw, masks, _ = generator(image[None], F.normalize(features, dim=1)[None])
        raw = F.interpolate(raw, size=image.shape[1:], mode="bilinear")
        files.append(output / f"{case}.png")
        draw(image.mean(0), raw[0], masks[0], [" / ".join(t) for t in texts[case].values()]).savefig(files[-1], dpi=110)
    return files


def texts_of(run: Run, cases: list[str], settings, dataset_json: dict) -> dict[str, dict[str, list[str]]]:
    """Of each case the texts of every mask, by the mask's name."""
    names, prompts = class_names(dataset_json), read_prompts(dataset_json)
    if settings.texts == "cases" or settings.texts == "auto" and len(names) == 2 and has_texts(run.dataset):
        return {case: {names[1]: [text]} for case, text in read_texts(run.dataset, cases, "skip").items()}
    return {case: {name: list(prompts[name]) for name in names[1:]} for case in cases}


def draw(image: Tensor, raw: Tensor, masks: Tensor, texts: list[str]) -> Figure:
    """A row a mask: the image (H, W), and on it the mask before and after PAMR, (K, H, W) each, in 0 to 1."""
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
