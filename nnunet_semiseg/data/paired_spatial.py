"""The same rotation and scaling for a labelled sample of a batch and its unlabelled partner."""

from __future__ import annotations

from collections import deque
from typing import Any

from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms


class Recorded(SpatialTransform):
    """A spatial transform that keeps what it drew, for the same transform of another sample.

    Args:
        spatial: nnU-Net's.
        drawn: the draws, in the order of the samples.
    """

    def __init__(self, spatial: SpatialTransform, drawn: deque[dict]):
        vars(self).update(vars(spatial))
        self.drawn = drawn

    def get_parameters(self, **data_dict) -> dict:
        drawn: Any = super().get_parameters(**data_dict)
        self.drawn.append(drawn)
        return drawn


class Replayed(Recorded):
    """The same transform, which takes the draws in place of its own. Images must have the same shape."""

    def get_parameters(self, **data_dict) -> dict:
        return self.drawn.popleft()


def share_spatial(labeled_transforms: ComposeTransforms, unlabeled_transforms: ComposeTransforms) -> None:
    """Let the second transforms, in place, rotate and scale the i-th sample of a batch as the first did theirs.

    A batch of labelled samples must be made before the unlabelled one, of as many, as `TwoStreamLoader` does.
    """
    drawn: deque[dict] = deque()
    for compose, kind in ((labeled_transforms, Recorded), (unlabeled_transforms, Replayed)):
        compose.transforms = [kind(t, drawn) if isinstance(t, SpatialTransform) else t for t in compose.transforms]
