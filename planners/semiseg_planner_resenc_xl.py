from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncXL,
)

from nnunet_semiseg.planning import CountUnlabeled


class SemiSegPlannerResEncXL(CountUnlabeled, nnUNetPlannerResEncXL):
    """nnU-Net's ResEnc XL preset, whose upper limit of the batch size counts the unlabelled images, too."""

    default_plans_name = "nnUNetSemiSegResEncUNetXLPlans"
