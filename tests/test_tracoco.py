import math

import pytest
import torch
from training import CLASSES, REGIONS, Echo, bare_trainer, batch_of, terms_of

from nnunet_semiseg.trainers import tracoco
from nnunet_semiseg.trainers.tracoco import TraCoCoTrainer, draw_window, regional_cross_entropy


def of_probability(*ps):
    """Logits (1, 2, 8, 8, 8) whose probability of class 1 differs between the parts of the first axis."""
    p = torch.tensor(ps).repeat_interleave(8 // len(ps)).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    return torch.cat((torch.zeros_like(p), torch.logit(p)), 1)


def two_networks(*args, **settings):
    """The first network says the first half of an image's channels, the second one the others."""
    trainer = bare_trainer(TraCoCoTrainer, *args, network=Echo(2), **settings)
    trainer.auxiliary, trainer.strides = {"second": Echo(2, main=1)}, [2, 8, 8]
    return trainer


def of_both(first, second):
    return torch.cat((of_probability(*first), of_probability(*second)), 1)


def one_voxel(*ps):
    return torch.tensor(ps).view(1, -1, 1, 1, 1)


def test_a_window_is_of_whole_strides():
    """3/4 of 12 voxels by strides of 2 are 9, and so 8; of 6 by 3 they are 4.5, and so 6 (round half to even)."""
    windows = [draw_window([12, 6], [2, 3], 0.75) for _ in range(30)]
    assert {(a.stop - a.start, b.stop - b.start) for a, b in windows} == {(8, 6)}
    assert {a.start for a, _ in windows} == {0, 1, 2, 3, 4} and {b.start for _, b in windows} == {0}
    assert draw_window([8], [8], 0.1) == (slice(0, 8),)


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_networks_learn_each_others_confident_decisions(labels):
    """Of class 1 the first says 0.8, the second 0.9 in one half and 0.6 in the other, which does not count.

    CE of the first: -log 0.8 in that half; of the second: -log 0.9 and -log 0.6, with a weight of 2. Region 0 is surely
    not there, of both.
    """
    unlabeled = of_both((0.8,), (0.9, 0.6))
    target = torch.zeros(1, 2 if labels is REGIONS else 1, 8, 8, 8)
    if labels is REGIONS:
        unlabeled[:, ::2] = -5
    trainer = two_networks(labels, consistency_weight=2.0, match_threshold=0.7, translation_weight=0.0)
    terms = terms_of(trainer, batch_of(of_both((0.25,), (0.1,)), target, strong=unlabeled))
    expected = -math.log(0.8) / 2 - (math.log(0.9) + math.log(0.6)) / 2
    sure = math.log(1 + math.exp(-5))  # of the region that is not there
    expected = (expected + 1.5 * sure) / 2 if labels is REGIONS else expected
    assert terms["cross"].item() == pytest.approx(2 * expected, rel=1e-4)
    assert terms["translation"].item() == 0
    assert trainer.decide.shares.counts.tolist() == [0, 2]
    if labels is CLASSES:
        assert terms["supervised_1"].item() == pytest.approx(-math.log(0.75))
        assert terms["supervised_2"].item() == pytest.approx(-math.log(0.9))


def test_the_second_networks_samples_are_mixed_and_what_it_is_taught(monkeypatch):
    """Two samples, 0.9 and 0.2 for the first network, 0.7 and 0.4 for the second: all halves have the same losses."""
    box = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    box[:, :, :4] = True
    monkeypatch.setattr(tracoco, "draw_mixing_box", lambda x, often: box)
    unlabeled = torch.cat((of_both((0.9,), (0.7,)), of_both((0.2,), (0.4,))))
    trainer, shown = two_networks(match_threshold=0.0), []
    second = trainer.auxiliary["second"]
    trainer.auxiliary["second"] = lambda x: (shown.append(x), second(x))[1]
    terms = terms_of(trainer, batch_of(unlabeled, strong=unlabeled))
    expected = -(math.log(0.9) + math.log(0.8)) / 2 - (math.log(0.7) + math.log(0.6)) / 2
    assert terms["cross"].item() == pytest.approx(expected, rel=1e-4)
    _, whole, crop, mixed = shown
    assert torch.equal(whole, unlabeled) and torch.equal(mixed, torch.where(box, unlabeled.flip(0), unlabeled))
    assert crop.shape[2:] == (6, 8, 8)


def test_regional_cross_entropy_by_hand():
    """Three classes, q = (0.05, 0.8, 0.15): 0.8 CE towards class 1, and 0.05 of what the others' absence costs."""
    p, q = one_voxel(0.3, 0.6, 0.1), one_voxel(0.05, 0.8, 0.15)
    expected = -0.8 * math.log(0.6) - 0.05 * (math.log(0.7) + math.log(0.9)) / 2
    assert regional_cross_entropy(p, q, 0.65).item() == pytest.approx(expected, rel=1e-5)
    # neither sure enough of one class nor of the absence of one
    assert regional_cross_entropy(p, one_voxel(0.2, 0.5, 0.3), 0.65) == 0


def test_the_papers_cross_loss():
    """Two classes, q = 0.9 and 0.75: -0.9 log 0.6 - 0.1 log 0.6 where both count, and -0.75 log 0.6."""
    trainer = two_networks(consistency="paper")
    decision, q = trainer.taught(of_probability(0.95, 0.75))
    loss = trainer.cross_loss(of_probability(0.6), decision, q)
    expected = -math.log(0.6) * ((0.95 + 0.75) / 2 + 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    of_regions = two_networks(REGIONS, consistency="paper")
    say = torch.logit(torch.tensor([0.6, 0.6])).view(1, 2, 1, 1, 1)
    loss = of_regions.cross_loss(say, None, one_voxel(0.95, 0.25))
    assert loss.item() == pytest.approx((-math.log(0.6) - 0.75 * math.log(0.4)) / 2, rel=1e-4)


def test_translation_by_hand():
    """The patch says 0.5, the crop 0.8. KL = log 0.5 - (log 0.8 + log 0.2) / 2; CE is that plus log 2."""
    whole, crop = torch.full((1, 2, 8, 8, 8), 0.5), of_probability(0.8)
    kl = math.log(0.5) - (math.log(0.8) + math.log(0.2)) / 2
    negative_entropy = 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    paper = two_networks(consistency="paper", translation_weight=2.0).translation_loss(crop, whole)
    assert paper.item() == pytest.approx(2 * kl + 0.1 * negative_entropy, rel=1e-4)
    ours = two_networks(translation_weight=2.0).translation_loss(crop, whole)
    assert ours.item() == pytest.approx(2 * (kl + math.log(2)), rel=1e-4)


@pytest.mark.parametrize("memory", ["stock", "fast"])
def test_each_network_learns_and_teaches_without_gradient(memory):
    """Its own CE towards the other's decision, and 0.3 CE towards what it says itself, whose gradient is 0."""
    trainer = two_networks(match_threshold=0.0, memory=memory)
    scales = [torch.ones(1, requires_grad=True) for _ in range(2)]
    trainer.network.decode = lambda skips, i=0: scales[0] * skips[0][:, :2]
    trainer.auxiliary["second"].decode = lambda skips, i=0: scales[1] * skips[0][:, 2:]
    unlabeled = of_both((0.8,), (0.9,))
    groups = trainer.losses(batch_of(0 * unlabeled, strong=unlabeled))
    trainer.scaled = lambda loss: loss
    trainer.backward(groups)
    for scale, p in zip(scales, (0.8, 0.9), strict=True):
        assert scale.grad.item() == pytest.approx(math.log(p / (1 - p)) * (p - 1), rel=1e-3)
