import math

import pytest
import torch
from training import CLASSES, REGIONS, Echo, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.networks.multi_decoder import InterpolationUpsampling
from nnunet_semiseg.trainers.mc_net import MCNetTrainer


def three_decoders(*args, **settings):
    """A trainer whose decoders say the first, second and last third of an image's channels."""
    return bare_trainer(MCNetTrainer, *args, network=Echo(3), **settings)


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_decoders_approach_each_others_sharpened_output(labels):
    """p of 0.6, 0.5, 0.5. T = 0.5 sharpens 0.6 to 0.36 / (0.36 + 0.16) = 0.692..., and leaves 1/2.

    Ordered pairs (i learns from j): (0 of 1) and (0 of 2): 0.1^2 each; (1 of 0) and (2 of 0): (0.692 - 0.5)^2 each;
    (1 of 2) and (2 of 1): 0. Regions: only one of both heads differs from 1/2.
    """
    trainer = three_decoders(labels, consistency="paper", sharpening=0.5, consistency_weight=2.0)
    even, first = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
    first[:, 1] = math.log(0.6 / 0.4)
    images = torch.cat((first, even, even), 1)
    target = torch.zeros(1, 2 if labels is REGIONS else 1, 8, 8, 8)
    loss = terms_of(trainer, batch_of(images, target, strong=images))["mutual"]
    expected = 2 * 0.1**2 + 2 * (0.36 / 0.52 - 0.5) ** 2
    assert loss.item() == pytest.approx(2 * expected * (0.5 if labels is REGIONS else 1))


def test_consistency_of_both_streams_by_a_ramp():
    """Decoders: 0.6, 0.5, 0.5 where there are labels, as above; 0.8, 0.5, 0.5 elsewhere; the ramp at 0.2."""
    trainer = three_decoders(progress=0.2, consistency="paper", sharpening=0.5, consistency_weight=2.0)
    labeled, unlabeled = (torch.zeros(2, 6, 8, 8, 8) for _ in range(2))
    labeled[:, 1], unlabeled[:, 1] = math.log(0.6 / 0.4), math.log(0.8 / 0.2)
    loss = terms_of(trainer, batch_of(labeled, strong=unlabeled))["mutual"]
    of_labeled = 2 * 0.1**2 + 2 * (0.36 / 0.52 - 0.5) ** 2
    of_unlabeled = 2 * 0.3**2 + 2 * (0.64 / 0.68 - 0.5) ** 2
    assert loss.item() == pytest.approx(2 * math.exp(-5 * 0.8**2) * (of_labeled + of_unlabeled) / 2)


@pytest.mark.parametrize("settings, weight", [({}, 0.5), ({"supervised_weight": 0.25}, 0.25)])
def test_each_decoder_learns_the_labels(settings, weight):
    trainer = three_decoders(consistency="paper", **settings)
    trainer.loss = lambda output, target: output.mean() + target.mean()
    images = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(2).view(1, 6, 1, 1, 1).expand(1, 6, 8, 8, 8)
    terms = terms_of(trainer, batch_of(images, torch.full((1, 1, 8, 8, 8), 5.0), strong=images))
    del terms["mutual"]
    assert terms == {"supervised_1": 6 * weight, "supervised_2": 7 * weight, "supervised_3": 8 * weight}


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_decoders_learn_each_others_decisions(labels):
    """P(1) of 0.8, 0.4, 0.3: the first decides for 1, the others for 0.

    CE of the first: -log 0.2 of both; of the second: the mean of -log 0.4 and -log 0.6; of the third of -log 0.3 and
    -log 0.7. lambda is 0.5, the weight 2. Region 0 is 1/2 for all, which is no: log 2 of each.
    """
    trainer = three_decoders(labels, consistency_weight=2.0)
    images = torch.zeros(1, 6, 8, 8, 8)
    for i, p in enumerate((0.8, 0.4, 0.3)):
        images[:, 2 * i + 1] = math.log(p / (1 - p))
    target = torch.zeros(1, 2 if labels is REGIONS else 1, 8, 8, 8)
    loss = terms_of(trainer, batch_of(images, target, strong=images))["mutual"]
    expected = -math.log(0.2) - (math.log(0.4) + math.log(0.6) + math.log(0.3) + math.log(0.7)) / 2
    expected = (expected + 3 * math.log(2)) / 2 if labels is REGIONS else expected
    assert loss.item() == pytest.approx(2 * 0.5 * expected, rel=1e-4)


def test_unlabelled_decisions_alone_are_counted():
    """Class 1 is everywhere in the labelled samples and nowhere else."""
    labeled, unlabeled = torch.zeros(2, 1, 6, 8, 8, 8)
    labeled[:, 1::2] = 1
    for consistency in ("dice_ce", "paper"):
        trainer = three_decoders(consistency=consistency)
        terms_of(trainer, batch_of(labeled, strong=unlabeled))
        assert trainer.decide.shares.counts.tolist() == [0, 3] and trainer.decide.shares.sums.sum() == 0


def test_default_settings():
    settings, paper = MCNetTrainer.settings_class(), MCNetTrainer.settings_class(consistency="paper")
    assert (settings.supervised_weight, settings.sharpening, settings.weight(0.4)) == (0.5, 0.1, 1)
    assert paper.weight(1) == 1 and paper.weight(0.5) == pytest.approx(math.exp(-1.25))


def test_labels_of_the_others_get_no_gradient():
    a, b = torch.randn(1, 2, 8, 8, 8, requires_grad=True), torch.randn(1, 2, 8, 8, 8)
    trainer = three_decoders(supervised_weight=0.0, consistency="paper")
    images = torch.cat((a, b, b), 1)
    trainer.backward(trainer.losses(batch_of(images, strong=images)))
    with_labels = a.grad.clone()
    a.grad = None
    p = a.softmax(1)
    sharp = (b / 0.1).softmax(1)
    (2 * (p - sharp).square().mean()).backward()
    torch.testing.assert_close(with_labels, a.grad)


def test_three_decoders_that_upsample_differently(ready):
    trainer = make_trainer(MCNetTrainer, ready())
    trainer.initialize()
    linear, nearest = trainer.network.other_decoders
    assert [d.transpconvs[0][1].mode for d in (linear, nearest)] == ["trilinear", "nearest"]
    assert not isinstance(trainer.network.decoder.transpconvs[0], InterpolationUpsampling)
    size = trainer.configuration_manager.patch_size
    with torch.no_grad():
        skips = trainer.network.encode(torch.zeros(1, 1, *size)).skips
        outputs = [trainer.network.decode(skips, i) for i in range(3)]
    grids = [[x.shape for x in output] for output in outputs]  # each is supervised deeply
    assert len(grids[0]) > 1 and grids[0] == grids[1] == grids[2]
