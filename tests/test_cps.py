import math

import pytest
import torch
from training import REGIONS, Echo, bare_trainer, batch_of, make_trainer, nnunet_loss, terms_of

from nnunet_semiseg.trainers.cps import CPSTrainer


def of_probability(p, heads=2):
    logits = torch.zeros(1, heads, 8, 8, 8)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def two_networks(*args, **settings):
    """A trainer whose first network says the first half of an image's channels, the second one the others."""
    trainer = bare_trainer(CPSTrainer, *args, network=Echo(2), **settings)
    trainer.auxiliary = {"second": Echo(2, main=1)}
    return trainer


def of_both(*ps):
    """Images of which the networks say these probabilities."""
    return torch.cat([of_probability(p) for p in ps], 1)


@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_each_network_learns_the_others_decision(consistency):
    """Network 1 says class 1 with 0.8, network 2 with 0.4, so decides for 0: CE -log 0.2 of one, -log 0.4 of two.

    Of the labels 0 Dice is 0, of the labels 1 it is 2 * 0.4 / 1.4.
    """
    images = of_both(0.8, 0.4)
    trainer = two_networks(consistency=consistency, consistency_weight=0.2)
    trainer.loss = nnunet_loss(False)
    loss = terms_of(trainer, batch_of(images, strong=images))["cps"]
    dice = 2 * 0.4 / 1.4 if consistency == "dice_ce" else 0
    assert loss.item() == pytest.approx(0.2 * (-(math.log(0.2) + math.log(0.4)) - dice), abs=1e-4)


def test_both_streams_count_by_a_ramp():
    """Labelled as above; elsewhere network 1 says class 1 with 0.9, network 2 with 0.3; the ramp at 0.2."""
    trainer = two_networks(progress=0.2, consistency_weight=0.2, ramp_length=1.0)
    labeled, unlabeled = (of_both(*ps).repeat(2, 1, 1, 1, 1) for ps in ((0.8, 0.4), (0.9, 0.3)))
    loss = terms_of(trainer, batch_of(labeled, strong=unlabeled))["cps"]
    both = -(math.log(0.2) + math.log(0.4)) - (math.log(0.1) + math.log(0.3))
    assert loss.item() == pytest.approx(0.2 * math.exp(-5 * 0.8**2) * both / 2)


def test_regions_one_by_one():
    """Region 0: both say 1/2, which is no; region 1 as above."""
    images = of_both(0.8, 0.4)
    batch = batch_of(images, torch.zeros(1, 2, 8, 8, 8), strong=images)
    loss = terms_of(two_networks(REGIONS, consistency_weight=0.2), batch)["cps"]
    region_0, region_1 = -2 * math.log(0.5), -(math.log(0.2) + math.log(0.4))
    assert loss.item() == pytest.approx(0.2 * (region_0 + region_1) / 2)


def test_two_networks_of_their_own(ready):
    trainer = make_trainer(CPSTrainer, ready(dims=2, size=32))
    trainer.on_train_start()
    first, second = trainer.network, trainer.auxiliary["second"]
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert first.state_dict().keys() == second.state_dict().keys()
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)
    before = [p.clone() for p in second.parameters()]
    first.train()
    trainer.train_step(next(trainer.dataloader_train))
    moved = [not torch.equal(p, old) for p, old in zip(second.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_both_networks_run_in_bfloat16(ready):
    trainer = make_trainer(CPSTrainer, ready(dims=2, size=32), bfloat16_on_cpu=True)
    trainer.initialize()
    first, second = trainer.network.eval(), trainer.auxiliary["second"].eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        for a, b in zip(first(x), second(x), strict=True):
            assert torch.equal(a, b)  # both rounded


def test_the_mean_is_over_samples():
    """One labelled sample and three others: the first counts a quarter."""
    labeled, unlabeled = of_both(0.8, 0.4), of_both(0.9, 0.3).repeat(3, 1, 1, 1, 1)
    loss = terms_of(two_networks(consistency_weight=0.2), batch_of(labeled, strong=unlabeled))["cps"]
    expected = -(math.log(0.2) + math.log(0.4)) / 4 - 3 * (math.log(0.1) + math.log(0.3)) / 4
    assert loss.item() == pytest.approx(0.2 * expected)


def test_both_networks_learn_from_labels():
    """The labels are class 1, of which the networks say 0.8 and 0.4; what they say elsewhere does not matter."""
    batch = batch_of(of_both(0.8, 0.4), torch.ones(1, 1, 8, 8, 8), strong=of_both(0.1, 0.9))
    terms = terms_of(two_networks(), batch)
    assert terms["supervised_1"].item() == pytest.approx(-math.log(0.8))
    assert terms["supervised_2"].item() == pytest.approx(-math.log(0.4))
    assert set(terms) == {"supervised_1", "supervised_2", "cps"}
    settings = CPSTrainer.settings_class
    assert settings().weight(0.4) == 1 and settings(consistency="paper").weight(1) == 0.1


def test_a_network_learns_its_own_losses_and_gives_the_other_labels():
    """Each gets the gradient of its own two cross-entropies; towards the labels of the other there is none."""
    images = of_both(0.8, 0.4)
    trainer = two_networks(consistency_weight=0.2)
    scales = [torch.ones(1, requires_grad=True) for _ in range(2)]
    trainer.network.decode = lambda skips, i=0: scales[0] * skips[0][:, :2]
    trainer.auxiliary["second"].decode = lambda skips, i=0: scales[1] * skips[0][:, 2:]
    trainer.backward(trainer.losses(batch_of(images, torch.ones(1, 1, 8, 8, 8), strong=images)))
    for scale, p, others in zip(scales, (0.8, 0.4), (0, 1), strict=True):
        # d CE / d scale = logit (p - label), for the label 1 and for the other's decision
        expected = math.log(p / (1 - p)) * ((p - 1) + 0.2 * (p - others))
        assert scale.grad.item() == pytest.approx(expected, rel=1e-4)
