import math

import pytest
import torch
from training import CLASSES, make_trainer, nnunet_loss

from nnunet_semiseg.trainers.unimatch import BOX_VOLUME, UniMatchTrainer


def test_the_losses_by_hand():
    """The weak view says class 1, with 0.96 in the first of two samples, else with 0.9, which does not count.

    CE: -log 0.75 over half of the voxels. Dice over the first sample: 2 * 0.75 / 1.75, nothing over the
    other. In the second strong view the samples are exchanged in all of the volume.
    """
    weak = torch.zeros(2, 2, 8, 8, 8)
    weak[0, 1], weak[1, 1] = math.log(0.96 / 0.04), math.log(0.9 / 0.1)
    strong = torch.zeros(2, 2, 8, 8, 8)
    strong[:, 1] = math.log(0.75 / 0.25)
    nothing, everything = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)

    class Trainer:
        settings, label_manager = UniMatchTrainer.settings_class(match_weight=2.0), CLASSES
        finest_loss, boxes, cut_mix = nnunet_loss(False), [nothing, everything], UniMatchTrainer.cut_mix

    half = strong.clone()
    half[1, 1] = -20  # what the second sample says in the first strong view does not matter
    swapped = strong.clone()
    swapped[0, 1] = -20  # in the second it is the first sample's
    terms = UniMatchTrainer.semi_losses(Trainer(), None, (weak, half, swapped, half), {})
    dice = (2 * 0.75 / 1.75 + 0) / 2
    one = -math.log(0.75) / 2 - dice
    expected = {"feature": 0.5, "strong_1": 0.25, "strong_2": 0.25}
    for name, weight in expected.items():
        assert terms[name].item() == pytest.approx(2 * weight * one, abs=1e-3)


def test_one_pass_of_the_encoder_and_a_decoder_for_five(ready):
    trainer = make_trainer(UniMatchTrainer, ready(), feature_dropout=0.9, cutmix=0.0)
    trainer.on_train_start()
    trainer.network.train()
    seen = {"encoder": [], "decoder": []}
    trainer.network.encoder.register_forward_hook(lambda m, x, y: seen["encoder"].append(len(x[0])))
    trainer.network.decoder.register_forward_hook(lambda m, x, y: seen["decoder"].append(len(x[0][-1])))
    labeled, (weak, first, second, perturbed) = trainer.forward_streams(next(trainer.dataloader_train))
    assert seen == {"encoder": [8], "decoder": [10]}
    assert len(labeled[0]) == len(weak) == len(first) == len(second) == len(perturbed) == 2
    assert not torch.equal(weak, perturbed) and not torch.equal(first, second)


def test_boxes_of_cutmix():
    class Trainer:
        settings = UniMatchTrainer.settings_class(cutmix=0.5)

    x = torch.zeros(1, 1, 20, 20, 20)
    shares = [UniMatchTrainer.draw_box(Trainer(), x).float().mean().item() for _ in range(60)]
    empty = [s for s in shares if s == 0]
    assert 10 < len(empty) < 50
    assert all(BOX_VOLUME[0] * 0.7 < s < BOX_VOLUME[1] * 1.15 for s in shares if s)
