import math

import pytest
import torch
from training import CLASSES, REGIONS, Echo, bare_trainer, batch_of, terms_of

from nnunet_semiseg.trainers.tracoco import TraCoCoTrainer, draw_windows, slices_of


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


def test_windows_overlap():
    """Of 12 voxels by strides of 2: a shift of 4, so that each crop has 8, of which both have 4."""
    seen = set()
    for _ in range(20):
        (first, other), overlaps = draw_windows([12, 6], [2, 3], 1 / 3)
        x = torch.arange(12.0).view(12, 1).expand(12, 6)
        crops = x[first], x[other]
        assert [c.shape for c in crops] == [(8, 6)] * 2  # 6 voxels are two strides: nothing is cut off
        common = [c[slices_of(o, c.shape)] for c, o in zip(crops, overlaps, strict=True)]
        assert torch.equal(*common) and common[0][:, 0].tolist() == [4, 5, 6, 7]
        coarse = [c[::2] for c in crops]
        assert torch.equal(*(c[slices_of(o, c.shape)] for c, o in zip(coarse, overlaps, strict=True)))
        seen.add(first[0].start)
    assert seen == {0, 4}
    windows, _ = draw_windows([8], [2], 0.5)
    assert [window[0].stop - window[0].start for window in windows] == [6, 6]  # shifted by 2, for 4 would leave nothing


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_networks_learn_each_others_confident_decisions_in_the_overlap(labels):
    """Of 8 voxels the crops have 6 and the overlap 4: the middle. There the first says 0.8, the second 0.9 and 0.6.

    Half of the second's is not confident enough. CE of the first: -log 0.8 of half; of the second: the mean of -log 0.9
    and -log 0.6; with the weight 2. Region 0 is surely not there, of both.
    """
    unlabeled = of_both((0.1, 0.8, 0.8, 0.1), (0.2, 0.9, 0.6, 0.2))
    target = torch.zeros(1, 2 if labels is REGIONS else 1, 8, 8, 8)
    batch = batch_of(of_both((0.25,), (0.1,)), target, strong=unlabeled)
    if labels is REGIONS:
        unlabeled[:, ::2] = -5  # surely not there
    for _ in range(3):  # wherever the crops are
        trainer = two_networks(labels, consistency_weight=2.0, shift=0.25, match_threshold=0.7)
        terms = terms_of(trainer, batch)
        expected = -math.log(0.8) / 2 - (math.log(0.9) + math.log(0.6)) / 2
        sure = math.log(1 + math.exp(-5))  # of the region that is not there
        expected = (expected + 1.5 * sure) / 2 if labels is REGIONS else expected
        assert terms["translation"].item() == pytest.approx(2 * expected, rel=1e-4)
        assert trainer.decide.shares.counts.tolist() == [0, 2]
    if labels is CLASSES:
        assert terms["supervised_1"].item() == pytest.approx(-math.log(0.75))
        assert terms["supervised_2"].item() == pytest.approx(-math.log(0.9))


def test_the_papers_loss_is_of_all_classes_and_a_mean_over_confident_voxels():
    """As above: the binary cross-entropy is the same of two classes."""
    batch = batch_of(of_both((0.25,), (0.1,)), strong=of_both((0.1, 0.8, 0.8, 0.1), (0.2, 0.9, 0.6, 0.2)))
    settings = dict(consistency="paper", consistency_weight=2.0, match_threshold=0.7)
    loss = terms_of(two_networks(**settings), batch)["translation"]
    assert loss.item() == pytest.approx(2 * (-math.log(0.8) - (math.log(0.9) + math.log(0.6)) / 2), rel=1e-4)
    trainer = two_networks(**settings)
    p = torch.tensor([0.7, 0.2, 0.1]).log().view(1, 3, 1, 1, 1)
    one = torch.ones(1, 1, 1, 1, 1)
    expected = -(math.log(0.3) + math.log(0.2) + math.log(0.9)) / 3  # class 1 of three
    assert trainer.taught_loss(p, one, one).item() == pytest.approx(expected, rel=1e-4)


def test_each_network_learns_and_teaches_without_gradient():
    trainer = two_networks(match_threshold=0.0, memory="fast")
    scales = [torch.ones(1, requires_grad=True) for _ in range(2)]
    trainer.network.decode = lambda skips, i=0: scales[0] * skips[0][:, :2]
    trainer.auxiliary["second"].decode = lambda skips, i=0: scales[1] * skips[0][:, 2:]
    unlabeled = of_both((0.8,), (0.9,))
    terms_of(trainer, batch_of(unlabeled, strong=unlabeled))["translation"].backward()
    for scale, p in zip(scales, (0.8, 0.9), strict=True):
        assert scale.grad.item() == pytest.approx(math.log(p / (1 - p)) * (p - 1), rel=1e-3)  # its own CE alone
