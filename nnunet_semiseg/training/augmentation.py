"""Changes to nnU-Net's augmentation."""

from math import radians

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform

MOST = radians(15)


def limited(rotation: tuple[float, float]) -> tuple[float, float]:
    """nnU-Net's range of rotations, in radians, without those that change a side."""
    return max(rotation[0], -MOST), min(rotation[1], MOST)


def repeatable(transform: BasicTransform) -> BasicTransform:
    """The same transform, in place, and all in it: blur no longer takes the algorithm that was the faster one just now.

    Which that is differs between runs, and so would the last digits of what a seed ought to fix.
    """
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    for value in vars(transform).values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, BasicTransform):
                repeatable(inner)
    return transform
