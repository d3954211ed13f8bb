"""The largest component of a class, and the rule that says of which classes it is kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.measure import label as label_components
from training import CLASSES, REGIONS

from nnunet_semiseg.data.components import heads_in_one_piece, share_in_one_piece
from nnunet_semiseg.losses.components import keep_largest_components, largest_component

LABEL = torch.tensor([
    [1, 1, 0, 2, 2],
    [0, 0, 0, 0, 2],
    [1, 0, 2, 0, 0],
])


def test_the_largest_of_each_class_that_is_named():
    label = LABEL[None, None].short()
    both = keep_largest_components(label, [1, 2], False)[0, 0]
    assert both.tolist() == [[1, 1, 0, 2, 2], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0]] and both.dtype == torch.int16
    second = keep_largest_components(label, [2], False)[0, 0]
    assert second.tolist() == [[1, 1, 0, 2, 2], [0, 0, 0, 0, 2], [1, 0, 0, 0, 0]]
    assert keep_largest_components(label, [], False) is label


def test_the_largest_of_each_region_and_not_of_the_ignored():
    regions = torch.stack((LABEL > 0, LABEL == 2, LABEL == 1))[None]  # the last channel is the ignore label's
    kept = keep_largest_components(regions, [1], True)
    assert kept[0, 1].int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert torch.equal(kept[0, [0, 2]], regions[0, [0, 2]])


def snake(n: int) -> torch.Tensor:
    """One component in n x n pixels that is as long as can be."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


@pytest.mark.parametrize("side", [1, 2])
def test_a_snake_is_followed_to_its_end(side):
    masks = torch.stack((snake(65), snake(65).flip(side - 1)))
    assert torch.equal(largest_component(masks), masks)
    masks[:, 32, 20] = False  # cut in two: the longer part is left
    for mask, kept in zip(masks, largest_component(masks), strict=True):
        assert torch.equal(kept, torch.from_numpy(largest_by_skimage(mask.numpy())))


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 12, 16, 14)])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3, 0.45])
def test_noise_as_skimage_has_it(shape, share):
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    for mask, kept in zip(masks, largest_component(masks), strict=True):
        assert kept.sum() == largest_by_skimage(mask.numpy()).sum()  # of equal ones either may be kept
        assert not (kept & ~mask).any() and label_components(kept.numpy()).max() == 1


def test_nothing_is_left_of_nothing():
    masks = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    masks[1, 0, 0, 0] = True
    assert torch.equal(largest_component(masks), masks)


def largest_by_skimage(mask: np.ndarray) -> np.ndarray:
    labels = label_components(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def case_of(*boxes) -> np.ndarray:
    """(1, 4, 10, 10) with boxes (value, slices along the three axes)."""
    segmentation = np.zeros((1, 4, 10, 10), np.int8)
    for value, *place in boxes:
        segmentation[(0, *place)] = value
    return segmentation


ALL, FEW = slice(None), slice(0, 2)


def dataset_of(*segmentations):
    cases = {f"case_{i}": s for i, s in enumerate(segmentations)}
    return SimpleNamespace(identifiers=list(cases), load_case=lambda case: (None, cases[case], None, {}))


def test_the_share_of_the_largest_component():
    mask = case_of((1, ALL, ALL, FEW), (1, FEW, slice(3, 5), slice(6, 8)))[0] > 0
    assert share_in_one_piece(mask, planar=False) == 80 / 88
    assert share_in_one_piece(mask, planar=True) == 80 / 88
    assert np.isnan(share_in_one_piece(mask & False, planar=False))
    bridge = case_of((1, ALL, FEW, FEW), (1, ALL, FEW, slice(5, 7)), (1, 0, FEW, slice(2, 5)))[0] > 0
    assert (
        share_in_one_piece(bridge, planar=False) == 1
    )  # it holds together in one slice of four: 14 of 14 pixels there
    assert share_in_one_piece(bridge, planar=True) == (14 + 3 * 4) / (14 + 3 * 8)


def test_a_class_counts_where_every_case_that_has_it_has_it_in_one_piece():
    manager = SimpleNamespace(has_regions=False, foreground_labels=[1, 2, 3])
    one = case_of((1, ALL, FEW, FEW), (2, 0, 5, 5))
    two = case_of((1, ALL, FEW, FEW), (2, 0, 5, 5), (2, 3, 9, 9))
    assert heads_in_one_piece(dataset_of(one), manager, planar=False) == [1, 2]  # no case has class 3
    assert heads_in_one_piece(dataset_of(one, two), manager, planar=False) == [1]


def test_one_voxel_in_a_hundred_may_lie_elsewhere():
    mostly = case_of((1, ALL, ALL, slice(0, 5)), (1, 0, 0, 8), (1, 0, 0, 9))
    assert heads_in_one_piece(dataset_of(mostly), CLASSES, planar=False) == [1]  # 200 of 202
    mostly[0, 0, 0, 7] = 0
    mostly[0, 3, 9, 9] = 1
    assert heads_in_one_piece(dataset_of(mostly), CLASSES, planar=False) == []  # 200 of 203


def test_regions_are_joined_before_they_are_looked_at():
    """`both` is one piece of both labels; `b`, of label 2 alone, is in two."""
    case = case_of((1, ALL, ALL, ALL), (2, 0, 0, 0), (2, 3, 9, 9))
    assert heads_in_one_piece(dataset_of(case), REGIONS, planar=False) == [0]


def test_of_many_cases_twenty_are_read():
    read = []
    case = case_of((1, 0, 0, 0))
    names = [f"{i:03d}" for i in range(45)]
    dataset = SimpleNamespace(identifiers=names, load_case=lambda c: (read.append(c), (None, case, None, {}))[1])
    assert heads_in_one_piece(dataset, CLASSES, planar=False) == [1]
    assert read == names[::3]
