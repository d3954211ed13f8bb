import math

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import CLASSES, REGIONS, Echo, bare_trainer, batch_of, terms_of

from nnunet_semiseg.trainers.mcf import MCFTrainer


def of_probability(*ps):
    """Logits (1, 2, 8, 8, 8) whose probability of class 1 differs between the parts of the first axis."""
    p = torch.tensor(ps).repeat_interleave(8 // len(ps)).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    return torch.cat((torch.zeros_like(p), torch.logit(p)), 1)


def two_networks(label_manager=CLASSES, second_is_better=False, **settings):
    """The first network says the first half of an image's channels, the second one the others."""
    trainer = bare_trainer(MCFTrainer, label_manager, network=Echo(2), **settings)
    trainer.auxiliary = {"second": Echo(2, main=1)}
    trainer.method_state = {"second_is_better": torch.tensor(second_is_better)}
    return trainer


def of_both(first, second):
    return torch.cat((of_probability(*first), of_probability(*second)), 1)


def test_networks_review_what_they_differ_on():
    """Labelled background. Of half of the voxels the first says 0.6, which is wrong, the second 0.2; else 0.1 both.

    By nnU-Net's loss -log 0.4 and -log 0.8, with the weight 0.5; the paper's is (0.6^2 + 0.2^2) / 2 of each, as both
    classes are wrong by as much: 0.6^2 and 0.2^2.
    """
    images = of_both((0.6, 0.1), (0.2, 0.1))
    terms = terms_of(two_networks(), batch_of(images, strong=images))
    assert terms["supervised_1"].item() == pytest.approx(-(math.log(0.4) + math.log(0.9)) / 2)
    assert terms["supervised_2"].item() == pytest.approx(-(math.log(0.8) + math.log(0.9)) / 2)
    assert terms["review"].item() == pytest.approx(0.5 * -(math.log(0.4) + math.log(0.8)), rel=1e-4)
    paper = terms_of(two_networks(consistency="paper", review_weight=2.0), batch_of(images, strong=images))
    assert paper["review"].item() == pytest.approx(2 * (0.6**2 + 0.2**2), rel=1e-4)


def test_where_they_agree_there_is_nothing_to_review():
    images = of_both((0.6, 0.1), (0.9, 0.2))
    for consistency in ("dice_ce", "paper"):
        assert terms_of(two_networks(consistency=consistency), batch_of(images, strong=images))["review"] == 0


def test_what_is_ignored_is_not_reviewed():
    """Networks differ everywhere; half of the voxels, of which one says 0.99, are ignored."""
    target = torch.zeros(1, 1, 8, 8, 8)
    target[:, :, :4] = 2
    labels = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    everywhere = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    for consistency, expected in (("dice_ce", -math.log(0.4)), ("paper", 0.6**2)):
        review = two_networks(labels, consistency=consistency).review
        assert review(everywhere, of_probability(0.99, 0.6), target).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("second_is_better", [False, True])
@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_the_worse_network_learns_from_the_better_one(second_is_better, labels):
    """Unlabelled: P(1) of 0.8 and 0.4. The first decides for 1, the second for 0; region 0 is 1/2 of both, which is no.

    With T = 0.5, 0.8 becomes 0.64 / 0.68 and 0.4 becomes 0.16 / 0.52. The ramp is at its end, the weight 2.
    """
    unlabeled = of_both((0.8,), (0.4,))
    target = torch.zeros(1, 2 if labels is REGIONS else 1, 8, 8, 8)
    settings = dict(consistency_weight=2.0, sharpening=0.5)
    batch = batch_of(of_both((0.1,), (0.1,)), target, strong=unlabeled)
    loss = -math.log(0.2) if second_is_better else -math.log(0.4)
    squared = (0.8 - 0.16 / 0.52) ** 2 if second_is_better else (0.4 - 0.64 / 0.68) ** 2
    if labels is REGIONS:
        loss, squared = (loss + math.log(2)) / 2, squared / 2
    for consistency, expected in (("dice_ce", loss), ("paper", squared)):
        trainer = two_networks(labels, second_is_better, consistency=consistency, **settings)
        assert terms_of(trainer, batch)["rectification"].item() == pytest.approx(2 * expected, rel=1e-4)
        assert trainer.decide.shares.counts.tolist() == [0, 1]  # of unlabelled samples alone


@pytest.mark.parametrize("better", [0, 1])
def test_the_lower_supervised_loss_labels_the_next_step(better):
    images = of_both((0.1,), (0.2,)) if better == 0 else of_both((0.2,), (0.1,))
    trainer = two_networks(second_is_better=not better)
    terms_of(trainer, batch_of(images, strong=images))
    assert bool(trainer.method_state["second_is_better"]) == bool(better)
