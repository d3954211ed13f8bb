"""nnU-Net's loss towards pseudo-labels, with its deep supervision, and over a part of the image."""

import math

import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import CLASSES, nnunet_loss

from nnunet_semiseg.losses.deep_supervision import finest_of, loss_where, mixed_loss, pseudo_loss
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


LEFT = torch.tensor([[True, False], [True, False]]).view(1, 1, 2, 2)
ONES = torch.ones(1, 1, 2, 2)


def test_a_mix_has_one_loss_in_which_pseudo_labels_count_by_their_weight():
    """The network says class 1 with 0.8; so do the labels on the left; the pseudo-labels on the right say class 0."""
    output, background = certain(0.8, 2), 0 * ONES.short()
    loss = mixed_loss(CE, output, ONES, background, LEFT, 0.5, CLASSES)
    assert loss.item() == pytest.approx((-2 * math.log(0.8) - 2 * 0.5 * math.log(0.2)) / 4)
    weight = torch.tensor([[9.0, 0.5], [9.0, 1.5]]).view(1, 1, 2, 2)  # where there is a label it says nothing
    loss = mixed_loss(CE, output, ONES, background, LEFT, weight, CLASSES)
    assert loss.item() == pytest.approx((-2 * math.log(0.8) - 2 * math.log(0.2)) / 4)
    dice = nnunet_loss(False, weight_ce=0)  # overlap 2 * 0.8, prediction 2 * 0.8 + 0.5 * 2 * 0.8, label 2
    loss = mixed_loss(dice, output, ONES, background, LEFT, 0.5, CLASSES)
    assert loss.item() == pytest.approx(-2 * 1.6 / (2.4 + 2), rel=1e-4)


def test_a_mix_on_every_grid_and_without_what_is_ignored():
    output, background = [certain(0.8, 2), certain(0.5, 1)], 0 * ONES.short()
    loss = mixed_loss(DEEP, output, [ONES, ONES[..., :1, :1]], background, LEFT | True, 0.5, CLASSES)
    assert loss.item() == pytest.approx(-0.75 * math.log(0.8) - 0.25 * math.log(0.5))
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    target = torch.tensor([[1, 2], [2, 2]]).view(1, 1, 2, 2)
    loss = mixed_loss(CE, output[0], target, background, LEFT, 0.5, manager)
    assert loss.item() == pytest.approx((-math.log(0.8) - 2 * 0.5 * math.log(0.2)) / 4)
