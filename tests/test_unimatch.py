import math

import pytest
import torch
from training import bare_trainer, make_trainer, nnunet_loss

from nnunet_semiseg.trainers.unimatch import UniMatchTrainer


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
    trainer = bare_trainer(UniMatchTrainer, match_weight=2.0)
    trainer.loss, trainer.boxes = nnunet_loss(False), [nothing, everything]
    half = strong.clone()
    half[1, 1] = -20  # what the second sample says in the first strong view does not matter
    swapped = strong.clone()
    swapped[0, 1] = -20  # in the second it is the first sample's
    terms = trainer.semi_losses(None, (weak, half, swapped, half), {})
    dice = (2 * 0.75 / 1.75 + 0) / 2
    one = -math.log(0.75) / 2 - dice
    expected = {"feature": 0.5, "strong_1": 0.25, "strong_2": 0.25}
    for name, weight in expected.items():
        assert terms[name].item() == pytest.approx(2 * weight * one, abs=1e-3)


def test_pseudo_labels_are_cut_as_their_views_are():
    """Certain of class 1 in the first of two samples, of 0 in the other; the first view's box is a quarter.

    Class 1 has 0.75 in the first sample, 0.6 in the other. First view: labelled 1 are the first's three quarters
    around the box, and the other's box; second view: all of the first and nothing of the other.
    """
    weak, strong = torch.zeros(2, 2, 8, 8, 8), torch.zeros(2, 2, 8, 8, 8)
    weak[0, 1], weak[1, 0] = 5, 5
    strong[0, 1], strong[1, 1] = math.log(0.75 / 0.25), math.log(0.6 / 0.4)
    quarter, nothing = torch.zeros(2, 1, 1, 8, 8, 8, dtype=torch.bool)
    quarter[:, :, :2] = True
    trainer = bare_trainer(UniMatchTrainer, match_weight=2.0)
    trainer.loss, trainer.boxes = nnunet_loss(False), [quarter, nothing]
    terms = trainer.semi_losses(None, (weak, strong, strong, strong), {})
    ce = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25) + 0.25 * math.log(0.6) + 0.75 * math.log(0.4)) / 2
    dice = (2 * 0.75 * 0.75 / (0.75 + 0.75) + 2 * 0.25 * 0.6 / (0.25 + 0.6)) / 2
    assert terms["strong_1"].item() == pytest.approx(2 * 0.25 * (ce - dice), abs=1e-3)
    ce, dice = -(math.log(0.75) + math.log(0.4)) / 2, (2 * 0.75 / 1.75 + 0) / 2
    assert terms["strong_2"].item() == pytest.approx(2 * 0.25 * (ce - dice), abs=1e-3)
    assert terms["feature"].item() == pytest.approx(2 * 0.5 * (ce - dice), abs=1e-3)


class Streams:
    """Its network's features are the images, and the coarser ones a quarter of them; it gives the images back."""

    draw_box, cut_mix = UniMatchTrainer.draw_box, UniMatchTrainer.cut_mix
    finest = staticmethod(lambda x: x)

    def __init__(self, **settings):
        self.settings = UniMatchTrainer.settings_class(**settings)

    def network(self, images, text, decoders, perturbations):
        features = [images, images[..., ::2, ::2]]
        self.weak, self.skips = (perturb(features, []) for perturb in perturbations)
        return self.weak[0], self.skips[0]


def test_strong_views_are_cut():
    """Every image has a value of its own."""
    data, weak, first, second = (torch.tensor([i, i + 1.0]).view(2, 1, 1, 1, 1).expand(2, 1, 16, 16, 16)
                                 for i in (1, 3, 5, 7))  # fmt: skip
    trainer = Streams(cutmix=1.0, feature_dropout=0.0)
    batch = {"data": data, "unlabeled": {"weak": weak, "strong_1": first, "strong_2": second}}
    labeled, (of_weak, *strong, perturbed) = UniMatchTrainer.forward_streams(trainer, batch)
    assert torch.equal(labeled, data) and torch.equal(of_weak, weak) and torch.equal(perturbed, weak)
    for seen, box, (one, other) in zip(strong, trainer.boxes, ((5, 6), (7, 8)), strict=True):
        assert box.any() and not box.all()
        assert [x[box[0]].unique().tolist() for x in seen] == [[other], [one]]
        assert [x[~box[0]].unique().tolist() for x in seen] == [[one], [other]]


def test_each_strong_view_has_a_box_of_its_own():
    x, trainer, equal = torch.zeros(2, 1, 16, 16), Streams(cutmix=1.0), []
    for _ in range(10):
        UniMatchTrainer.forward_streams(trainer, {"data": x, "unlabeled": dict.fromkeys(UniMatchTrainer.views, x)})
        equal.append(torch.equal(*trainer.boxes))
    assert not all(equal)


def test_half_of_the_channels_are_dropped_on_every_level_for_the_feature_stream():
    """Labelled samples are 1, the weak view 2, the strong ones 3 and 4; what is not dropped of the weak is doubled."""
    data, *views = (torch.full((2, 400, 8, 8), value) for value in (1.0, 2.0, 3.0, 4.0))
    trainer, unlabeled = Streams(), dict(zip(("weak", "strong_1", "strong_2"), views, strict=True))
    UniMatchTrainer.forward_streams(trainer, {"data": data, "unlabeled": unlabeled})
    assert [x.unique().tolist() for x in trainer.weak] == [[2], [2]]
    assert len(trainer.skips) == 2
    for skip in trainer.skips:
        labeled, perturbed, *strong = skip.split(2)
        assert [x.unique().tolist() for x in (labeled, *strong)] == [[1], [3], [4]]
        assert perturbed.unique().tolist() == [0, 4] and 0.4 < (perturbed > 0).float().mean() < 0.6
        assert (perturbed == perturbed[..., :1, :1]).all()


def test_one_pass_of_the_encoder_and_the_decoder_learns_from_four(ready):
    trainer = make_trainer(UniMatchTrainer, ready(), feature_dropout=0.9, cutmix=0.0)
    trainer.on_train_start()
    trainer.network.train()
    seen = {"encoder": [], "decoder": []}
    trainer.network.encoder.register_forward_hook(lambda m, x, y: seen["encoder"].append(len(x[0])))
    trainer.network.decoder.register_forward_hook(lambda m, x, y: seen["decoder"].append(len(x[0][-1])))
    labeled, (weak, first, second, perturbed) = trainer.forward_streams(next(trainer.dataloader_train))
    assert seen == {"encoder": [8], "decoder": [2, 8]} and not weak.requires_grad and perturbed.requires_grad
    assert len(labeled[0]) == len(weak) == len(first) == len(second) == len(perturbed) == 2
    assert not torch.equal(weak, perturbed) and not torch.equal(first, second)


def test_boxes_of_cutmix():
    """Every other step a box of 0.02 to 0.4 of the patch: of 20 voxels a side has 5 to 15 (0.016 to 0.42)."""
    x = torch.zeros(1, 1, 20, 20, 20)
    shares = [UniMatchTrainer.draw_box(Streams(), x).float().mean().item() for _ in range(400)]
    boxes = [share for share in shares if share]
    assert 140 < len(boxes) < 260
    assert 0.015 < min(boxes) < 0.07 and 0.3 < max(boxes) < 0.43 and 0.16 < sum(boxes) / len(boxes) < 0.26


def test_default_settings():
    settings = UniMatchTrainer.settings_class()
    assert (settings.match_weight, settings.match_threshold) == (1, 0.95)
    assert (settings.feature_dropout, settings.cutmix) == (0.5, 0.5)
