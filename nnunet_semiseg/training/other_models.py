"""The masks of other models in a training: which masks it reads, and how much their votes count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_semiseg.data.labeled_subset import cases_of_fold, take_labeled
from nnunet_semiseg.data.prepared_masks import PreparedMasks, load_masks
from nnunet_semiseg.data.preprocessed import preprocess_unlabeled_again
from nnunet_semiseg.losses.external_masks import join_masks
from nnunet_semiseg.losses.segmentation import probabilities
from nnunet_semiseg.settings.base import SemiSupervisedSettings


def find_masks(
    settings: SemiSupervisedSettings, plans: dict, configuration: str, fold, dataset_json: dict
) -> PreparedMasks | None:
    """Load the masks that the setting `external_masks` names. None without names or without this setting.

    Raises:
        UserError: see `cases_of_fold`, `take_labeled` and `load_masks`.
    """
    given = getattr(settings, "external_masks", None)
    if not given:
        return None
    names = [given] if isinstance(given, str) else list(given)
    base = Path(str(nnUNet_preprocessed), plans["dataset_name"])
    folder = str(base / PlansManager(plans).get_configuration(configuration).data_identifier)
    fold_cases = cases_of_fold(base, infer_dataset_class(folder).get_identifiers(folder), fold)
    training = take_labeled(fold_cases, [], settings.num_labeled, dataset_json)[0]
    raw = Path(os.environ["nnUNet_raw"], base.name) if os.environ.get("nnUNet_raw") else None
    classes = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    fix = preprocess_unlabeled_again(plans, configuration)
    return load_masks(names, raw, base, plans, configuration, fix, training, classes)


class MaskVotes:
    """Calls `join_masks`, and remembers the arguments that do not change in a training.

    Args:
        masks: the result of `find_masks`.
        names: the names of the classes or regions, in the order of the heads, without the background.
        unsure: the setting `external_unsure`.
    """

    def __init__(self, masks: PreparedMasks, names: list[str], label_manager: Any, unsure: float, device: torch.device):
        regions = label_manager.has_regions
        rows = [[*([] if regions else [0.0]), *(weights[name] for name in names)] for weights in masks.weights]
        self.weights, self.unsure = torch.tensor(rows, device=device), unsure
        self.label_manager = label_manager
        self.regions = None
        if regions:
            values = [r if isinstance(r, (list, tuple)) else (r,) for r in label_manager.foreground_regions]
            self.regions = [torch.tensor(v, device=device) for v in values]

    def __call__(self, decision: Tensor, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Make the pseudo-label and the weights of its voxels.

        The mean of the weights is 1, so that masks do not make the loss larger.

        Args:
            decision: the decision of a teacher, as `hard_pseudo_label` returns it.
            logits: its logits, (B, heads, *S).
            masks: (B, K, *S), as `take_masks` returns them.

        Returns:
            The pseudo-label, in the form of the decision, and the weights (B, 1, *S).
        """
        p = probabilities(logits, self.label_manager)
        label, counts = join_masks(decision, p, masks, self.weights, self.unsure, self.regions)
        return label, counts / counts.mean()
