"""Planning for semi-supervised training, with nnU-Net's planners or ours."""

from nnunet_semiseg.planning.planners import (
    CountUnlabeled,
    SemiSegMemory,
    default_plans_name,
    find_planner,
    plans_name_of,
)
from nnunet_semiseg.planning.plans import check_plans_name, copy_plans, planning_command, read_plans
from nnunet_semiseg.planning.steps import NUM_FOLDS, plan_and_preprocess

__all__ = [
    "NUM_FOLDS",
    "CountUnlabeled",
    "SemiSegMemory",
    "check_plans_name",
    "copy_plans",
    "default_plans_name",
    "find_planner",
    "plan_and_preprocess",
    "planning_command",
    "plans_name_of",
    "read_plans",
]
