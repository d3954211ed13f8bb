import math

import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from training import CLASSES, REGIONS, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.trainers.urpc import HEAD_DROPOUT, URPCTrainer, perturb, pyramid_certainty
from nnunet_semiseg.training.batch import Batch


def logits_of(p, regions=False):
    """Logits (1, 2, 8, 8, 8) of p and 1 - p, as classes or as regions."""
    p = torch.tensor([p, 1 - p]).view(1, 2, 1, 1, 1).expand(1, 2, 8, 8, 8)
    return torch.logit(p) if regions else p.log()


def of_two_scales(loss):
    """nnU-Net's loss with the deep supervision that a network of two outputs gets; supervised is the first alone."""
    return SupervisedByTheFinest(loss, (2 / 3, 1 / 3))


class SupervisedByTheFinest(DeepSupervisionWrapper):
    def forward(self, output, target):
        return self.loss(output[0], target)


def pyramid(fine, coarse, labels=CLASSES, step=1, **settings):
    """The term of a step whose network gives these outputs, the second one in so many voxels less (`step`)."""
    trainer = bare_trainer(URPCTrainer, labels, **{"consistency": "paper", "consistency_weight": 1.0} | settings)
    trainer.enable_deep_supervision, trainer.loss = True, of_two_scales(trainer.loss)
    steps = (..., *[slice(None, None, step)] * (fine.ndim - 2))
    trainer.network = lambda x: [x[:, : fine.shape[1]], x[:, fine.shape[1] :][steps]]
    images = torch.cat((fine, coarse), 1)
    target = torch.zeros_like(fine if labels.has_regions else fine[:, :1])
    return terms_of(trainer, batch_of(images, target, strong=images))["pyramid"]


@pytest.mark.parametrize("regions", [False, True])
def test_the_pyramid_by_hand(regions):
    """p of 0.9 and 0.5, their mean 0.7: D_1 = 0.9 log(0.9 / 0.7) + 0.1 log(0.1 / 0.3), D_2 alike; ||p - p_c|| = 0.2.

    Everywhere the same, the weights cancel: 0.2^2 + (D_1 + D_2) / 2. Two complementary regions have the same D each.
    """
    d_1 = 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    d_2 = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    loss = pyramid(*(logits_of(p, regions) for p in (0.9, 0.5)), REGIONS if regions else CLASSES)
    assert loss.item() == pytest.approx(0.04 + (d_1 + d_2) / 2, rel=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_scales_learn_the_decision_of_their_mean(regions):
    """p of 0.9 and 0.4, their mean 0.65: class 0, and as regions 0 alone; each weighted with exp(-D_s).

    The coarse output has half the resolution, and with deep supervision half the weight. The ramp ends at 0.4.
    """

    def divergence(p):
        return p * math.log(p / 0.65) + (1 - p) * math.log((1 - p) / 0.35)

    one, other = (math.exp(-divergence(p)) * -math.log(p) for p in (0.9, 0.4))
    labels, about = REGIONS if regions else CLASSES, dict(step=2, consistency="dice_ce", consistency_weight=2.0)
    loss = pyramid(*(logits_of(p, regions) for p in (0.9, 0.4)), labels, **about, progress=0.4)
    assert loss.item() == pytest.approx(2 * (2 / 3 * one + 1 / 3 * other), rel=1e-4)


def test_certainty_is_of_each_voxel_on_each_scales_grid():
    """In the first half the scales agree on 0.9, in the other they say 0.9 and 0.4."""
    fine, coarse = logits_of(0.9), logits_of(0.4).clone()
    coarse[:, :, :4] = fine[:, :, :4]
    mean, weights = pyramid_certainty([fine, coarse[..., ::2, ::2, ::2]], CLASSES)
    d = [p * math.log(p / 0.65) + (1 - p) * math.log((1 - p) / 0.35) for p in (0.9, 0.4)]
    assert [w.shape for w in weights] == [(1, 1, 8, 8, 8), (1, 1, 4, 4, 4)]
    for w, x in zip(weights, d, strict=True):
        assert w.flatten()[0].item() == pytest.approx(1) and w.flatten()[-1].item() == pytest.approx(math.exp(-x))
    assert mean.exp()[0, 0, (0, -1), 0, 0].tolist() == pytest.approx([0.9, 0.65])


def test_default_settings():
    settings, paper = URPCTrainer.settings_class(), URPCTrainer.settings_class(consistency="paper")
    assert settings.weight(0.4) == settings.weight(1) == 1
    assert paper.weight(1) == 0.1 and paper.weight(0.5) == pytest.approx(0.1 * math.exp(-1.25))


def test_uncertain_voxels_count_less():
    """In half of the volume scales agree. Weighted: w / (w + 1) of what differs, instead of 1/2."""
    a, b = logits_of(0.9), logits_of(0.5).clone()
    b[..., :4, :, :] = a[..., :4, :, :]
    d = [0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3), 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)]
    expected = sum(0.04 * math.exp(-x) / (math.exp(-x) + 1) + x / 2 for x in d) / 2
    assert pyramid(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_weights_are_over_all_voxels_of_a_batch():
    """One sample as above, one whose scales differ everywhere: 3 of 4 halves differ, each with weight w, one has 1."""
    a, b = logits_of(0.9), logits_of(0.5).clone()
    b[..., :4, :, :] = a[..., :4, :, :]
    d = [0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3), 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)]
    expected = sum(0.04 * 3 * math.exp(-x) / (3 * math.exp(-x) + 1) + 3 / 4 * x for x in d) / 2
    both = pyramid(torch.cat((a, a)), torch.cat((b, logits_of(0.5))))
    assert both.item() == pytest.approx(expected, rel=1e-5)


def test_slabs_of_unequal_size_are_weighted_by_it(monkeypatch):
    monkeypatch.setattr("nnunet_semiseg.trainers.urpc.SLAB", 3)  # 8 = 3 + 3 + 2
    test_uncertain_voxels_count_less()


def test_equal_scales_have_no_loss():
    assert pyramid(logits_of(0.8), logits_of(0.8)).item() == pytest.approx(0, abs=1e-7)


def test_all_scales_are_supervised_and_compared(ready):
    trainer = make_trainer(URPCTrainer, ready())
    trainer.on_train_start()
    trainer.network.train()
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    assert len(batch.target) == 2 and trainer.loss.weight_factors == pytest.approx([2 / 3, 1 / 3])
    heads = list(trainer.network.decoder.seg_layers)
    names = []
    for group in trainer.losses(batch):
        names += group
        sum(group.values()).backward()
        assert all(head.weight.grad.any() for head in heads), names
        trainer.network.zero_grad()
    assert names == ["supervised", "pyramid"] and len(heads) == 2


def test_the_loss_of_a_step_by_hand():
    """The two outputs of test_the_pyramid_by_hand, the second one of half the size; the ramp at 0.2."""
    about = dict(step=2, progress=0.2, consistency_weight=0.3)  # of the paper's 0.1
    d_1 = 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    d_2 = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    fine, coarse = (logits_of(p).clone().requires_grad_() for p in (0.9, 0.5))
    loss = pyramid(fine, coarse, **about)
    assert loss.item() == pytest.approx(0.3 * math.exp(-5 * 0.8**2) * (0.04 + (d_1 + d_2) / 2), rel=1e-4)
    loss.backward()
    assert all(x.grad.any() for x in (fine, coarse))  # the coarse output learns as well
    loss = pyramid(*(torch.full((1, 2, 8, 8, 8), math.log(p / (1 - p))) for p in (0.9, 0.5)), REGIONS, **about)
    assert loss.item() == pytest.approx(0.3 * math.exp(-5 * 0.8**2) * (0.04 + (d_1 + d_2) / 2), rel=1e-4)


def test_without_deep_supervision_there_is_nothing_to_compare():
    images = logits_of(0.9)
    assert terms_of(bare_trainer(URPCTrainer), batch_of(images, strong=images))["pyramid"].item() == 0


def test_logits_are_brought_to_full_resolution_not_probabilities():
    """Between -4 and 4 lies 0, whose probability is 1/2 either way; next to it they differ."""
    coarse = torch.tensor([-4.0, 4.0]).view(1, 1, 2, 1).repeat(1, 1, 1, 2)
    fine = torch.nn.functional.interpolate(coarse, (4, 4), mode="bilinear")
    trainer = bare_trainer(URPCTrainer, REGIONS, network=lambda x: [fine, coarse], consistency="paper")
    trainer.enable_deep_supervision, trainer.loss = True, of_two_scales(trainer.loss)
    assert terms_of(trainer, batch_of(fine, strong=fine))["pyramid"].item() == pytest.approx(0, abs=1e-6)


def test_features_are_perturbed_before_every_output_in_training_alone():
    head = torch.nn.Conv2d(64, 64, 1)
    x = torch.ones(2, 64, 8, 8)
    (seen,) = perturb(0.5, head, (x,))
    dropped = (seen == 0).flatten(2).all(2)
    assert 0.3 < dropped.float().mean() < 0.7 and not (seen == 0)[~dropped].any()  # whole channels
    kept = seen[~dropped]  # doubled, times 1 + U(-0.3, 0.3)
    assert 1.4 <= kept.min() < 1.5 and 2.5 < kept.max() <= 2.6
    assert perturb(0.5, head.eval(), (x,)) == (x,)


def test_the_finest_output_is_perturbed_least(ready):
    network = make_trainer(URPCTrainer, ready(dims=2, size=32))
    network.initialize()
    heads = network.network.decoder.seg_layers
    p = [hook.args[0] for head in heads for hook in head._forward_pre_hooks.values()]
    assert p == [0.3, 0.2, 0.1] and HEAD_DROPOUT == (0.1, 0.2, 0.3, 0.5)
    x = torch.randn(2, 1, 32, 32)
    network.network.train()
    assert not torch.equal(network.network(x)[0], network.network(x)[0])
    network.network.eval()
    assert torch.equal(network.network(x)[0], network.network(x)[0])
