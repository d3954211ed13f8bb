from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlannerResEncM(SemiSegMemory, nnUNetPlannerResEncM):
    """nnU-Net's ResEnc M preset and its memory target, with the memory of semi-supervised training."""

    default_plans_name = "nnUNetSemiSegResEncUNetMPlans"
