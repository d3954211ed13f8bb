"""Changes to nnU-Net's augmentation: limited rotations, repeatable blur."""

from math import radians

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform

MOST = radians(15)


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
