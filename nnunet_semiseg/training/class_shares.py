"""The classes in the pseudo-labels of an epoch, against those in the labels: one that vanishes is seen at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VANISHING = 0.05
"""a class's share of the pseudo-labels, as a part of its share of the labels, below which it is vanishing"""
SETTLED = 0.1
"""share of a training before which a class is not missed"""


class ClassShares:
    """Sums over an epoch, on the training's device: nothing waits for the GPU before the epoch's end.

    Labelled patches are drawn around foreground more often than unlabelled ones, so that of a class that is learnt well
    the shares may differ by a factor of a few.

    Args:
        names: of the classes or regions, background left out.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        self.sums = torch.zeros(2, len(self.names), device=device)
        self.counts = torch.zeros(2, device=device)
        self.missing: set[str] = set()

    def add_labels(self, shares: Tensor) -> None:
        """Shares (heads,) as `shares_of` gives them, of a labelled batch."""
        self._add(0, shares)

    def add_pseudo_labels(self, shares: Tensor) -> None:
        """Shares (heads,) as `shares_of` gives them, of what an unlabelled batch is taken for."""
        self._add(1, shares)

    def _add(self, row: int, shares: Tensor) -> None:
        self.sums[row] += shares[-len(self.names) :]  # classes have a head for the background
        self.counts[row] += 1

    def end_epoch(self, progress: float) -> list[str]:
        """Lines for the log, and begin anew.

        Args:
            progress: of the training, 0 to 1.
        """
        (labels, pseudo), counts = (self.sums / self.counts[:, None]).tolist(), self.counts.tolist()
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
                    f" voxels, and {100 * of_labels:.3f} % of the labels'"
                )
        return lines


def shares_of(target: Tensor, heads: int, regions: bool, known: Tensor | None = None) -> Tensor:
    """The share of voxels of each class or region, (heads,).

    Args:
        target: as nnU-Net's losses take it: classes (B, 1, *S), or regions (B, heads or more, *S).
        heads: how many classes or regions.
        regions: whether the target has a channel for each.
        known: (B, 1, *S), bool; voxels to count. None: all.
    """
    masks = [target[:, i : i + 1].bool() if regions else target == i for i in range(heads)]
    if known is None:
        return torch.stack([mask.float().mean() for mask in masks])
    return torch.stack([(mask & known).float().mean() for mask in masks]) / known.float().mean().clamp_min(1e-6)
