"""Channels of an image that hold nothing, since the case lacks them, after nnU-Net's normalisation."""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from torch import Tensor

TOLERANCE = 0.01
"""of a normalised intensity; bfloat16 has three digits"""


def values_of_nothing(plans_manager, configuration_manager) -> list[float]:
    """What a voxel of 0 becomes in a channel that is 0 everywhere, for each channel.

    By nnU-Net's own normalisation: 0, but for CT, where it is by the dataset instead of the image.
    """
    nothing = np.zeros((len(configuration_manager.normalization_schemes), 1, 1, 1), np.float32)
    about = plans_manager.foreground_intensity_properties_per_channel
    normalized = DefaultPreprocessor(verbose=False)._normalize(nothing, nothing[:1], configuration_manager, about)
    return normalized.flatten().tolist()


def empty_channels(x: Tensor, nothing: Tensor) -> Tensor:
    """(B, C), bool: True where a channel has nothing but its value of nothing, or the 0 of padding.

    Args:
        x: (B, C, *S).
        nothing: (C,), see `values_of_nothing`.
    """
    nothing = nothing.to(x).view(-1, *[1] * (x.ndim - 2))
    return (((x - nothing).abs() < TOLERANCE) | (x == 0)).flatten(2).all(2)


def keep_empty(transforms: ComposeTransforms, plans_manager, configuration_manager) -> ComposeTransforms:
    """These transforms, under which a channel that a case lacks stays empty: it becomes 0."""
    nothing = values_of_nothing(plans_manager, configuration_manager)
    if len(nothing) == 1:
        return transforms
    return ComposeTransforms([RememberEmptyChannels(nothing), *transforms.transforms, EmptyChannels()])


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
