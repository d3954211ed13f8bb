from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncXL,
)

from nnunet_semiseg.planning import SemiSegMemory


class SemiSegPlannerResEncXL(SemiSegMemory, nnUNetPlannerResEncXL):
    """nnU-Net's ResEnc XL preset and its memory target, with the memory of semi-supervised training."""

    default_plans_name = "nnUNetSemiSegResEncUNetXLPlans"
