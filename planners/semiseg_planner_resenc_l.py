from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlannerResEncL(SemiSegMemory, nnUNetPlannerResEncL):
    """nnU-Net's ResEnc L preset and its memory target, with the memory of semi-supervised training."""

    default_plans_name = "nnUNetSemiSegResEncUNetLPlans"
