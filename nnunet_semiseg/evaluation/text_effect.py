"""`nnunet_semiseg text_effect`: how much the predictions of a trained model depend on its text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from nnunet_semiseg.discovery import find_class
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation import figures
from nnunet_semiseg.evaluation.jobs import LOGS, Job, alone, do_all, is_predicted, prediction_job
from nnunet_semiseg.evaluation.metrics import METRICS
from nnunet_semiseg.evaluation.page import Report, Section, write, write_csv
from nnunet_semiseg.evaluation.report import interval, number
from nnunet_semiseg.evaluation.request import Request, TestSet, find_devices, find_test_set, make_runs
from nnunet_semiseg.evaluation.scores import evaluate
from nnunet_semiseg.evaluation.statistics import caution, differences_from
from nnunet_semiseg.files import folder_for, written_whole
from nnunet_semiseg.runs import Run
from nnunet_semiseg.settings.plans import read_settings
from nnunet_semiseg.text.encoder import load_text_tower
from nnunet_semiseg.text.prompt_learner import PromptLearner
from nnunet_semiseg.text.prompts import class_names

FEATURES = "guidance.features"
"""The name of the text features (K, d) in the state of a network."""
LITTLE = 1e-3
"""If fewer than this share of the foreground voxels change, the text has practically no effect."""


@dataclass(frozen=True)
class Prompts:
    """Text features (K, d) with which the test set is predicted, and a sentence that says what they are."""

    name: str
    features: Tensor
    meaning: str


def text_effect(request: Request, output: str | Path | None = None) -> Path:
    """Predict the test set with the true text and with shuffled, noise and empty prompts. Report what changes.

    Args:
        request: the options of a comparison, with one trainer.
        output: the folder of the report. None: a folder in the dataset's results.

    Returns:
        The report, a page of HTML.

    Raises:
        UserError: the model is not trained, or no text guides it; there is no test set; a prediction failed.
    """
    (run,), _ = make_runs(request)
    test_set = find_test_set(request, is_required=True)
    devices = find_devices(request)
    if not run.is_trained:
        raise UserError(f"not trained: {run.title} (no {run.checkpoint}): train it with nnUNetv2_train")
    variants = make_variants(run)

    output = (
        folder_for(output) if output is not None else run.model_folder.parent / "text_effect" / run.model_folder.name
    )
    with alone(output):
        job, jobs, folders = prediction_job(run, 0, request, test_set, output), [], {}
        for variant in variants:
            folders[variant.name] = output / "predictions" / variant.name
            jobs.append(with_prompts(job, variant, output / f"{variant.name}.safetensors", folders[variant.name]))
        do_all([job for job in jobs if not is_predicted(job, test_set)], devices, output / LOGS)
        return write(make_report(request, run, test_set, variants, folders, output), output)


def with_prompts(job: Job, variant: Prompts, file: Path, folder: Path) -> Job:
    """A job for the same prediction with other text features. They are written to `file`, which the job reads."""
    with written_whole(file) as temporary:
        temporary.write_bytes(save({FEATURES: variant.features.contiguous()}))
    content = {
        **job.content,
        "output": str(folder),
        "features": str(file),
        "settings": {**job.content["settings"], "features": variant.features.sum(1).tolist()},
    }
    return Job(f"predict_{variant.name}", f"predicting with {variant.name} prompts", content)


def make_variants(run: Run) -> list[Prompts]:
    """The text features that the model was trained with, and three kinds of wrong features.

    Raises:
        UserError: the model has no text features, or its checkpoint is damaged.
    """
    checkpoint = run.load_checkpoint()
    if FEATURES not in checkpoint["network_weights"]:
        raise UserError(f"{run.checkpoint}: this model has no text: choose a model of a text-guided trainer with -tr")
    true = checkpoint["network_weights"][FEATURES].float()
    noise = F.normalize(torch.randn(true.shape, generator=torch.Generator().manual_seed(0)), dim=1)
    return [
        Prompts("true", true, "those of the training"),
        Prompts("shuffled", true.roll(1, 0), "each class has the text of another one"),
        Prompts("noise", noise, "a random direction for each class"),
        Prompts("empty", *empty_features(run, checkpoint, true)),
    ]


def empty_features(run: Run, checkpoint: dict, true: Tensor) -> tuple[Tensor, str]:
    """The features of empty texts, with the learnt context tokens of the prompts; and a sentence about them.

    If there is no text encoder, or its weights cannot be loaded, the features are 0.
    """
    plans = checkpoint["init_args"]["plans"]
    trainer = find_class("trainers", run.trainer)
    settings = read_settings(trainer.settings_class, plans, trainer)
    context = checkpoint["semiseg"]["auxiliary"].get("prompt_learner.ctx")
    if context is None:
        return torch.zeros_like(true), "zeros, because the model was trained with embeddings and has no text encoder"
    try:
        tower = load_text_tower(settings.text_model, settings.text_pretrained, settings.text_cache_dir)
    except UserError:
        return torch.zeros_like(true), "zeros, because the text encoder's weights cannot be loaded here"
    empty = {name: ("",) for name in class_names(checkpoint["init_args"]["dataset_json"], str(run.checkpoint))}
    learner = PromptLearner(tower, empty, settings.n_ctx)
    with torch.no_grad():
        learner.ctx.data = context.to(learner.ctx)
        return learner().cpu(), "an empty text for every class, with the learnt context"


def make_report(
    request: Request, run: Run, test_set: TestSet, variants: list[Prompts], folders: dict[str, Path], output: Path
) -> Report:
    """Report the Dice with each kind of prompts, and how many voxels change.

    `voxels.csv` and `cases.csv` have the numbers.
    """
    tables = []
    for name, folder in folders.items():
        rows = evaluate(folder, test_set, request, output / "scores" / f"{name}.json")
        tables.append(pd.DataFrame(rows).assign(method=name, run="the model"))
    scores = pd.concat(tables, ignore_index=True)
    of_case = scores.groupby(["method", "run", "case"], sort=False)[list(METRICS)].mean().reset_index()
    changed = {name: changed_voxels(folders["true"], folder, test_set) for name, folder in folders.items()}
    # the larger foreground of the two predictions: if one of them is empty, all of the other's foreground changes
    foreground = {name: foreground_voxels(folder, test_set) for name, folder in folders.items()}
    shares = {n: float(v.sum() / max(foreground["true"], foreground[n], 1)) for n, v in changed.items()}
    differences = differences_from("true", of_case, "dice")
    rows = []
    for variant in variants:
        dice = of_case[of_case["method"] == variant.name]["dice"].mean()
        d = None if variant.name == "true" else differences.loc[variant.name]
        rows.append([
            variant.name,
            variant.meaning,
            number("dice", dice),
            "" if d is None else f"{d['difference']:+.3f} ({interval('dice', d)})",
            "" if d is None else ("–" if np.isnan(d["p_holm"]) else f"{d['p_holm']:.2g}"),
            f"{changed[variant.name].sum():,.0f}",
            f"{shares[variant.name]:.2%}",
        ])
    headers = ["prompts", "meaning", "Dice", "change (95 % interval)", "p, Holm", "voxels changed", "of the foreground"]
    cases = pd.DataFrame(changed, index=list(test_set.images))
    write_csv(cases.rename_axis("case").reset_index(), output / "voxels.csv")
    write_csv(of_case.drop(columns="run"), output / "cases.csv")
    sections = [
        Section("What the text changes", headers=headers, rows=rows),
        Section("Every case", charts={"cases": figures.box_plots(scores, "dice", "Dice", "cases")}),
    ]
    facts = {"model": str(run.model_folder.name), "data": f"{run.dataset}, {test_set.title}"}
    del shares["true"]
    findings = [verdict(shares, differences), *caution(len(test_set.images))]
    return Report(f"What text changes in {run.title}", facts, sections, findings=findings)


def verdict(shares: dict[str, float], differences: pd.DataFrame) -> str:
    """Say the result in words.

    It depends on the share of the foreground voxels that change, and on the change in Dice.
    """
    most = max(shares, key=shares.get)
    if shares[most] == 0:
        return "Text changes nothing: with any prompts every voxel is predicted as with the true ones."
    if shares[most] < LITTLE:
        return f"Text changes next to nothing: at most {shares[most]:.3%} of the foreground's voxels ({most} prompts)."
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    sentence = f"Text changes what this model predicts: voxels, as a share of the foreground: {listed}."
    worse = [name for name in shares if differences.loc[name, "high"] < 0]
    better = [name for name in shares if differences.loc[name, "low"] > 0]
    if better:
        return f"{sentence} It is no help: Dice is HIGHER with {' and '.join(better)} prompts than with the true ones."
    if not worse:
        return f"{sentence} It does not matter to the result: no interval of the change in Dice excludes 0."
    return f"{sentence} It matters: Dice falls with {' and '.join(worse)} prompts."


def changed_voxels(true: Path, other: Path, test_set: TestSet) -> np.ndarray:
    """The number of voxels of each case that are predicted differently."""
    ending, reader = test_set.file_ending, test_set.reader()
    pairs = ((reader.read_seg(str(f / f"{case}{ending}"))[0] for f in (true, other)) for case in test_set.images)
    return np.array([np.count_nonzero(a != b) for a, b in pairs])


def foreground_voxels(folder: Path, test_set: TestSet) -> int:
    """The number of voxels of all cases together that are not background."""
    ending, reader = test_set.file_ending, test_set.reader()
    return sum(np.count_nonzero(reader.read_seg(str(folder / f"{case}{ending}"))[0]) for case in test_set.images)
