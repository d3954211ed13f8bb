"""The beginning of a training, which uses labels only. It ends when every class is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from nnunet_semiseg.losses.segmentation import hard_pseudo_label, has_label
from nnunet_semiseg.training.distributed import Ranks

SHORTEST, LONGEST = 0.1, 0.4
"""The smallest and the largest length of a warm-up, as shares of the training."""
LEARNT = 0.5
"""A class is learnt if its Dice on the labelled patches of an epoch reaches this. Boxes of other labelled patches are
pasted into them: in `BCPTrainer` in every step, in `SemiSegTrainer` in half of the steps."""


class WarmUp:
    """Decides when unlabelled images are used. A teacher that does not know a class would teach that it does not exist.

    Args:
        share: the length of the warm-up as a share of the training. None: the warm-up ends after the first epoch in
            which every class was learnt, but not before `SHORTEST` and not after `LONGEST`.
        steps: the number of steps of the training.
        label_manager: the `LabelManager` of nnU-Net.
        names: the names of the classes or regions, without the background.
        device: the device of the training.

    Attributes:
        state: what a resumed training needs to continue the warm-up.
    """

    def __init__(self, share: float | None, steps: int, label_manager, names: Sequence[str], device: torch.device):
        self.label_manager, self.names, self.waits = label_manager, list(names), share is None
        self.shortest = ceil(SHORTEST * steps)
        longest = ceil((LONGEST if share is None else share) * steps)
        self.state = {"first_step": torch.tensor(longest)}
        self.sums = torch.zeros(3, len(self.names), device=device)  # true positives, false positives, false negatives

    def __str__(self) -> str:
        if not self.waits:
            return f"before step {self.first_step}"
        return f"until every class is learnt, between step {self.shortest} and {self.first_step}"

    @property
    def first_step(self) -> int:
        """The number of the first step that uses unlabelled images.

        While the warm-up waits for the classes, it is the latest possible one, and can become smaller.
        """
        return int(self.state["first_step"])

    @torch.no_grad()
    def add(self, logits: Tensor, target: Tensor) -> None:
        """Compare logits (B, heads, *S) of labelled patches with their target, as nnU-Net's losses take it."""
        if not self.waits:
            return
        manager, count = self.label_manager, torch.count_nonzero
        known, decision = has_label(target, manager), hard_pseudo_label(logits, manager)
        for row, head in enumerate(range(manager.num_segmentation_heads)[-len(self.names) :]):
            # one class at a time: masks of all classes would need more memory than nnU-Net's step
            found, true = (x[:, head : head + 1] > 0 if manager.has_regions else x == head for x in (decision, target))
            found, true = found & known, true & known
            self.sums[:, row] += torch.stack([count(found & true), count(found & ~true), count(true & ~found)])

    def end_epoch(self, step: int, ranks: Ranks) -> list[str]:
        """End the warm-up if every class was learnt. Returns the lines for the log.

        Args:
            step: the number of steps that are done.
        """
        if not self.waits or step > self.first_step:
            return []
        true, false, missed = ranks.sum(self.sums)
        dice = dict(zip(self.names, (2 * true / (2 * true + false + missed)).tolist(), strict=True))
        self.sums.zero_()
        # NaN, for a class that is in no patch and was not found, is not below
        if step >= self.shortest and not any(value < LEARNT for value in dice.values()):
            self.state["first_step"].fill_(min(step, self.first_step))
        listed = ", ".join(f"{name} {value:.2f}" for name, value in dice.items())
        after = f"once it is {LEARNT} for every class, from step {self.first_step} on at the latest (warm_up)"
        begin = "from now on" if step >= self.first_step else after
        return [f"Dice on labelled patches: {listed}; unlabelled images are used {begin}"]
