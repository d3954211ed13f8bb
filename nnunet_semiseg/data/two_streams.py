"""One loader that puts labelled and unlabelled patches into one batch, with weak and strong views of the latter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import (
    BrightnessAdditiveTransform,
    MultiplicativeBrightnessTransform,
)
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_semiseg.data.empty_channels import EmptyChannels, RememberEmptyChannels
from nnunet_semiseg.data.pseudo_foreground import PseudoForegroundDataset
from nnunet_semiseg.errors import UserError

SHARED = (
    RememberEmptyChannels,
    Convert3DTo2DTransform,
    SpatialTransform,
    Convert2DTo3DTransform,
    MirrorTransform,
    Rot90Transform,
    TransposeAxesTransform,
)
"""These transforms are drawn once for a patch, so all views of the patch share them."""
MOST_DRAWS = 10
"""A strong view that equals the weak one is made again. It is made at most this often."""
STRONG = {
    "all": (BasicTransform,),
    "contrast": (
        BrightnessAdditiveTransform,
        MultiplicativeBrightnessTransform,
        ContrastTransform,
        GammaTransform,
    ),
}
"""The classes of the transforms that have `strong_probability`, for each value of `strong_transforms`."""
MASKING = (MaskImageTransform, EmptyChannels)
KNOWN = {"intensity": ImageOnlyTransform, "segmentation": SegOnlyTransform, "masking": MASKING, "shared": SHARED}


class ViewsTransform(BasicTransform):
    """Views of one unlabelled patch, made with nnU-Net's own training transforms.

    All views share the spatial transform and the mirroring, so that their predictions can be compared voxel by voxel. A
    `weak` view has nothing else that is random. A `strong` view also has nnU-Net's intensity transforms, with new
    random numbers for each view. They are applied to a clone, because batchgeneratorsv2 changes tensors in place.
    Transforms that set voxels to 0 (`MASKING`) are applied to each view. Transforms of the segmentation are not
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


def strengthened(transforms: ComposeTransforms, probability: float, which: str) -> ComposeTransforms:
    """Copy transforms, and give a probability to intensity transforms that nnU-Net applies at random.

    Args:
        transforms: transforms of any kind. Those in a nested `ComposeTransforms` come into one list with the others.
        probability: from 0 to 1.
        which: the transforms that get it, a key of `STRONG`. The others stay as they are.
    """

    def changed(transform: BasicTransform) -> BasicTransform:
        if not isinstance(transform, RandomTransform) or kind_of(transform) != "intensity":
            return transform
        inner = transform.transform
        return RandomTransform(inner, probability) if isinstance(inner, STRONG[which]) else transform

    return ComposeTransforms([changed(transform) for transform in flat(transforms)])


def flat(transforms: ComposeTransforms) -> list[BasicTransform]:
    """A list of the transforms, in order. A nested `ComposeTransforms` is replaced by the transforms in it."""
    inner = (flat(t) if isinstance(t, ComposeTransforms) else [t] for t in transforms.transforms)
    return list(chain.from_iterable(inner))


def kind_of(transform: Any) -> str:
    """The kind of a transform, a key of `KNOWN`: intensity, segmentation, masking or shared.

    Args:
        transform: a `BasicTransform`. It may have the attribute `shared_by_views`.

    Raises:
        UserError: the transform is of an unknown kind, or contains transforms of different kinds.
    """
    if hasattr(transform, "shared_by_views"):
        return "shared" if transform.shared_by_views else "intensity"
    if isinstance(transform, RandomTransform):
        return kind_of(transform.transform)
    if isinstance(transform, OneOfTransform):
        kinds = {kind_of(t): type(t).__name__ for t in transform.list_of_transforms}
        if len(kinds) > 1:
            found = ", ".join(f"{name} ({kind})" for kind, name in kinds.items())
            raise UserError(
                f"OneOfTransform: it chooses between transforms of different kinds, {found}: give each kind its own"
                " OneOfTransform"
            )
        return next(iter(kinds), "intensity")
    if isinstance(transform, ComposeTransforms):  # inside a RandomTransform, which applies all of it or nothing
        kinds = {kind_of(t) for t in flat(transform)}
        if len(kinds) == 1:
            return kinds.pop()
    for kind, classes in KNOWN.items():
        if isinstance(transform, classes):
            return kind
    raise UserError(
        f"{type(transform).__name__}: it is not known whether views of an unlabelled patch share this transform:"
        " derive it from batchgeneratorsv2's ImageOnlyTransform (each strong view has its own) or SegOnlyTransform"
        " (unlabelled patches have none), or set its class attribute shared_by_views = True (all views share it)"
    )


class UnlabeledDataLoader(nnUNetDataLoader):
    """nnU-Net's loader for cases without labels. It takes patches at random places, or around pseudo-foreground.

    Args:
        foreground_share: the share of the samples in a batch, rounded as in nnU-Net, that are taken around locations of
            a class. This needs a dataset with such locations (`PseudoForegroundDataset`). Labels in other datasets are
            not used.
    """

    def __init__(
        self, data, batch_size: int, patch_size, final_patch_size, label_manager, transforms, foreground_share=0.0
    ):
        super().__init__(
            data, batch_size, patch_size, final_patch_size, label_manager, foreground_share, transforms=transforms
        )
        self.has_ignore = False  # else nnU-Net would look for annotated voxels, and there are none
        self.indices = np.asarray(self.indices)  # else NumPy would convert all names again for each batch

    def get_indices(self):
        """Choose cases at random, as nnU-Net does. Instead of a case in the dataset's `left_out`, another one is drawn.

        Only a `PseudoForegroundDataset` has this list.
        """
        drawn: Any = super().get_indices()
        left_out = getattr(self._data, "left_out", ())
        if len(left_out) < len(self.indices):  # to draw again needs no list of all others, which may be long
            while replaced := [i for i, case in enumerate(drawn) if case in left_out]:
                drawn[replaced] = np.random.choice(self.indices, len(replaced))
        return list(drawn)

    def get_bbox(self, data_shape, force_fg, class_locations, overwrite_class=None, verbose=False):
        around = force_fg and isinstance(self._data, PseudoForegroundDataset)
        return super().get_bbox(data_shape, around, class_locations if around else None)


def patch_sizes(loader: nnUNetDataLoader) -> tuple[Any, Any]:
    """The sizes of the patches of a loader: before and after augmentation.

    For 2d plans nnU-Net's loader adds a first axis to both sizes. Here this axis is removed.
    """
    first = 1 if loader.patch_size_was_2d else 0
    return loader.patch_size[first:], loader.final_patch_size[first:]


class TwoStreamLoader(SlimDataLoaderBase):
    """A loader that adds `views` {name: (B_u, C, *S)}, `extra` and `cases` to each labelled batch; see `Batch`.

    Args:
        labeled_loader: nnU-Net's loader.
        unlabeled_loader: a loader whose images are the views, stacked along the channels. If None, the three keys are
            empty.
        views: the names of the views.
        make_targets: a function of the labelled and the unlabelled batch. It returns `extra`, further tensors for the
            loss by name, such as pseudo-labels; see `SemiSupervisedTrainer.target_maker`.
    """

    def __init__(
        self,
        labeled_loader: nnUNetDataLoader,
        unlabeled_loader: nnUNetDataLoader | None,
        views: Sequence[str],
        make_targets,
    ):
        super().__init__(None, labeled_loader.batch_size)
        self.labeled_loader, self.unlabeled_loader = labeled_loader, unlabeled_loader
        self.views, self.make_targets = views, make_targets

    def generate_train_batch(self) -> dict:
        batch: Any = next(self.labeled_loader)  # the annotations say that loaders return nothing
        if self.unlabeled_loader is None:
            return batch | {"views": {}, "extra": {}, "cases": []}
        unlabeled_batch: Any = next(self.unlabeled_loader)
        views = unlabeled_batch["data"].chunk(len(self.views), dim=1)
        # contiguous; otherwise the copy to the GPU waits, and torch.compile sees another memory layout
        batch["views"] = {name: view.contiguous() for name, view in zip(self.views, views, strict=True)}
        batch["extra"] = self.make_targets(batch, unlabeled_batch)
        batch["cases"] = unlabeled_batch["keys"]
        return batch


def add_unlabeled_stream(augmenter, make_unlabeled_loader, views: Sequence[str], make_targets) -> None:
    """Replace the labelled loader in nnU-Net's augmenter by a `TwoStreamLoader`.

    Args:
        augmenter: a SingleThreadedAugmenter or NonDetMultiThreadedAugmenter. Running workers are stopped.
        make_unlabeled_loader: a function of the labelled loader. It returns the unlabelled one, or None.
        views, make_targets: see `TwoStreamLoader`.
    """
    if isinstance(augmenter, SingleThreadedAugmenter):
        name = "data_loader"
    else:
        augmenter._finish()
        name = "generator"
    labeled_loader = getattr(augmenter, name)
    unlabeled_loader = make_unlabeled_loader(labeled_loader)
    setattr(augmenter, name, TwoStreamLoader(labeled_loader, unlabeled_loader, views, make_targets))


def seed_workers(augmenter, seed: int | None, step: int) -> None:
    """Give each worker its own seed. Forked workers share torch's random numbers, so all would augment in the same way.

    Args:
        seed: the seed of the training. None: the system gives one.
        step: a number that is combined with the seed, so that a resumed training does not see the batches of its
            beginning again.
    """
    if not isinstance(augmenter, SingleThreadedAugmenter):
        augmenter._finish()
        entropy = None if seed is None else (seed, step)
        augmenter.seeds = np.random.SeedSequence(entropy).generate_state(augmenter.num_processes).tolist()
