from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)

from nnunet_semiseg.planning import CountUnlabeled


class SemiSegPlannerResEncL(CountUnlabeled, nnUNetPlannerResEncL):
    """nnU-Net's ResEnc L preset, whose upper limit of the batch size counts the unlabelled images, too."""

    default_plans_name = "nnUNetSemiSegResEncUNetLPlans"
