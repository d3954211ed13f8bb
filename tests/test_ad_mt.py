import math

import pytest
import torch
from training import CLASSES, REGIONS, bare_trainer, batch_of, make_trainer, nnunet_loss, terms_of

from nnunet_semiseg.trainers.ad_mt import ADMTTrainer, combine


def of_probability(*ps):
    """Logits (1, 2, 8, 8, 8) whose probability of class 1 differs between the parts of the first axis."""
    p = torch.tensor(ps).repeat_interleave(8 // len(ps)).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    return torch.cat((torch.zeros_like(p), torch.logit(p)), 1)


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def two_teachers(first, second, *args, **settings):
    trainer = bare_trainer(ADMTTrainer, *args, teacher=lambda x: first, **settings)
    trainer.auxiliary = {"other_teacher": lambda x: second}
    return trainer


@pytest.mark.parametrize("regions", [False, True])
def test_teachers_count_by_their_certainty(regions):
    """0.9 and 0.4, with the entropies 0.325 and 0.673: weights 0.723 and 0.510."""
    weights = [math.exp(-entropy(p)) for p in (0.9, 0.4)]
    expected = (weights[0] * 0.9 + weights[1] * 0.4) / sum(weights)
    ps = [torch.tensor([p if regions else 1 - p, p]).view(1, 2, 1, 1, 1) for p in (0.9, 0.4)]
    assert combine(ps, regions)[0, 1].item() == pytest.approx(expected)


@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_the_losses_by_hand(consistency):
    """In the first half both say class 1, in the other 0.9 and 0.4, so that their mean decides for class 1.

    There a voxel counts 1 - H / log 2 of that mean. The student says 0.8.
    """
    settings = dict(consistency=consistency, consistency_weight=3.0)
    trainer = two_teachers(of_probability(0.9, 0.9), of_probability(0.8, 0.4), **settings)
    images = of_probability(0.25)
    terms = terms_of(trainer, batch_of(images, weak=images, strong=of_probability(0.8)))
    weights = [math.exp(-entropy(p)) for p in (0.9, 0.4)]
    mean = (weights[0] * 0.9 + weights[1] * 0.4) / sum(weights)
    weight = 1 - entropy(mean) / math.log(2)
    assert terms["supervised"].item() == pytest.approx(-math.log(0.75))
    assert terms["consistency"].item() == pytest.approx(3 * -math.log(0.8) * (1 + weight) / 2, rel=1e-4)


def test_regions_differ_where_one_does():
    """Region 0 is 0.9 for both; region 1 is 0.8 and 0.3, in a mean of about 0.56, the least certain one."""
    logits = [torch.logit(torch.tensor([0.9, p])).view(1, 2, 1, 1, 1).expand(1, 2, 8, 8, 8) for p in (0.8, 0.3)]
    decision, weight = two_teachers(*logits, REGIONS).ask_teachers(logits[0])
    weights = [math.exp(-entropy(p)) for p in (0.8, 0.3)]
    mean = (weights[0] * 0.8 + weights[1] * 0.3) / sum(weights)
    assert decision.all() and weight.unique().tolist() == pytest.approx([1 - entropy(mean) / math.log(2)], rel=1e-4)


def test_deep_supervision_or_the_papers_loss():
    trainer = two_teachers(of_probability(0.9), of_probability(0.9), CLASSES, consistency="paper")
    trainer.loss = nnunet_loss(False)
    logits, ones = of_probability(0.8), torch.ones(1, 1, 8, 8, 8)
    loss = trainer.taught_loss([logits, None], ones, ones)
    assert loss.item() == pytest.approx(-math.log(0.8) - 2 * 0.8 / 1.8, abs=1e-4)


def test_teachers_follow_in_turns(ready):
    trainer = make_trainer(ADMTTrainer, ready(dims=2, size=32), period=2)
    trainer.on_train_start()
    trainer.network.train()
    teachers = trainer.teacher, trainer.auxiliary["other_teacher"]

    def moved(of):
        return [not torch.equal(a, b) for a, b in zip((next(t.parameters()) for t in teachers), of, strict=True)]

    turns = []
    for _ in range(5):
        before = [next(t.parameters()).clone() for t in teachers]
        trainer.train_step(next(trainer.dataloader_train))
        turns.append(moved(before).index(True))
        assert sum(moved(before)) == 1
    assert turns == [0, 0, 1, 1, 0]
    assert not any(p.requires_grad for p in teachers[1].parameters()) and not teachers[1].training


def test_the_other_teacher_begins_as_the_network(ready):
    trainer = make_trainer(ADMTTrainer, ready(dims=2, size=32))
    trainer.initialize()
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.fill_(0.5)  # as -pretrained_weights does
    trainer.on_train_start()
    assert all((p == 0.5).all() for p in trainer.auxiliary["other_teacher"].parameters())
