"""Rotate and scale a labelled sample of a batch and its unlabelled partner in the same way."""

from __future__ import annotations

from collections import deque
from typing import Any

from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms


class Recorded(SpatialTransform):
    """A spatial transform that stores its random parameters, so that another sample can be transformed in the same way.

    Args:
        spatial: the `SpatialTransform` of nnU-Net.
        drawn: a queue that receives the random parameters, in the order of the samples.
    """

    def __init__(self, spatial: SpatialTransform, drawn: deque[dict]):
        vars(self).update(vars(spatial))
        self.drawn = drawn

    def get_parameters(self, **data_dict) -> dict:
        drawn: Any = super().get_parameters(**data_dict)
        self.drawn.append(drawn)
        return drawn


class Replayed(Recorded):
    """A spatial transform that takes the parameters that `Recorded` stored. All images must have the same shape."""

    def get_parameters(self, **data_dict) -> dict:
        return self.drawn.popleft()


def share_spatial(labeled_transforms: ComposeTransforms, unlabeled_transforms: ComposeTransforms) -> None:
    """Change two lists of transforms so that both rotate and scale the i-th sample of a batch in the same way.

    The first transforms draw the random numbers, and the second ones use them again. So the labelled batch must be made
    first, as `TwoStreamLoader` does, and the unlabelled one must have as many samples.
    """
    drawn: deque[dict] = deque()
    for compose, kind in ((labeled_transforms, Recorded), (unlabeled_transforms, Replayed)):
        compose.transforms = [kind(t, drawn) if isinstance(t, SpatialTransform) else t for t in compose.transforms]
