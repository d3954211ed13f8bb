"""What a review is asked for. It imports nothing large: the help of `review` is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnunet_semiseg.options import ExecutorOptions, ModelOptions, PredictionOptions, option


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(ExecutorOptions, PredictionOptions, ModelOptions):
    """A review.

    Attributes:
        trainer: of the model; None: the only one that is trained.
        length: of the list.
        estimate: what cases are ranked by; None: the first that there is.
        part, parts: which share of the cases this command predicts.
        output: the review's folder; None: below the dataset's results.
    """

    trainer: str | None = option(
        "-tr", metavar="TRAINER", default=None,
        help="trainer of the model; default: the one that is trained, or SemiSegTrainer where there are several",
    )  # fmt: skip
    length: int = option("-n", metavar="N", default=20, help="number of cases on the list")
    purpose: Literal["correction", "labelling", "random"] = option(
        "--for", default="correction",
        help="what the list is for. correction: masks that are likely wrong. labelling: cases that are uncertain, and"
        " differ from each other and from the labelled ones. random: a list to compare with; default: %(default)s",
    )  # fmt: skip
    ensemble: Literal["auto", "folds", "seeds", "mirroring", "teacher", "snapshots", "single"] = option(
        "--ensemble", metavar="KIND", default="auto",
        help="which predictions are compared with each other: folds, seeds, mirroring, teacher, snapshots or single;"
        " auto takes the first of these that there is; default: %(default)s",
    )  # fmt: skip
    estimate: Literal["combined", "agreement", "expected", "certainty"] | None = option(
        "--estimate", metavar="KIND", default=None,
        help="what the cases are ranked by: combined, agreement, expected or certainty; default: combined, or expected"
        " where there is one prediction",
    )  # fmt: skip
    parts: int = option("--num_parts", metavar="N", default=1, help="number of commands that share the work")
    part: int = option("--part_id", metavar="K", default=0, help="which of them this one is, from 0 on")
    show_progress: bool = option("--no_pbar", default=True, help="show no progress bar")
    output: str | None = option(
        "-o",
        metavar="FOLDER",
        default=None,
        help="folder of the review; default: review/MODEL in the dataset's results",
    )
