"""The networks of the epochs with the best validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_semiseg.networks.mutual_learning import average_logits


class BestPool:
    """Keeps networks with two decoders, and which of the decoders validated better.

    Args:
        networks: frozen copies of the student, whose weights are replaced.
        regions: whether the heads are regions.

    Attributes:
        state: what a resumed training needs besides the weights, on the CPU: for each network its Dice (-1: no epoch
            yet), and the number of its better decoder.
    """

    def __init__(self, networks: Sequence[Any], regions: bool):
        self.networks, self.regions = networks, regions
        self.state = {
            "pool_dice": torch.full((len(networks),), -1.0),
            "pool_branch": torch.zeros(len(networks), dtype=torch.long),
        }

    def offer(self, network: nn.Module, dice: float, branch: int) -> None:
        """Put the weights of this epoch into the pool of the best epochs, unless all in it are at least as good.

        Args:
            network: the student.
            dice, branch: the Dice of its better decoder, and the number of this decoder, 0 or 1.
        """
        worst = int(self.state["pool_dice"].argmin())
        if dice > self.state["pool_dice"][worst]:
            self.networks[worst].load_state_dict(network.state_dict())
            self.state["pool_dice"][worst] = dice
            self.state["pool_branch"][worst] = branch

    @torch.no_grad()
    def predict(self, images: Tensor, passes: int, dropout: float):
        """Predict with the pool, the networks of the best epochs. Returns None if the pool is empty.

        Args:
            images: (B, C, *S).
            passes, dropout: see `MutualLearningUNet.forward`.

        Returns:
            Three means of probabilities over these networks, as logits (B, heads, *S): for each of the two decoders;
            of the decoder that validated better in each network; over passes with dropout (None for 0 passes).
        """
        predictions = [
            (network(images, branches=True, passes=passes, dropout=dropout), int(branch))
            for network, branch, dice in zip(
                self.networks, self.state["pool_branch"], self.state["pool_dice"], strict=True
            )
            if dice >= 0
        ]
        if not predictions:
            return None
        branches = [average_logits([p[0][i] for p, _ in predictions], self.regions) for i in range(2)]
        mean = average_logits([p[0][branch] for p, branch in predictions], self.regions)
        sampled = average_logits([p[2] for p, _ in predictions], self.regions) if passes else None
        return branches, mean, sampled


def pseudo_dice(val_outputs: list[dict], name: str) -> float:
    """nnU-Net's pseudo Dice of one decoder: the mean over classes in labels or predictions, or 0 if there are none."""
    tp, fp, fn = (np.sum([o[f"{key}_hard_{name}"] for o in val_outputs], 0) for key in ("tp", "fp", "fn"))
    total = 2 * tp + fp + fn
    return float((2 * tp / np.maximum(total, 1))[total > 0].mean()) if total.any() else 0.0
