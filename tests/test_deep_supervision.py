"""nnU-Net's loss towards pseudo-labels, with its deep supervision, and over a part of the image."""

import math

import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import CLASSES, nnunet_loss

from nnunet_semiseg.losses.deep_supervision import finest_of, loss_where, pseudo_loss
from nnunet_semiseg.losses.segmentation import on_grid

CE = nnunet_loss(False, weight_dice=0)
DEEP = DeepSupervisionWrapper(CE, (0.75, 0.25))


def certain(p: float, size: int) -> torch.Tensor:
    """Logits (1, 2, size, size) whose probability of class 1 is p everywhere."""
    logits = torch.zeros(1, 2, size, size)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def test_the_finest_loss():
    assert finest_of(DEEP) is CE and finest_of(CE) is CE


def test_a_label_on_a_coarser_grid_is_the_nearest():
    label = torch.arange(16).view(1, 1, 4, 4).short()
    assert on_grid(label, torch.zeros(1, 2, 2, 2)).tolist() == [[[[5, 7], [13, 15]]]]
    assert on_grid(label, torch.zeros(1, 2, 4, 4)) is label


def test_every_output_learns_from_the_pseudo_label_with_its_weight():
    """The fine output is right with 0.8, the coarse one with 0.5."""
    output, target = [certain(0.8, 4), certain(0.5, 2)], torch.ones(1, 1, 4, 4).short()
    assert pseudo_loss(DEEP, output, target).item() == pytest.approx(-0.75 * math.log(0.8) - 0.25 * math.log(0.5))
    assert pseudo_loss(CE, output[0], target).item() == pytest.approx(-math.log(0.8))


def test_voxels_count_by_their_weight_at_every_scale():
    output, target = [certain(0.8, 4), certain(0.5, 2)], torch.ones(1, 1, 4, 4).short()
    weight = torch.zeros(1, 1, 4, 4)
    weight[..., :2, :] = 1  # the upper half of both grids: a mean over all voxels is half as large
    whole = -0.75 * math.log(0.8) - 0.25 * math.log(0.5)
    assert pseudo_loss(DEEP, output, target, weight).item() == pytest.approx(whole / 2)


def test_the_loss_over_a_part_is_the_mean_over_it():
    """The target is class 1 in the left half, where the mask is, and class 0 elsewhere, which does not count."""
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2] = 1
    mask = target.bool()
    output = [certain(0.8, 4), certain(0.5, 2)]
    expected = -0.75 * math.log(0.8) - 0.25 * math.log(0.5)
    assert loss_where(DEEP, output, target.short(), mask, CLASSES).item() == pytest.approx(expected)
    targets = [target, target[..., ::2, ::2]]
    assert loss_where(DEEP, output, targets, mask, CLASSES).item() == pytest.approx(expected)
    assert loss_where(CE, output[0], target, mask, CLASSES).item() == pytest.approx(-math.log(0.8))
    assert loss_where(CE, output[0], target, ~mask, CLASSES).item() == pytest.approx(-math.log(0.2))
    assert loss_where(CE, output[0], target, mask & False, CLASSES).item() == 0


def test_what_is_ignored_does_not_count():
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    target = torch.tensor([1, 1, 2, 0]).view(1, 1, 2, 2)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 2, 2)
    assert loss_where(CE, certain(0.8, 2), target, mask, manager).item() == pytest.approx(-math.log(0.8))
