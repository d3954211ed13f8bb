"""Find what a review needs. Wrong options are refused before any work begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_semiseg.data.known_reviews import REVIEWS
from nnunet_semiseg.devices import check_device
from nnunet_semiseg.discovery import find_trainer
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, folder_for
from nnunet_semiseg.planning import read_plans
from nnunet_semiseg.review.options import ReviewOptions
from nnunet_semiseg.runs import Run, is_fold
from nnunet_semiseg.schema import check_configuration

FINAL = "checkpoint_final.pth"
RECIPE = "SemiSegTrainer"
"""If several models are trained, the model of this trainer is reviewed."""


@dataclass(frozen=True, kw_only=True)
class Request(ReviewOptions):
    """What a review of a trained model needs.

    Attributes:
        run: the training of the model.
        folder: the folder of the review.
    """

    run: Run
    folder: Path


def make_request(options: ReviewOptions) -> Request:
    """Make the request from the options of a command line.

    Raises:
        UserError: there is no such data set, plans, configuration, trainer, model or device; or a number is out of
            range.
    """
    if options.length < 1:
        raise UserError(f"-n {options.length}: give a number of cases, 1 or more")
    if not 0 <= options.part < options.parts:
        raise UserError(f"--part_id {options.part}: give a number from 0 to {options.parts - 1}")
    if not is_fold(options.fold):
        raise UserError(f"-f {options.fold}: give the number of a fold, or all")
    dataset_folder("nnUNet_raw", options.dataset)
    preprocessed, results = (dataset_folder(f"nnUNet_{p}", options.dataset) for p in ("preprocessed", "results"))
    plans = read_plans(preprocessed, options.plans)
    fix = "plan first with nnunet_semiseg plan_and_preprocess"
    check_configuration(plans, options.configuration, preprocessed / f"{options.plans}.json", fix)
    trainer = options.trainer or _only_trainer(results, options.plans, options.configuration, options.fold)
    find_trainer(trainer)
    run = Run(results.name, options.configuration, options.fold, trainer, options.plans)
    if not run.is_trained:
        raise UserError(
            f"{run.checkpoint}: no such file: finish the training of {trainer}, or choose a model with -tr, -c, -p and"
            " -f"
        )
    if options.executor == "local":
        check_device(options.device)
    folder = folder_for(options.output or results / REVIEWS / run.fold_name)
    return Request(**vars(options), run=run, folder=folder)


def _only_trainer(results: Path, plans: str, configuration: str, fold: str) -> str:
    """The trainer of the only trained model. If there are several, it is `RECIPE`.

    Raises:
        UserError: there is no trained model; or there are several, and none is of `RECIPE`.
    """
    ending = f"__{plans}__{configuration}"
    models = sorted(results.glob(f"*{ending}/fold_{fold}/{FINAL}"))
    trainers = [model.parents[1].name.removesuffix(ending) for model in models]
    if len(trainers) == 1 or RECIPE in trainers:
        return RECIPE if RECIPE in trainers else trainers[0]
    if trainers:
        raise UserError(f"{results}: several models are trained: choose one with -tr {' or -tr '.join(trainers)}")
    raise UserError(
        f"{results}: has no trained model *{ending}/fold_{fold}: train one first, or choose another with -c, -p and -f"
    )
