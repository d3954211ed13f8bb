from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_semiseg.planning import CountUnlabeled


class SemiSegPlanner(CountUnlabeled, ExperimentPlanner):
    """nnU-Net's default planner, with a batch size that counts the unlabelled images, too."""

    default_plans_name = "nnUNetSemiSegPlans"
