"""The data of one training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Batch:
    """One batch of the labelled and the unlabelled stream, on the device of the training.

    Attributes:
        images: labelled patches (B, C, *S), normalised as in the plans.
        target: their labels as nnU-Net's loss takes them: classes (B, 1, *S), or regions (B, regions, *S) with one more
            channel if there is an ignore label. With deep supervision a list of these, from fine to coarse.
        views: the views of the unlabelled patches by name, each (B_u, C, *S). A voxel shows the same place in
            all views.
        extra: further tensors that the method needs, by name: the masks of other models (`take_masks`), stored
            pseudo-labels (`take_pseudo_label`) or level sets of the labels (`add_level_sets`). Mostly empty.
        cases: the names of the unlabelled cases.
    """

    images: Tensor
    target: Tensor | list[Tensor]
    views: dict[str, Tensor]
    extra: dict[str, Tensor]
    cases: list[str]

    @classmethod
    def from_loader(cls, batch: dict, device: torch.device) -> Batch:
        """Make a batch from the loader's dictionary. Its tensors are sent to the device without waiting for them."""
        tensors = {key: batch[key] for key in ("data", "target", "views", "extra")}
        tensors = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), tensors)
        return cls(images=tensors.pop("data"), cases=batch["cases"], **tensors)

    def streams(self, view: str) -> list[tuple[Tensor, Tensor | list[Tensor] | None, float]]:
        """The labelled stream, and one view of the unlabelled one: images, target (or None), and share of all samples.

        The mean over all samples is a sum over both streams: the share of the stream times the mean of the stream.
        """
        unlabeled = self.views[view]
        share = len(unlabeled) / (len(self.images) + len(unlabeled))
        return [(self.images, self.target, 1 - share), (unlabeled, None, share)]
