from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_semiseg.planning import CountUnlabeled


class SemiSegPlannerResEncM(CountUnlabeled, nnUNetPlannerResEncM):
    """nnU-Net's ResEnc M preset, whose upper limit of the batch size counts the unlabelled images, too."""

    default_plans_name = "nnUNetSemiSegResEncUNetMPlans"
