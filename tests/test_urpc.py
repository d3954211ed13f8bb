import math

import pytest
import torch
from training import REGIONS, bare_trainer, make_trainer

from nnunet_semiseg.trainers.urpc import HEAD_DROPOUT, URPCTrainer, perturb, pyramid_consistency


def two_scales(a, b):
    return [torch.tensor([p, 1 - p]).view(1, 2, 1, 1, 1).expand(1, 2, 8, 8, 8) for p in (a, b)]


@pytest.mark.parametrize("regions", [False, True])
def test_the_pyramid_by_hand(regions):
    """p of 0.9 and 0.5, their mean 0.7: D_1 = 0.9 log(0.9 / 0.7) + 0.1 log(0.1 / 0.3), D_2 alike; ||p - p_c|| = 0.2.

    Everywhere the same, the weights cancel: 0.2^2 + (D_1 + D_2) / 2. Two complementary regions have the same D each.
    """
    d_1 = 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    d_2 = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    loss = pyramid_consistency(two_scales(0.9, 0.5), regions)
    assert loss.item() == pytest.approx(0.04 + (d_1 + d_2) / 2, rel=1e-5)


def test_uncertain_voxels_count_less():
    """In half of the volume scales agree. Weighted: w / (w + 1) of what differs, instead of 1/2."""
    a, b = two_scales(0.9, 0.5)
    b = b.clone()
    b[..., :4, :, :] = a[..., :4, :, :]
    d = [0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3), 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)]
    expected = sum(0.04 * math.exp(-x) / (math.exp(-x) + 1) + x / 2 for x in d) / 2
    assert pyramid_consistency([a, b], False).item() == pytest.approx(expected, rel=1e-5)


def test_equal_scales_have_no_loss():
    assert pyramid_consistency(two_scales(0.8, 0.8), False).item() == pytest.approx(0, abs=1e-7)


def test_all_scales_are_supervised_and_compared(ready, monkeypatch):
    trainer = make_trainer(URPCTrainer, ready())
    trainer.on_train_start()
    seen = []
    monkeypatch.setattr(
        "nnunet_semiseg.trainers.urpc.pyramid_consistency",
        lambda p, regions: (seen.append([tuple(x.shape) for x in p]), sum(x.mean() for x in p))[1],
    )
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    n = len(batch["target"])
    assert trainer.loss.weight_factors == pytest.approx([2 / 3, 1 / 3])
    assert n == 2 and seen == [[(2, 3, *trainer.configuration_manager.patch_size)] * n]


def test_the_loss_of_a_step_by_hand():
    """The two outputs of test_the_pyramid_by_hand, as logits, the second one of half the size; the ramp at 0.2."""
    trainer = bare_trainer(URPCTrainer, progress=0.2, consistency_weight=0.3)
    trainer.enable_deep_supervision = True
    outputs = [x.log()[..., : 8 // n, : 8 // n, : 8 // n] for n, x in enumerate(two_scales(0.9, 0.5), 1)]
    d_1 = 0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
    d_2 = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    loss = trainer.semi_losses(None, outputs, {})["pyramid"]
    assert loss.item() == pytest.approx(0.3 * math.exp(-5 * 0.8**2) * (0.04 + (d_1 + d_2) / 2), rel=1e-4)
    grown = [x.clone().requires_grad_() for x in outputs]
    trainer.semi_losses(None, grown, {})["pyramid"].backward()
    assert all(x.grad.any() for x in grown)  # the coarse output learns as well
    trainer.label_manager = REGIONS
    outputs = [torch.full((1, 2, 8, 8, 8), math.log(p / (1 - p))) for p in (0.9, 0.5)]
    loss = trainer.semi_losses(None, outputs, {})["pyramid"]
    assert loss.item() == pytest.approx(0.3 * math.exp(-5 * 0.8**2) * (0.04 + (d_1 + d_2) / 2), rel=1e-4)


def test_logits_are_brought_to_full_resolution_not_probabilities():
    trainer = bare_trainer(URPCTrainer, REGIONS)
    trainer.enable_deep_supervision = True
    coarse = torch.tensor([-4.0, 4.0]).view(1, 1, 2, 1).repeat(1, 1, 1, 2)
    fine = torch.nn.functional.interpolate(coarse, (4, 4), mode="bilinear")
    assert trainer.semi_losses(None, [fine, coarse], {})["pyramid"].item() == pytest.approx(0, abs=1e-6)


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
