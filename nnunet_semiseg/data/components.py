"""Find the classes that are in one piece in each labelled case that has them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from scipy.ndimage import find_objects, generate_binary_structure
from scipy.ndimage import label as label_components

LARGEST = 0.99
"""A class is in one piece if its largest component has at least this share of the voxels of the class."""
AT_MOST = 20
"""The largest number of labelled cases that are read."""


def heads_in_one_piece(dataset, label_manager, planar: bool) -> list[int]:
    """The classes or regions that are in one piece in each labelled case that has them.

    In one piece means: the largest component has at least 99 % of the voxels. A class that no case has is not one of
    them. At most 20 cases are read, at equal distances in the sorted list of names.

    Args:
        dataset: nnU-Net's dataset of the preprocessed labelled cases.
        label_manager: the `LabelManager` of nnU-Net.
        planar: patches are slices, so each slice is looked at separately.
    """
    regions = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    values = [np.atleast_1d(region) for region in regions]
    first = 0 if label_manager.has_regions else 1  # regions have no head for the background
    shares = np.array([
        shares_of(np.asarray(dataset.load_case(c)[1][0]), values, planar) for c in spread_over(dataset.identifiers)
    ])
    seen = ~np.isnan(shares)
    one = seen.any(0) & (np.where(seen, shares, 1) >= LARGEST).all(0)
    return [first + int(i) for i in np.flatnonzero(one)]


def spread_over(cases: Collection[str]) -> list[str]:
    """Choose at most 20 cases, at equal distances in the sorted list of names."""
    return sorted(cases)[:: max(1, -(-len(cases) // AT_MOST))]


def shares_of(segmentation: np.ndarray, values: Iterable[np.ndarray], planar: bool) -> list[float]:
    """For each class or region, the share of its voxels in the largest component. NaN if the case does not have it.

    Args:
        segmentation: (Z, Y, X), whole numbers.
        values: the labels of each class or region.
        planar: find the largest component in each slice along the first axis. The sizes of these components are added.
    """
    return [share_in_one_piece(np.isin(segmentation, labels), planar) for labels in values]


def share_in_one_piece(mask: np.ndarray, planar: bool) -> float:
    """The share of a mask's voxels in its largest component. NaN if the mask is empty.

    Args:
        planar: see `shares_of`.
    """
    box = find_objects(mask.astype(np.uint8))
    if not box:
        return float("nan")
    mask = mask[box[0]]
    pieces = mask if planar else mask[None]
    return sum(largest_size(piece) for piece in pieces) / mask.sum()


def largest_size(mask: np.ndarray) -> int:
    """The number of voxels in the largest component. Voxels are connected by faces, edges and corners."""
    labels: Any = label_components(mask, generate_binary_structure(mask.ndim, mask.ndim))[0]  # pyright: ignore
    return int(np.bincount(labels.ravel())[1:].max(initial=0))
