"""Image channels that are empty, because a case lacks them.

They are handled after nnU-Net's normalisation, which may change their value.
"""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from torch import Tensor

from nnunet_semiseg.data.image_problems import TOLERANCE


def values_of_nothing(plans_manager, configuration_manager) -> list[float]:
    """For each channel, the value of an empty channel after nnU-Net's normalisation. An empty channel is 0 everywhere.

    The value is 0, except for CT: there the normalisation uses the statistics of the dataset instead of those of the
    image.
    """
    nothing = np.zeros((len(configuration_manager.normalization_schemes), 1, 1, 1), np.float32)
    about = plans_manager.foreground_intensity_properties_per_channel
    normalized = DefaultPreprocessor(verbose=False)._normalize(nothing, nothing[:1], configuration_manager, about)
    return normalized.flatten().tolist()


def empty_channels(x: Tensor, nothing: Tensor) -> Tensor:
    """Find the empty channels of images: (B, C), bool.

    A channel is empty if each voxel has the value of an empty channel, or the 0 of padding.

    Args:
        x: the images, (B, C, *S).
        nothing: the value of each empty channel, (C,); see `values_of_nothing`.
    """
    nothing = nothing.to(x).view(-1, *[1] * (x.ndim - 2))
    return (((x - nothing).abs() < TOLERANCE) | (x == 0)).flatten(2).all(2)


def keep_empty(transforms: ComposeTransforms, plans_manager, configuration_manager) -> ComposeTransforms:
    """Change the transforms so that a channel that a case lacks becomes 0 and stays 0.

    With one channel there is nothing to change, because no case lacks it.
    """
    nothing = values_of_nothing(plans_manager, configuration_manager)
    if len(nothing) == 1:
        return transforms
    return ComposeTransforms([RememberEmptyChannels(nothing), *transforms.transforms, EmptyChannels()])


class RememberEmptyChannels(BasicTransform):
    """The first transform: it notes which channels of the image (C, *S) are empty."""

    def __init__(self, nothing: list[float]):
        super().__init__()
        self.nothing = torch.tensor(nothing)

    def apply(self, data_dict: dict, **params) -> dict:
        return data_dict | {"empty_channels": empty_channels(data_dict["image"][None], self.nothing)[0]}


class EmptyChannels(BasicTransform):
    """The last transform: it sets empty channels to 0, because noise and brightness may have changed them."""

    def apply(self, data_dict: dict, **params) -> dict:
        data_dict["image"][data_dict["empty_channels"]] = 0
        return data_dict
