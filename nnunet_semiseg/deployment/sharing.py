"""`nnunet_semiseg share`: write a trained model as a model of nnU-Net's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from nnunet_semiseg.deployment.distillation import STOCK_TRAINER, publish
from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.runs import Run


def share(run: Run) -> Path:
    """Write the model under the name `nnUNetTrainer`. `nnUNetv2_predict` can use it without this package.

    nnU-Net's page on sharing models with custom trainers describes this way: store the weights under the name of a
    trainer that everybody has. The plans get the name PLANS_from_TRAINER.

    Args:
        run: a finished training.

    Returns:
        The folder of the written model.

    Raises:
        UserError: the training is not finished, its checkpoint is damaged, or its network is not that of the plans; or
            its trainer is `nnUNetTrainer` already.
        DiskError: the disk is full or read-only.
    """
    if run.trainer == STOCK_TRAINER:
        raise UserError(f"{run.model_folder}: is already a model of {STOCK_TRAINER}: share this folder")
    predictor: Any = load_predictor(run)
    check_stock(predictor, run)
    name = f"{run.plans}_from_{run.trainer}"
    stock = run.model_folder.parent / f"{STOCK_TRAINER}__{name}__{run.configuration}"
    publish(run.folder, stock, name)
    return stock


def check_stock(predictor: Any, run: Run) -> None:
    """Raise UserError for a network that is not that of the plans, or computes something else with the same weights."""
    refusal = UserError(
        f"{run.checkpoint}: the network of {run.trainer} is not the one of the plans: use nnunet_semiseg distill"
        f" -d {run.dataset} -c {run.configuration} -f {run.fold} -tr {run.trainer} -p {run.plans}"
    )
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    channels = determine_num_input_channels(plans, configuration, predictor.dataset_json)
    heads = predictor.label_manager.num_segmentation_heads
    stock = nnUNetTrainer.build_network_architecture(plans, configuration, channels, heads, False).eval()
    try:
        stock.load_state_dict(predictor.network.state_dict())
    except RuntimeError:  # other modules, or other shapes
        raise refusal from None
    patch = torch.randn((1, channels, *configuration.patch_size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.allclose(stock(patch), predictor.network(patch), rtol=1e-4, atol=1e-4):
            raise refusal
