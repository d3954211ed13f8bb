import math

import pytest
import torch
from training import CLASSES, REGIONS, bare_trainer, batch_of, nnunet_loss, terms_of

from nnunet_semiseg.trainers.fixmatch import FixMatchTrainer


@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_only_certain_voxels_teach(labels, consistency):
    """The weak view says class 1 with 0.96 in one slice of eight, else with 0.9; the strong one says 0.75."""
    weak, strong = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
    weak[:, 1], strong[:, 1] = math.log(0.9 / 0.1), math.log(0.75 / 0.25)
    weak[:, 1, 0] = math.log(0.96 / 0.04)
    regions = labels is REGIONS
    if regions:  # the other region must be certain, too: it is not there
        weak[:, 0] = -10

    trainer = bare_trainer(FixMatchTrainer, labels, match_weight=3.0, consistency=consistency)
    target = torch.zeros(1, 2 if regions else 1, 8, 8, 8)
    loss = terms_of(trainer, batch_of(torch.zeros(1, 2, 8, 8, 8), target, weak=weak, strong=strong))["unsupervised"]
    one = -math.log(0.75)
    expected = (one - math.log(0.5)) / 2 if regions else one  # region 0: strong says 1/2
    assert loss.item() == pytest.approx(3 * expected / 8)


def test_the_strong_view_learns_from_the_weak_one():
    """The network gives its images back. The weak view says class 1, with 0.951 in one of eight slices, else 0.949.

    The strong view says 0.75, the labelled samples 1/2. The weight is 1.
    """
    labeled, weak, strong = torch.zeros(3, 2, 2, 8, 8, 8)
    weak[:, 1], strong[:, 1] = math.log(0.949 / 0.051), math.log(0.75 / 0.25)
    weak[:, 1, 0] = math.log(0.951 / 0.049)

    for view in (weak, strong):
        view.requires_grad_()
    terms = terms_of(bare_trainer(FixMatchTrainer), batch_of(labeled, weak=weak, strong=strong))
    assert terms["supervised"].item() == pytest.approx(math.log(2))
    assert terms["unsupervised"].item() == pytest.approx(-math.log(0.75) / 8)
    terms["unsupervised"].backward()
    assert strong.grad.any() and weak.grad is None  # a pseudo-label is a label


def test_dice_is_over_the_certain_voxels():
    """One slice of eight is certain; of the other ones the strong view says what it likes. Dice: 2 * 0.75 / 1.75."""
    weak, strong = torch.zeros(2, 1, 2, 8, 8, 8)
    weak[:, 1, 0], strong[:, 1, 0], strong[:, 1, 1:] = math.log(0.96 / 0.04), math.log(0.75 / 0.25), 5
    for consistency, dice in (("dice_ce", 2 * 0.75 / 1.75), ("paper", 0)):
        trainer = bare_trainer(FixMatchTrainer, consistency=consistency)
        trainer.loss = nnunet_loss(False)
        loss = terms_of(trainer, batch_of(torch.zeros_like(weak), weak=weak, strong=strong))["unsupervised"]
        assert loss.item() == pytest.approx(-math.log(0.75) / 8 - dice, abs=1e-4)


def test_the_students_view_is_turned_with_its_pseudo_label():
    """The weak view says class 1 of one slice and 0 of the others, the strong one the same, with 0.75."""
    weak, strong = torch.zeros(2, 1, 2, 8, 8, 8)
    weak[:, 1], strong[:, 1] = -5, -math.log(0.75 / 0.25)
    weak[:, 1, 0], strong[:, 1, 0] = 5, math.log(0.75 / 0.25)
    trainer, seen = bare_trainer(FixMatchTrainer, network=lambda x: (seen.append(x), x)[1]), []
    trainer.draw_turn = lambda: lambda x: x.flip(2)
    loss = terms_of(trainer, batch_of(torch.zeros_like(weak), weak=weak, strong=strong))["unsupervised"]
    assert loss.item() == pytest.approx(-math.log(0.75))
    assert any(torch.equal(x, strong.flip(2)) for x in seen)
