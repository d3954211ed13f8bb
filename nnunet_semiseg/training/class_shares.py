"""How often each class is in the pseudo-labels and in the labels of an epoch. It shows when a class vanishes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_semiseg.training.distributed import Ranks

VANISHING = 0.05
"""A class is vanishing if its share of the pseudo-labels is less than this part of its share of the labels."""
SETTLED = 0.1
"""Before this share of the training, no class is reported as vanishing."""


class ClassShares:
    """The share of voxels of each class, added up over an epoch on the device of the training.

    The CPU waits for the GPU only at the end of the epoch. Labelled patches are taken from the foreground more often
    than unlabelled ones. So even for a class that is learnt well, the two shares may differ by a factor of two or more.

    Args:
        names: the names of the classes or regions, without the background.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self.sums = torch.zeros(2, len(self.names), device=device)
        self.counts = torch.zeros(2, device=device)
        self.missing: set[str] = set()

    def add_labels(self, shares: Tensor) -> None:
        """Add the shares (heads,) of the classes in the labels of a batch, see `shares_of`."""
        self._add(0, shares)

    def add_pseudo_labels(self, shares: Tensor) -> None:
        """Add the shares (heads,) of the classes in the pseudo-labels of a batch, see `shares_of`."""
        self._add(1, shares)

    def _add(self, row: int, shares: Tensor) -> None:
        self.sums[row] += shares[-len(self.names) :]  # for classes the first head is the background
        self.counts[row] += 1

    def end_epoch(self, progress: float, ranks: Ranks) -> list[str]:
        """Compare the shares of the epoch. Returns the lines for the log, and sets the sums to 0.

        There are no lines if the epoch had no pseudo-labels.

        Args:
            progress: the progress of the training, 0 to 1.
        """
        sums, counts = ranks.sum(self.sums), ranks.sum(self.counts)
        (labels, pseudo), counts = (sums / counts[:, None]).tolist(), counts.tolist()
        self.sums.zero_()
        self.counts.zero_()
        if not all(counts):
            return []
        shares = ", ".join(
            f"{name} {100 * of_pseudo:.2f} ({100 * of_labels:.2f})"
            for name, of_pseudo, of_labels in zip(self.names, pseudo, labels, strict=True)
        )
        lines = [f"share of voxels in pseudo-labels (in labels), %: {shares}"]
        for name, of_pseudo, of_labels in zip(self.names, pseudo, labels, strict=True):
            if of_pseudo >= VANISHING * of_labels or progress < SETTLED:
                self.missing.discard(name)
            elif name not in self.missing:
                self.missing.add(name)
                lines.append(
                    f"WARNING: {name} vanishes from the pseudo-labels: it has {100 * of_pseudo:.3f} % of their"
                    f" voxels, and {100 * of_labels:.3f} % of the voxels in labels"
                )
        return lines


def shares_of(target: Tensor, heads: int, regions: bool, known: Tensor | None = None) -> Tensor:
    """The share of voxels of each class or region, (heads,).

    Args:
        target: as nnU-Net's losses take it: classes (B, 1, *S), or regions (B, heads or more, *S).
        heads: the number of classes or regions.
        regions: whether the target has a channel for each region.
        known: the voxels that are counted, (B, 1, *S), bool. None: all.
    """
    masks = [target[:, i : i + 1].bool() if regions else target == i for i in range(heads)]
    if known is None:
        return torch.stack([mask.float().mean() for mask in masks])
    return torch.stack([(mask & known).float().mean() for mask in masks]) / known.float().mean().clamp_min(1e-6)
