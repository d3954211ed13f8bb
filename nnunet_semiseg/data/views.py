"""Weak and strong views of one unlabelled patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform

from nnunet_semiseg.data.augmentation import SHARED, flat, kind_of, strengthened

MOST_DRAWS = 10
"""A strong view that equals the weak one is made again. It is made at most this often."""


class ViewsTransform(BasicTransform):
    """Views of one unlabelled patch, made with nnU-Net's own training transforms.

    All views share the spatial transform and the mirroring, so that their predictions can be compared voxel by voxel. A
    `weak` view has nothing else that is random. A `strong` view also has the intensity transforms of labelled patches,
    with new random numbers for each view. They are applied to a clone, because batchgeneratorsv2 changes tensors in
    place. Transforms that set voxels to 0 (`MASKING`) are applied to each view. Transforms of the segmentation are not
    applied, because no label is used.

    nnU-Net applies each intensity transform rarely (0.1 to 0.3), and a third of all patches with one channel stay
    unchanged. A student that sees the same as its teacher learns nothing. So in a strong view the transforms of
    `strong_transforms` are applied with `strong_probability`, as in UniMatch (0.8). A view that has not changed is made
    again, but at most `MOST_DRAWS` times in all.

    Args:
        training_transforms: the result of `nnUNetTrainer.get_training_transforms`.
        views: the names of the views. A name that begins with "weak" is a weak view, any other a strong one.
        strong_probability: the probability of each random intensity transform in a strong view. None: nnU-Net's own
            probabilities, and a view is never made again.
        strong_transforms: the transforms that have this probability, a key of `STRONG`. Others keep their own.

    Raises:
        UserError: it is not known whether all views share a transform; see `kind_of`.
    """

    def __init__(
        self,
        training_transforms: ComposeTransforms,
        views: Sequence[str],
        strong_probability: float | None = None,
        strong_transforms: str = "all",
    ):
        super().__init__()
        self.views = tuple(views)
        self.draws = 1 if strong_probability is None else MOST_DRAWS
        kinds = [(kind_of(transform), transform) for transform in flat(training_transforms)]
        self.spatial, self.intensity, self.masking = (
            ComposeTransforms([transform for k, transform in kinds if k == kind])
            for kind in ("shared", "intensity", "masking")
        )
        if strong_probability is not None:
            self.intensity = strengthened(self.intensity, strong_probability, strong_transforms)

    def apply(self, data_dict: dict, **params) -> dict:
        """Make the views: from an image (C, *S) and a segmentation (1 + K, *S) to (views * C, *S) and (K, *S).

        The first channel of the segmentation is -1 outside the nonzero mask. The other K channels are masks of other
        models (`MaskedDataset`). The views are stacked along the channels, because nnU-Net's loader carries one image.
        """
        segmentation = data_dict["segmentation"]
        segmentation[:1].clamp_(max=0)  # a labelled case that is used as an unlabelled one still has labels
        masked = any(isinstance(transform, MaskImageTransform) for transform in self.masking.transforms)
        if not masked and len(segmentation) == 1 and all(isinstance(t, SHARED) for t in self.spatial.transforms):
            data_dict.pop("segmentation")  # no transform reads it, so it need not be interpolated
        data_dict = self.spatial(**data_dict)
        images = []
        for view in self.views:
            sample = {**data_dict, "image": data_dict["image"].clone()}
            if not view.startswith("weak"):
                sample = self.changed(sample)
            images.append(self.masking(**sample)["image"])
        masks = data_dict["segmentation"][1:] if "segmentation" in data_dict else torch.empty(0)
        return {"image": torch.cat(images), "segmentation": masks}

    def changed(self, sample: dict) -> dict:
        """Change the intensities of a sample, and try again if nothing has changed.

        After `MOST_DRAWS` draws it stays as it is: brightness, for example, may not change an image of zeros.
        """
        before, new = sample["image"].clone() if self.draws > 1 else None, sample
        for _ in range(self.draws):
            new = self.intensity(**sample)
            if before is None or not torch.equal(new["image"], before):
                break
        return new
