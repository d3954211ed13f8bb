"""Limits to nnU-Net's augmentation, where left and right mean something."""

from math import radians

MOST = radians(15)


def limited(rotation: tuple[float, float]) -> tuple[float, float]:
    """nnU-Net's range of rotations, in radians, without those that change a side."""
    return max(rotation[0], -MOST), min(rotation[1], MOST)
