from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlannerSmall(SemiSegMemory, ExperimentPlanner):
    """nnU-Net's default planner with a thin network and a small patch, for CPUs and quick tests.

    The network has 16 to 128 features instead of 32 to 320 (3d) or 512 (2d).
    """

    default_plans_name = "nnUNetSemiSegSmallPlans"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.UNet_base_num_features = 16
        self.UNet_max_features_2d = self.UNet_max_features_3d = 128
