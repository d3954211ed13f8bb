"""The options of `review`. No large package is imported, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnunet_semiseg.options import ExecutorOptions, ModelOptions, PredictionOptions, at_least, option


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(ExecutorOptions, PredictionOptions, ModelOptions):
    """The options of a review.

    Attributes:
        trainer: the trainer of the model. None: the only trained one, or SemiSegTrainer if there are several.
        length: the number of cases that `review.html` lists.
        estimate: the estimate by which cases are ranked. None: the first one that is available.
        part, parts: the number of this command, and how many commands share the work.
        output: the folder of the review. None: a folder below the dataset's results.
    """

    trainer: str | None = option(
        "-tr", metavar="TRAINER", default=None,
        help="trainer of the model; default: the only trained one, or SemiSegTrainer if there are several",
    )  # fmt: skip
    length: int = option("-n", metavar="N", default=20, help="number of cases to list in review.html")
    purpose: Literal["correction", "labelling", "random"] = option(
        "--for", default="correction",
        help="what the list is for. correction: it shows masks that are probably wrong. labelling: it shows"
        " uncertain cases that differ from each other and from the labelled ones. random: it shows random cases, to"
        " compare other lists with; default: %(default)s",
    )  # fmt: skip
    ensemble: Literal["auto", "folds", "seeds", "mirroring", "teacher", "snapshots", "single"] = option(
        "--ensemble", metavar="KIND", default="auto",
        help="which predictions are compared with each other: folds, seeds, mirroring, teacher, snapshots or single"
        " (docs/review.md explains them); auto takes the first of these that exists; default: %(default)s",
    )  # fmt: skip
    estimate: Literal["combined", "agreement", "expected", "certainty"] | None = option(
        "--estimate", metavar="KIND", default=None,
        help="the estimate of quality that ranks the cases: combined, agreement, expected or certainty (docs/review.md"
        " explains them); default: combined, or expected if there is only one prediction",
    )  # fmt: skip
    parts: int = option("--num_parts", type=at_least(1), metavar="N", default=1, help="share the work among N commands")
    part: int = option("--part_id", metavar="K", default=0, help="which of the N commands this is, from 0 to N - 1")
    show_progress: bool = option("--no_pbar", default=True, help="show no progress bar")
    output: str | None = option(
        "-o",
        metavar="FOLDER",
        default=None,
        help="folder of the review; default: review/MODEL in the dataset's results",
    )
