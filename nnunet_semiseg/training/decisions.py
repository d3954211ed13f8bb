"""Make pseudo-labels from the output of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_semiseg.losses.components import keep_largest_components
from nnunet_semiseg.losses.segmentation import hard_pseudo_label, has_label
from nnunet_semiseg.training.class_shares import ClassShares, shares_of


class Decisions:
    """Makes pseudo-labels from logits, and counts the voxels of each class.

    Args:
        label_manager: the `LabelManager` of nnU-Net.
        names: the names of the classes or regions, in the order of the heads, without the background.
        device: the device of the training.

    Attributes:
        heads: pseudo-labels keep only the largest component of these classes or regions.
    """

    def __init__(self, label_manager, names: Sequence[str], device: torch.device):
        self.label_manager = label_manager
        self.heads: Sequence[int] = ()
        self.shares = ClassShares(names, device)

    @property
    def one_piece(self) -> str:
        """The names of the classes or regions in `heads`, for the log."""
        first = 0 if self.label_manager.has_regions else 1
        return ", ".join(self.shares.names[head - first] for head in self.heads) or "none"

    @torch.no_grad()
    def __call__(self, logits: Tensor, counts: bool = True) -> Tensor:
        """Make the pseudo-label of logits (B, heads, *S), in the form of `hard_pseudo_label`.

        Args:
            logits: the output of a network.
            counts: whether its voxels are counted by class. Set it to False for labelled samples. The count is there to
                show that a class vanishes from the unlabelled ones.
        """
        label = hard_pseudo_label(logits, self.label_manager)
        label = keep_largest_components(label, self.heads, self.label_manager.has_regions)
        if counts:
            self.count(label)
        return label

    @torch.no_grad()
    def count(self, label: Tensor) -> None:
        """Count the voxels of each class in a pseudo-label, in the form of `hard_pseudo_label`.

        Calling this object with `counts` already does so. This method is for pseudo-labels from elsewhere, such as
        those from a file, or those that masks of other models have changed.
        """
        self.shares.add_pseudo_labels(self._shares(label))

    @torch.no_grad()
    def count_labels(self, target: Tensor) -> None:
        """Count the voxels of each class in the labels of a batch, at full resolution. Ignored voxels do not count."""
        self.shares.add_labels(self._shares(target, has_label(target, self.label_manager)))

    def _shares(self, target: Tensor, known: Tensor | None = None) -> Tensor:
        manager = self.label_manager
        return shares_of(target, manager.num_segmentation_heads, manager.has_regions, known)
