from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlannerFast(SemiSegMemory, ExperimentPlanner):
    """nnU-Net's default planner with a smaller patch, so that a step takes less time.

    It is meant to save time, not memory: with nnU-Net's own patch, too, all trainers need about as much memory as
    nnU-Net. This patch is so small that labelled and unlabelled samples fit into memory together (`memory=fast`).
    """

    default_plans_name = "nnUNetSemiSegFastPlans"
