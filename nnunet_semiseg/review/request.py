"""What a review is asked for, and what makes no sense, refused before any work."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from nnunet_semiseg.devices import check_device
from nnunet_semiseg.discovery import find_trainer
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, folder_for
from nnunet_semiseg.planning import read_plans
from nnunet_semiseg.review.accept import REVIEWS
from nnunet_semiseg.runs import Run, is_fold
from nnunet_semiseg.schema import check_configuration

FINAL = "checkpoint_final.pth"
RECIPE = "SemiSegTrainer"
"""whose model is taken where several are trained"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A review.

    Attributes:
        run: the trained model.
        purpose: `correction`, `labelling` or `random`: what the list is for.
        length: of the list.
        ensemble: the kind of members, or `auto`.
        estimate: a key of `ESTIMATES` that cases are ranked by; None: the first that there is.
        part, parts: which share of the cases this command predicts.
        output: the review's folder.
    """

    run: Run
    purpose: str
    length: int
    ensemble: str
    estimate: str | None
    device: str
    mirroring: bool
    part: int
    parts: int
    output: Path
    show_progress: bool


def make_request(args: Namespace) -> Request:
    """The request of a command line.

    Raises:
        UserError: no such data set, plans, configuration, trainer, model or device; numbers that make no sense.
    """
    if args.n < 1:
        raise UserError(f"-n {args.n}: give a number of cases, 1 or more")
    if not 0 <= args.part_id < args.num_parts:
        raise UserError(f"--part_id {args.part_id}: give a number from 0 to {args.num_parts - 1}, one less than parts")
    if not is_fold(args.f):
        raise UserError(f"-f {args.f}: give the number of a fold, or all")
    dataset_folder("nnUNet_raw", args.d)
    preprocessed, results = (dataset_folder(f"nnUNet_{place}", args.d) for place in ("preprocessed", "results"))
    plans = read_plans(preprocessed, args.p)
    fix = "plan first with nnunet_semiseg plan_and_preprocess"
    check_configuration(plans, args.c, preprocessed / f"{args.p}.json", fix)
    trainer = args.tr or _only_trainer(results, args.p, args.c, args.f)
    find_trainer(trainer)
    run = Run(results.name, args.c, args.f, trainer, args.p)
    if not run.is_trained:
        raise UserError(
            f"{run.checkpoint}: no such file: train {trainer} first, to its end, or choose with -tr, -p and -f"
        )
    if args.executor == "local":
        check_device(args.device)
    output = folder_for(args.o or results / REVIEWS / f"{run.name}__{run.configuration}__fold_{run.fold}")
    return Request(
        run=run, purpose=args.purpose, length=args.n, ensemble=args.ensemble, estimate=args.estimate,
        device=args.device, mirroring=not args.disable_tta, part=args.part_id, parts=args.num_parts, output=output,
        show_progress=not args.no_pbar,
    )  # fmt: skip


def _only_trainer(results: Path, plans: str, configuration: str, fold: str) -> str:
    """The trainer of the one model that is trained, or of the recipe's; raises UserError where that is none."""
    ending = f"__{plans}__{configuration}"
    models = sorted(results.glob(f"*{ending}/fold_{fold}/{FINAL}"))
    trainers = [model.parents[1].name.removesuffix(ending) for model in models]
    if len(trainers) == 1 or RECIPE in trainers:
        return RECIPE if RECIPE in trainers else trainers[0]
    if trainers:
        raise UserError(f"{results}: several models are trained: choose with -tr {' or -tr '.join(trainers)}")
    raise UserError(f"{results}: no trained model *{ending}/fold_{fold}: train one first, or choose with -p and -f")
