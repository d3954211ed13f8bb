import math

import pytest
import torch
from training import make_trainer

from nnunet_semiseg.trainers.urpc import URPCTrainer, pyramid_consistency


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
