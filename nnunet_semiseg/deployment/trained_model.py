"""Load a trained model into nnU-Net's predictor."""

from __future__ import annotations

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.runs import Run


def load_predictor(run: Run) -> nnUNetPredictor:
    """Make nnU-Net's predictor with the last weights of this run, on the CPU. The network is frozen and in eval mode.

    Raises:
        UserError: the training is not finished, or its checkpoint is damaged.
    """
    if not run.is_trained:
        raise UserError(f"{run.checkpoint}: no such file: finish the training of {run.trainer} first")
    run.load_checkpoint()  # if it is damaged, this error says so; that of the predictor would not
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(run.model_folder), (run.fold,), "checkpoint_final.pth")
    predictor.network.requires_grad_(False).eval()
    return predictor
