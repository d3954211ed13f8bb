import math

import pytest
import torch
from training import Echo, bare_trainer, batch_of, make_trainer, nnunet_loss, terms_of

from nnunet_semiseg.networks.multi_decoder import Encoded
from nnunet_semiseg.trainers.unimatch import UniMatchTrainer
from nnunet_semiseg.training.batch import Batch


def trainer_with_boxes(*boxes, **settings):
    """A trainer that cuts these boxes; the loss is nnU-Net's Dice and cross-entropy."""
    trainer, left = bare_trainer(UniMatchTrainer, match_weight=2.0, **settings), iter(boxes)
    trainer.loss, trainer.draw_box = nnunet_loss(False), lambda x: next(left)
    return trainer


@pytest.fixture
def feature_stream(monkeypatch):
    """Says what the feature stream's perturbation makes of features: logits, as images are."""

    def make(logits):
        monkeypatch.setattr("nnunet_semiseg.trainers.unimatch.drop_channels", lambda x, p: logits)

    return make


def test_the_losses_by_hand(feature_stream):
    """The weak view says class 1, with 0.96 in the first of two samples, else with 0.9, which does not count.

    CE: -log 0.75 over half of the voxels. Dice over the first sample: 2 * 0.75 / 1.75, nothing over the
    other. In the second strong view the samples are exchanged in all of the volume.
    """
    weak = torch.zeros(2, 2, 8, 8, 8)
    weak[0, 1], weak[1, 1] = math.log(0.96 / 0.04), math.log(0.9 / 0.1)
    strong = torch.zeros(2, 2, 8, 8, 8)
    strong[:, 1] = math.log(0.75 / 0.25)
    nothing, everything = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    half = strong.clone()
    half[1, 1] = -20  # what the second sample says does not matter, nor in the second view, where it takes its place
    feature_stream(half)
    batch = batch_of(torch.zeros_like(weak), weak=weak, strong_1=half, strong_2=half)
    terms = terms_of(trainer_with_boxes(nothing, everything), batch)
    dice = (2 * 0.75 / 1.75 + 0) / 2
    one = -math.log(0.75) / 2 - dice
    expected = {"feature": 0.5, "strong_1": 0.25, "strong_2": 0.25}
    for name, weight in expected.items():
        assert terms[name].item() == pytest.approx(2 * weight * one, abs=1e-3)


def test_pseudo_labels_are_cut_as_their_views_are(feature_stream):
    """Certain of class 1 in the first of two samples, of 0 in the other; the first view's box is a quarter.

    Class 1 has 0.75 in the first sample, 0.6 in the other. First view: labelled 1 are the first's three quarters
    around the box, and the other's box; second view: all of the first and nothing of the other.
    """
    weak, strong = torch.zeros(2, 2, 8, 8, 8), torch.zeros(2, 2, 8, 8, 8)
    weak[0, 1], weak[1, 0] = 5, 5
    strong[0, 1], strong[1, 1] = math.log(0.75 / 0.25), math.log(0.6 / 0.4)
    quarter, nothing = torch.zeros(2, 1, 1, 8, 8, 8, dtype=torch.bool)
    quarter[:, :, :2] = True
    feature_stream(strong)
    views = {"strong_1": torch.where(quarter, strong.flip(0), strong), "strong_2": strong}  # cut, both are `strong`
    batch = batch_of(torch.zeros_like(weak), weak=weak, **views)
    terms = terms_of(trainer_with_boxes(quarter, nothing), batch)
    ce = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25) + 0.25 * math.log(0.6) + 0.75 * math.log(0.4)) / 2
    dice = (2 * 0.75 * 0.75 / (0.75 + 0.75) + 2 * 0.25 * 0.6 / (0.25 + 0.6)) / 2
    assert terms["strong_1"].item() == pytest.approx(2 * 0.25 * (ce - dice), abs=1e-3)
    ce, dice = -(math.log(0.75) + math.log(0.4)) / 2, (2 * 0.75 / 1.75 + 0) / 2
    assert terms["strong_2"].item() == pytest.approx(2 * 0.25 * (ce - dice), abs=1e-3)
    assert terms["feature"].item() == pytest.approx(2 * 0.5 * (ce - dice), abs=1e-3)


class Seen(Echo):
    """Keeps what it is shown, and what its decoder reads: the image, and on a coarser level a part of it."""

    def __init__(self):
        super().__init__()
        self.images, self.read = [], []

    def __call__(self, x):
        self.images.append(x)
        return x

    def encode(self, x, text=None):
        self.images.append(x)
        return Encoded([x, x[..., ::2, ::2]], None)

    def decode(self, skips, decoder=0):
        self.read.append(skips)
        return skips[0]


def test_strong_views_are_cut():
    """Every image has a value of its own."""
    data, weak, first, second = (torch.tensor([i, i + 1.0]).view(2, 1, 1, 1, 1).expand(2, 2, 16, 16, 16)
                                 for i in (1, 3, 5, 7))  # fmt: skip
    trainer, boxes = bare_trainer(UniMatchTrainer, network=Seen(), cutmix=1.0, feature_dropout=0.0), []
    draw = trainer.draw_box
    trainer.draw_box = lambda x: (boxes.append(draw(x)), boxes[-1])[1]
    terms_of(trainer, batch_of(data, weak=weak, strong_1=first, strong_2=second))
    labeled, of_weak, *strong = trainer.network.images
    pseudo_label, perturbed = trainer.network.read
    assert torch.equal(labeled, data) and torch.equal(of_weak, weak)
    assert torch.equal(pseudo_label[0], weak) and torch.equal(perturbed[0], weak)
    for seen, box, (one, other) in zip(strong, boxes, ((5, 6), (7, 8)), strict=True):
        assert box.any() and not box.all()
        assert [x[:1][box[0]].unique().tolist() for x in seen] == [[other], [one]]
        assert [x[:1][~box[0]].unique().tolist() for x in seen] == [[one], [other]]


def test_each_strong_view_has_a_box_of_its_own():
    x, equal = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 2, 16, 16), []
    for _ in range(10):
        trainer = bare_trainer(UniMatchTrainer, network=Seen(), cutmix=1.0)
        terms_of(trainer, batch_of(x, **dict.fromkeys(UniMatchTrainer.views, x)))
        equal.append(torch.equal(*trainer.network.images[-2:]))
    assert not all(equal)


def test_half_of_the_channels_are_dropped_on_every_level_for_the_feature_stream():
    """Labelled samples are 1, the weak view 2, the strong ones 3 and 4; what is not dropped of the weak is doubled."""
    data, *views = (torch.full((2, 400, 8, 8), value) for value in (1.0, 2.0, 3.0, 4.0))
    trainer = bare_trainer(UniMatchTrainer, network=Seen())
    terms_of(trainer, batch_of(data, **dict(zip(("weak", "strong_1", "strong_2"), views, strict=True))))
    pseudo_label, perturbed = trainer.network.read
    assert [x.unique().tolist() for x in pseudo_label] == [[2], [2]]
    assert [x.unique().tolist() for x in trainer.network.images] == [[1], [2], [3], [4]]
    assert len(perturbed) == 2
    for x in perturbed:
        assert x.unique().tolist() == [0, 4] and 0.4 < (x > 0).float().mean() < 0.6
        assert (x == x[..., :1, :1]).all()


def test_each_image_is_encoded_once_and_the_decoder_learns_from_four(ready):
    trainer = make_trainer(UniMatchTrainer, ready(), feature_dropout=0.9, cutmix=0.0)
    trainer.on_train_start()
    trainer.network.train()
    encoded, decoded = [], []
    trainer.network.encoder.stages[-1].register_forward_hook(lambda m, x, y: encoded.append(len(x[0])))
    trainer.network.decoder.register_forward_hook(lambda m, x, y: decoded.append(y[0]))
    terms_of(trainer, Batch.from_loader(next(trainer.dataloader_train), trainer.device))
    assert encoded == [2, 2, 2, 2] and [len(x) for x in decoded] == [2] * 5
    assert [x.requires_grad for x in decoded] == [True, False, True, True, True]  # all but the pseudo-labels' pass
    _, weak, perturbed, first, second = decoded
    assert not torch.equal(weak, perturbed) and not torch.equal(first, second)


def test_boxes_of_cutmix():
    """Every other step a box of 0.02 to 0.4 of the patch: of 20 voxels a side has 5 to 15 (0.016 to 0.42)."""
    x = torch.zeros(1, 1, 20, 20, 20)
    shares = [bare_trainer(UniMatchTrainer).draw_box(x).float().mean().item() for _ in range(400)]
    boxes = [share for share in shares if share]
    assert 140 < len(boxes) < 260
    assert 0.015 < min(boxes) < 0.07 and 0.3 < max(boxes) < 0.43 and 0.16 < sum(boxes) / len(boxes) < 0.26


def test_default_settings():
    settings = UniMatchTrainer.settings_class()
    assert (settings.match_weight, settings.match_threshold) == (1, 0.95)
    assert (settings.feature_dropout, settings.cutmix) == (0.5, 0.5)


class Scaled(Echo):
    """A network whose encoder multiplies the image by a weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones((), requires_grad=True)

    def encode(self, x, text=None):
        return Encoded([self.weight * x], None)


def test_the_feature_stream_teaches_the_encoder():
    """The weak view says class 1, with the logit w log 4: d CE / dw = -(1 - 0.8) log 4, and the term counts half."""
    trainer = bare_trainer(UniMatchTrainer, network=Scaled(), match_threshold=0.0, feature_dropout=0.0)
    weak = torch.zeros(2, 2, 8, 8, 8)
    weak[:, 1] = math.log(4)
    batch = batch_of(torch.zeros_like(weak), weak=weak, strong_1=weak, strong_2=weak)
    terms_of(trainer, batch)["feature"].backward()
    assert trainer.network.weight.grad.item() == pytest.approx(-0.5 * 0.2 * math.log(4), rel=1e-4)
