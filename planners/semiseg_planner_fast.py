from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlannerFast(SemiSegMemory, ExperimentPlanner):
    """nnU-Net's default planner with a smaller patch, in which a step takes less time.

    This is a choice of time, not of memory: with nnU-Net's own patch, too, every trainer stays near nnU-Net's memory.
    The patch here is so small that all streams of a step fit at once, as `memory=fast` keeps them.
    """

    default_plans_name = "nnUNetSemiSegFastPlans"
