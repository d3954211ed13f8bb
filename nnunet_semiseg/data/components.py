"""Which classes are in one piece in every labelled case."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from scipy.ndimage import find_objects, generate_binary_structure
from scipy.ndimage import label as label_components

LARGEST = 0.99
"""share of a class's voxels that its largest component has, where it counts as in one piece"""
AT_MOST = 20
"""labelled cases that are looked at"""


def heads_in_one_piece(dataset, label_manager, planar: bool) -> list[int]:
    """The classes or regions of which each labelled case that has them has one component (99 % of the voxels).

    A class that no case has is not among them. At most 20 cases are read, spread evenly over the sorted names.

    Args:
        dataset: nnU-Net's, of preprocessed labelled cases.
        label_manager: nnU-Net's.
        planar: patches are slices, so each slice is looked at.
    """
    regions = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    values = [np.atleast_1d(region) for region in regions]
    first = 0 if label_manager.has_regions else 1  # there is no head for the background of regions
    shares = np.array([
        shares_of(np.asarray(dataset.load_case(c)[1][0]), values, planar) for c in spread_over(dataset.identifiers)
    ])
    seen = ~np.isnan(shares)
    one = seen.any(0) & (np.where(seen, shares, 1) >= LARGEST).all(0)
    return [first + int(i) for i in np.flatnonzero(one)]


def spread_over(cases: Collection[str]) -> list[str]:
    """At most 20 of the cases, spread evenly over their sorted names."""
    return sorted(cases)[:: max(1, -(-len(cases) // AT_MOST))]


def shares_of(segmentation: np.ndarray, values: Iterable[np.ndarray], planar: bool) -> list[float]:
    """For each class or region the share of its voxels in the largest component; NaN where the case lacks it.

    Args:
        segmentation: (Z, Y, X), whole numbers.
        values: the labels of each class or region.
        planar: take the largest component of each slice along the first axis, and all their voxels.
    """
    return [share_in_one_piece(np.isin(segmentation, labels), planar) for labels in values]


def share_in_one_piece(mask: np.ndarray, planar: bool) -> float:
    """The share of a mask's voxels in its largest component, or in those of its slices; NaN for an empty mask."""
    box = find_objects(mask.astype(np.uint8))
    if not box:
        return float("nan")
    mask = mask[box[0]]
    pieces = mask if planar else mask[None]
    return sum(largest_size(piece) for piece in pieces) / mask.sum()


def largest_size(mask: np.ndarray) -> int:
    """The number of voxels of the largest component; voxels touch by faces, edges and corners."""
    labels: Any = label_components(mask, generate_binary_structure(mask.ndim, mask.ndim))[0]  # pyright: ignore
    return int(np.bincount(labels.ravel())[1:].max(initial=0))
