"""A trained model, as nnU-Net predicts with it."""

from __future__ import annotations

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.runs import Run


def load_predictor(run: Run) -> nnUNetPredictor:
    """nnU-Net's predictor with this run's last weights, on the CPU; its network is frozen and in eval mode.

    Raises:
        UserError: not trained to its end; a damaged checkpoint.
    """
    if not run.is_trained:
        raise UserError(f"{run.checkpoint}: no such file: train {run.trainer} first, to its end")
    run.load_checkpoint()  # says so where it is damaged; the predictor would not
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(run.model_folder), (run.fold,), "checkpoint_final.pth")
    predictor.network.requires_grad_(False).eval()
    return predictor
