"""The options of `compare`. `text_effect` uses some of them. No large package is imported, so that help is quick."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_semiseg.options import ExecutorOptions, ModelOptions, PredictionOptions, at_least, cores, option


def size(text: str) -> int | None:
    """Read a number of labelled cases; `all` gives None. Raises ArgumentTypeError for other text."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text}: give whole numbers, or all") from None


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options that say how predictions are evaluated.

    Attributes:
        num_processes: the number of processes for the evaluation.
    """

    num_processes: int = option(
        "-np",
        type=at_least(0),
        metavar="N",
        default=cores(8),
        help="number of processes for the evaluation; default: one for each core, at most 8",
    )


@dataclass(frozen=True, kw_only=True)
class Request(EvaluationOptions, ExecutorOptions, PredictionOptions, ModelOptions):
    """The options of a comparison.

    Attributes:
        trainers: the trainers to compare. The first one is the baseline.
        seeds: the number of runs of each trainer, with the seeds 0, 1, ... None: one run of the plans as they are.
        sizes: the numbers of labelled cases to train with; None means all. Empty: the labelled set is not changed.
        curve: trainers that are trained with every size; the others are trained with the first size only. None: all.
        upper_bound: a dataset with all labels. The baseline is also trained on it.
        noise: standard deviations of the noise on the normalised test images.
        gpus: the GPUs that train and predict at the same time, by their numbers from 0. Empty: the device `device`.
        jobs: how many jobs run at the same time on each GPU, or on the CPU.
        tolerance: the tolerance of the normalised surface distance, in mm.
    """

    trainers: Sequence[str] = option(
        "--trainers", metavar="TRAINER", default=("SupervisedTrainer", "SemiSegTrainer"),
        help="trainers to compare, the first one is the baseline; default: SupervisedTrainer SemiSegTrainer",
    )  # fmt: skip
    seeds: int | None = option(
        "--seeds", metavar="N", default=None,
        help="number of runs of each trainer, with the seeds 0, 1, ...; default: one run, with the seed in the plans if"
        " there is one",
    )  # fmt: skip
    sizes: Sequence[int | None] = option(
        "--labeled", type=size, metavar="N", default=(),
        help="numbers of labelled cases to train with, for a learning curve: numbers, or all; default: keep the"
        " labelled set",
    )  # fmt: skip
    curve: Sequence[str] | None = option(
        "--curve", metavar="TRAINER", default=None,
        help="trainers to train with every size of --labeled; the others get the first size only; default: all",
    )  # fmt: skip
    upper_bound: int | str | None = option(
        "--upper-bound", metavar="ID", default=None,
        help="dataset with all labels: the first trainer is also trained on it, as an upper bound",
    )  # fmt: skip
    noise: Sequence[float] = option(
        "--noise", metavar="SIGMA", default=(),
        help="also test with noise on the images; give standard deviations, in units of the normalised intensity",
    )  # fmt: skip
    gpus: Sequence[int] = option(
        "--gpus",
        metavar="N",
        default=(),
        help="GPUs that work at the same time, such as 0 1 for the first two; default: one GPU, or the CPU with"
        " -device cpu",
    )
    jobs: int = option(
        "--jobs",
        type=at_least(1),
        metavar="N",
        default=1,
        help="number of trainings or predictions that run at the same time on each GPU, or on the CPU",
    )
    tolerance: float = option(
        "--tolerance",
        metavar="MM",
        default=2.0,
        help="tolerance of the metric NSD (normalised surface distance), in mm",
    )

    @property
    def main_size(self) -> int | None:
        """The number of labelled cases of the runs that are compared. The other numbers are points of the curve."""
        return self.sizes[0] if self.sizes else None
