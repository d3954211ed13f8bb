"""What a training step is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Batch:
    """A batch of both streams, on the training's device.

    Attributes:
        images: labelled patches (B, C, *S), normalised as in the plans.
        target: their labels as nnU-Net's loss takes them: (B, 1 or regions, *S), with deep supervision a list of
            these from fine to coarse.
        views: the views of the unlabelled patches by name, each (B_u, C, *S); their voxels lie on each other.
        extra: what the method's `target_maker` makes, by name.
        cases: the names of the unlabelled cases.
    """

    images: Tensor
    target: Tensor | list[Tensor]
    views: dict[str, Tensor]
    extra: dict[str, Tensor]
    cases: list[str]

    @classmethod
    def from_loader(cls, batch: dict, device: torch.device) -> Batch:
        """The loader's dictionary, its tensors sent to the device without waiting for them."""
        tensors = {key: batch[key] for key in ("data", "target", "views", "extra")}
        tensors = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), tensors)
        return cls(images=tensors.pop("data"), cases=batch["cases"], **tensors)

    def streams(self, view: str) -> list[tuple[Tensor, Tensor | list[Tensor] | None, float]]:
        """Images, target (None: unlabelled) and share of all samples, for the labelled stream and for one view.

        A mean over both streams is the sum of their means, each times its share.
        """
        unlabeled = self.views[view]
        share = len(unlabeled) / (len(self.images) + len(unlabeled))
        return [(self.images, self.target, 1 - share), (unlabeled, None, share)]
