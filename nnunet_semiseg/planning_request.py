"""The options of `plan_and_preprocess` and `preprocess_unlabeled`, and the command that we propose.

No large package is imported, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_semiseg.devices import may_have_gpu
from nnunet_semiseg.options import PLANS, at_least, cores, dataset_id, option, positive

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
"""The numbers of processes that nnU-Net uses by default."""
PICTURES = (".png", ".bmp", ".tif")
"""The file endings of 2D images that nnU-Net reads."""


def proposed_planning(dataset: int | str, file_ending: str, labeled_only: bool = False) -> str:
    """The command that plans a new dataset. Without a GPU it makes small plans, which a CPU can train.

    Args:
        dataset: the number of the dataset.
        file_ending: that of its images.
    """
    configuration = "2d" if file_ending in PICTURES else "3d_fullres"
    planner = "" if may_have_gpu() else " -pl SemiSegPlannerSmall"
    only = " --labeled_only" if labeled_only else ""
    return f"nnunet_semiseg plan_and_preprocess -d {dataset} -c {configuration}{planner}{only}"


@dataclass(frozen=True, kw_only=True)
class PreprocessingRequest:
    """The options of preprocessing.

    Attributes:
        dataset_ids: the numbers of the data sets.
        num_processes: one number of processes, or one for each configuration. Empty: nnU-Net's defaults, but at most
            one for each core (`processes`).
        clean: preprocess the unlabelled cases again, even if nothing has changed. A `PlanningRequest` also computes the
            fingerprint again.
    """

    dataset_ids: Sequence[int] = option("-d", type=dataset_id, metavar="ID", help="numbers of the datasets")
    configurations: Sequence[str] = option(
        "-c", metavar="CONFIG", default=CONFIGURATIONS,
        help=f"nnU-Net's configurations; default: {' '.join(CONFIGURATIONS)}",
    )  # fmt: skip
    num_processes: Sequence[int] = option(
        "-np", type=at_least(0), metavar="N", default=(),
        help="number of processes, or one number for each configuration of -c; default: as in nnU-Net, but at most one"
        " for each core",
    )  # fmt: skip
    clean: bool = option(
        "--clean",
        default=False,
        help="preprocess the unlabelled cases again, even if nothing has changed",
    )
    show_progress_bar: bool = option("--no_pbar", default=True, help="show no progress bar")
    verbose: bool = option("--verbose", default=False, help="print what nnU-Net does for each case")

    @property
    def processes(self) -> list[int]:
        """The numbers of processes for preprocessing: a single number, or one for each configuration."""
        return list(self.num_processes) or [cores(PROCESSES.get(c, 4)) for c in self.configurations]


@dataclass(frozen=True, kw_only=True)
class PlanningRequest(PreprocessingRequest):
    """The options of planning.

    Attributes:
        planner: the name of a planner of nnU-Net or of this package.
        overwrite_target_spacing: the spacing of 3d_fullres in mm, in the order z y x. The planner makes those of 2d and
            3d_lowres from it.
        verify_dataset_integrity: run nnU-Net's check of the labelled cases, and check the headers of all unlabelled
            ones.
        preprocess: whether the cases are preprocessed after planning.
        labeled_only: no unlabelled case is needed or preprocessed. This is for a data set with all labels.
        settings: settings `KEY=VALUE`, which are added to those in the plans.
    """

    planner: str = option(
        "-pl", metavar="PLANNER", default="ExperimentPlanner",
        help=f"the planner, which makes the plans; default: %(default)s, nnU-Net's own, which makes {PLANS}",
    )  # fmt: skip
    gpu_memory_target: float | None = option(
        "-gpu_memory_target", type=positive, metavar="GB", default=None,
        help="GPU memory, in GB, that a training may use; default: the planner's own value",
    )  # fmt: skip
    overwrite_target_spacing: Sequence[float] | None = option(
        "-overwrite_target_spacing", type=positive, nargs=3, metavar="MM", default=None,
        help="voxel spacing of 3d_fullres, in mm, in the order z y x, as in nnU-Net; those of 2d and 3d_lowres are made"
        " from it; default: the planner chooses it",
    )  # fmt: skip
    overwrite_plans_name: str | None = option(
        "-overwrite_plans_name", metavar="NAME", default=None, help="name of the plans; default: the planner's own name"
    )
    num_processes_fingerprint: int = option(
        "-npfp",
        type=at_least(1),
        metavar="N",
        default=cores(8),
        help="number of processes for the fingerprint; default: one for each core, at most 8",
    )
    verify_dataset_integrity: bool = option(
        "--verify_dataset_integrity",
        default=False,
        help="first check labelled cases and headers of unlabelled images: recommended once for a dataset",
    )
    clean: bool = option(
        "--clean",
        default=False,
        help="compute the fingerprint and preprocess the unlabelled cases again, even if nothing has changed",
    )
    preprocess: bool = option("--no_pp", default=True, help="stop after the plans, without preprocessing")
    labeled_only: bool = option(
        "--labeled_only", default=False, help="plan without unlabelled cases (imagesUn): for a dataset with all labels"
    )
    settings: Sequence[str] = option(
        "--set", action="extend", metavar="KEY=VALUE", default=(),
        help="settings of the trainers, kept in the plans, such as num_epochs=100; nnunet_semiseg settings lists them",
    )  # fmt: skip
