from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlannerFast(SemiSegMemory, ExperimentPlanner):
    """nnU-Net's default planner with a smaller patch, so that a step takes less time.

    It is meant to save time, not memory: with nnU-Net's own patch, too, all trainers need about as much memory as
    nnU-Net. The patch here is so small that all streams of a step fit at once, as with `memory=fast`.
    """

    default_plans_name = "nnUNetSemiSegFastPlans"
