from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_semiseg.planning import CountUnlabeled


class SemiSegPlanner(CountUnlabeled, ExperimentPlanner):
    """nnU-Net's default planner, whose upper limit of the batch size counts the unlabelled images, too."""

    default_plans_name = "nnUNetSemiSegPlans"
