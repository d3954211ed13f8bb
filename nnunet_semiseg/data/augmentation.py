"""Changes to nnU-Net's augmentation: probabilities, local changes, limited rotations, repeatable blur."""

from __future__ import annotations

from itertools import chain
from math import radians
from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import (
    BrightnessAdditiveTransform,
    MultiplicativeBrightnessTransform,
)
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.local.brightness_gradient import BrightnessGradientAdditiveTransform
from batchgeneratorsv2.transforms.local.local_gamma import LocalGammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from torch import Tensor

from nnunet_semiseg.data.empty_channels import EmptyChannels, RememberEmptyChannels
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
MOST = radians(15)


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
        named = isinstance(transform.transform, STRONG[which])
        return RandomTransform(transform.transform, probability) if named else transform

    return ComposeTransforms([changed(transform) for transform in flat(transforms)])


def with_local_changes(transforms: ComposeTransforms, probability: float) -> ComposeTransforms:
    """Copy training transforms, and change parts of the image after nnU-Net's last change of contrast or gamma.

    The changes are those of nnU-Net's trainer DA5: a wide hill or valley of brightness, and another gamma (0.01 to 0.8,
    or 1.5 to 4) that fades with the distance from a point. So a structure is not always brighter than another one, as
    where a coil near the skin makes fat brighter than blood. The hill is 1 to 5 standard deviations of the patch high
    or deep. In DA5 it is 1 to 5 units, which is the same only if images are divided by their standard deviation.

    Args:
        transforms: the result of `nnUNetTrainer.get_training_transforms`.
        probability: the probability of each of the two changes, for each channel of a patch, from 0 to 1.
    """
    steps = flat(transforms)
    # later transforms may change channels that are no images: the labels of the stage before, in a cascade
    end = 1 + max((i for i, t in enumerate(steps) if isinstance(inner(t), STRONG["contrast"])), default=-1)
    shared: dict[str, Any] = {"loc": (-0.5, 1.5), "same_for_all_channels": False, "p_per_channel": probability}
    hill = BrightnessGradientAdditiveTransform(_width, max_strength=_height, mean_centered=False, **shared)
    gamma = LocalGammaTransform(_width, gamma=_gamma, **shared)
    return ComposeTransforms([*steps[:end], hill, gamma, *steps[end:]])


# what DA5 draws; its own functions are private, and its width fails on fewer than 6 voxels


def _width(shape: tuple[int, ...], axis: int) -> float:
    return float(np.exp(np.random.uniform(np.log(shape[axis] / 6), np.log(shape[axis]))))


def _height(image: Tensor, kernel: np.ndarray) -> float:
    return float(image.std()) * float(np.random.choice((-1, 1)) * np.random.uniform(1, 5))


def _gamma() -> float:
    return float(np.random.uniform(0.01, 0.8) if np.random.rand() < 0.5 else np.random.uniform(1.5, 4))


def inner(transform: BasicTransform) -> BasicTransform:
    """The transform in a `RandomTransform`, or the transform itself."""
    return transform.transform if isinstance(transform, RandomTransform) else transform


def flat(transforms: ComposeTransforms) -> list[BasicTransform]:
    """A list of the transforms, in order. A nested `ComposeTransforms` is replaced by the transforms in it."""
    lists = (flat(t) if isinstance(t, ComposeTransforms) else [t] for t in transforms.transforms)
    return list(chain.from_iterable(lists))


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


def limited(rotation: tuple[float, float]) -> tuple[float, float]:
    """Limit nnU-Net's range of rotations, in radians, to 15 degrees, so that left and right do not change places."""
    return max(rotation[0], -MOST), min(rotation[1], MOST)


def repeatable(transform: BasicTransform) -> BasicTransform:
    """Make a transform, and all transforms inside it, give the same result for the same seed. It is changed in place.

    The blur transform measures which of two algorithms is faster and takes that one. The choice differs between runs,
    and so the last digits of the result differ, too. Here the measurement is switched off.
    """
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    for value in vars(transform).values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, BasicTransform):
                repeatable(inner)
    return transform
