"""Channels of an image that hold nothing, since the case lacks them, after nnU-Net's normalisation."""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from torch import Tensor

TOLERANCE = 0.01
"""of a normalised intensity; bfloat16 has three digits"""


def values_of_nothing(plans_manager, configuration_manager) -> list[float]:
    """What a voxel of 0 becomes in a channel that is 0 everywhere, for each channel.

    nnU-Net normalises by the image itself, which gives 0, but for CT, where it is by the dataset.
    """
    values = []
    for channel, scheme in enumerate(configuration_manager.normalization_schemes):
        value = 0.0
        if scheme == "CTNormalization":
            about = plans_manager.foreground_intensity_properties_per_channel[str(channel)]
            clipped = np.clip(0, about["percentile_00_5"], about["percentile_99_5"])
            value = float((clipped - about["mean"]) / max(about["std"], 1e-8))
        values.append(value)
    return values


def empty_channels(x: Tensor, nothing: Tensor) -> Tensor:
    """(B, C), bool: True where a channel has nothing but its value of nothing, or the 0 of padding.

    Args:
        x: (B, C, *S).
        nothing: (C,), see `values_of_nothing`.
    """
    nothing = nothing.to(x).view(-1, *[1] * (x.ndim - 2))
    return (((x - nothing).abs() < TOLERANCE) | (x == 0)).flatten(2).all(2)


class RememberEmptyChannels(BasicTransform):
    """To be the first transform: notes which channels of the image (C, *S) are empty."""

    def __init__(self, nothing: list[float]):
        super().__init__()
        self.nothing = torch.tensor(nothing)

    def apply(self, data_dict: dict, **params) -> dict:
        return data_dict | {"empty_channels": empty_channels(data_dict["image"][None], self.nothing)[0]}


class EmptyChannels(BasicTransform):
    """To be the last one: what was empty is 0, whatever noise and brightness have made of it."""

    def apply(self, data_dict: dict, **params) -> dict:
        data_dict["image"][data_dict["empty_channels"]] = 0
        return data_dict
