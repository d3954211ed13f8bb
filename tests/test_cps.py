import math

import pytest
import torch
from training import REGIONS, bare_trainer, make_trainer

from nnunet_semiseg.trainers.cps import CPSTrainer


def of_probability(p, heads=2):
    logits = torch.zeros(1, heads, 8, 8, 8)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def test_each_network_learns_the_others_decision():
    """Network 1 says class 1 with 0.8, network 2 with 0.4, so decides for 0: CE -log 0.2 of one, -log 0.4 of two."""
    trainer = bare_trainer(CPSTrainer, cps_weight=0.2)
    first, second = of_probability(0.8), of_probability(0.4)
    loss = trainer.semi_losses((first, second), (first, second), {})["cps"]
    assert loss.item() == pytest.approx(0.2 * -(math.log(0.2) + math.log(0.4)))


def test_both_streams_count_by_a_ramp():
    """Labelled as above; elsewhere network 1 says class 1 with 0.9, network 2 with 0.3; the ramp at 0.2."""
    trainer = bare_trainer(CPSTrainer, progress=0.2, cps_weight=0.2)
    labeled, unlabeled = ([of_probability(p).repeat(2, 1, 1, 1, 1) for p in ps] for ps in ((0.8, 0.4), (0.9, 0.3)))
    loss = trainer.semi_losses(labeled, unlabeled, {})["cps"]
    both = -(math.log(0.2) + math.log(0.4)) - (math.log(0.1) + math.log(0.3))
    assert loss.item() == pytest.approx(0.2 * math.exp(-5 * 0.8**2) * both / 2)


def test_regions_one_by_one():
    """Region 0: both say 1/2, which is no; region 1 as above."""
    trainer = bare_trainer(CPSTrainer, REGIONS, cps_weight=0.2)
    first, second = of_probability(0.8), of_probability(0.4)
    loss = trainer.semi_losses((first, second), (first, second), {})["cps"]
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


def test_both_networks_learn_from_labels():
    trainer = bare_trainer(CPSTrainer)
    trainer.loss = lambda output, target: (output, target)
    terms = trainer.supervised_losses(("one", "two"), {"target": "label"})
    assert terms == {"supervised_1": ("one", "label"), "supervised_2": ("two", "label")}
    assert CPSTrainer.settings_class().cps_weight == 0.1
