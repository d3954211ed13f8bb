from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlanner(SemiSegMemory, ExperimentPlanner):
    """nnU-Net's default planner, with the memory of semi-supervised training."""

    default_plans_name = "nnUNetSemiSegPlans"
