"""STLU-Net: its equations on arrays small enough to work out by hand, and its options."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.utils._pytree import tree_map
from training import CLASSES, REGIONS, bare_trainer, batch_of, make_trainer, nnunet_loss, terms_of

from nnunet_semiseg.data.paired_spatial import share_spatial
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.ramps import gaussian_ramp
from nnunet_semiseg.losses.segmentation import confidence, hard_pseudo_label, weighted_loss
from nnunet_semiseg.networks.feature_mixing import (
    FeatureMixingUNet,
    drop_blocks,
    drop_channels,
    mix,
    mixing_points,
    similarity_weights,
)
from nnunet_semiseg.trainers.stlu_net import STLUNetTrainer, draw_beta
from nnunet_semiseg.training.batch import Batch

# ------------------------------------------------------------------------------------------------------ equations


def channels(*values):
    return torch.tensor(values, dtype=torch.float32)[None]


def test_similarity_weights_of_identical_orthogonal_and_opposite_features():
    a = channels([3.0, 4.0], [1.0, 0.0]).requires_grad_()
    assert similarity_weights(a, a).tolist() == [[[1.0], [1.0]]]
    orthogonal = channels([4.0, -3.0], [0.0, 2.0])
    # relu(4, -3) = (4, 0): cos = 12 / (5 * 4) = 0.6, where the features' own cosine is 0
    torch.testing.assert_close(similarity_weights(a, orthogonal), torch.tensor([[[0.6], [0.0]]]))
    assert similarity_weights(a, -a).tolist() == [[[0.0], [0.0]]]
    w = similarity_weights(torch.rand(2, 3, 4, 5, 6).half().requires_grad_(), torch.rand(2, 3, 4, 5, 6).half())
    assert w.shape == (2, 3, 1, 1, 1) and w.dtype == torch.float32 and not w.requires_grad
    assert ((0 <= w) & (w <= 1)).all()


def test_both_mixes():
    a, b = channels([8.0, 0.0], [1.0, 2.0]), channels([0.0, 4.0], [3.0, 6.0])
    weight = torch.tensor([[[0.75], [0.0]]])
    mixed_a, mixed_b = mix(a, b, weight)
    assert mixed_a.tolist() == [[[6.0, 1.0], [3.0, 6.0]]]  # 0.75 a + 0.25 b; a channel with w = 0 is exchanged
    assert mixed_b.tolist() == [[[2.0, 3.0], [1.0, 2.0]]]
    assert mix(a, b, torch.ones(()))[0].equal(a)


def test_gamma():
    assert gaussian_ramp(0.2) == pytest.approx(math.exp(-5 * 0.64)) and gaussian_ramp(1) == 1


def test_groups_of_stages():
    assert mixing_points(5) == {"S": 1, "I": 3, "B": 4}  # two, two, one
    assert mixing_points(6) == {"S": 2, "I": 4, "B": 5}
    assert mixing_points(3) == {"S": 0, "I": 1, "B": 2} and mixing_points(2) == {"S": 0, "B": 1}


def test_dropped_channels_and_blocks():
    torch.manual_seed(0)
    for ndim in (2, 3):
        x = torch.ones(4, 32, *[9] * ndim)
        dropped = drop_channels(x, 0.5).flatten(2)
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert (dropped == dropped[..., :1]).all()  # whole channels
        blocks = drop_blocks(x, 0.3)
        zeros = (blocks == 0).flatten(2).float().mean(2)
        assert 0 < zeros.mean() < 0.6 and ((0 < zeros) & (zeros < 1)).any()
        assert drop_channels(x, 0.0).equal(x)
        assert drop_blocks(torch.ones(1, 1, *[4] * ndim), 0.5).shape == (1, 1, *[4] * ndim)


def test_confidence_by_hand():
    p = torch.tensor([[0.9, 0.4], [0.1, 0.6]]).view(1, 2, 2)
    torch.testing.assert_close(confidence(p, CLASSES), torch.tensor([[[0.9, 0.6]]]))
    p = torch.tensor([[0.9, 0.1], [0.2, 0.6]]).view(1, 2, 2)
    torch.testing.assert_close(confidence(p, REGIONS), torch.tensor([[[0.8, 0.6]]]))  # 0.2 decides for "no" with 0.8


@pytest.mark.parametrize("regions", [False, True])
def test_a_loss_with_equal_weights_is_nnunets(regions):
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 8, 8, 8)
    target = hard_pseudo_label(torch.randn(2, 2, 8, 8, 8), REGIONS if regions else CLASSES)
    loss = nnunet_loss(regions)
    torch.testing.assert_close(weighted_loss(loss, logits, target, torch.ones(2, 1, 8, 8, 8)), loss(logits, target))
    with_ignore = torch.cat((target, torch.zeros_like(target[:, :1])), 1) if regions else target
    torch.testing.assert_close(
        weighted_loss(loss, logits, with_ignore, torch.ones(2, 1, 8, 8, 8)), loss(logits, target)
    )


def test_a_weighted_loss_by_hand():
    """Two voxels, P(a) = 0.8 where a is right, 0.4 where background is; the second counts 0.3."""
    p = torch.tensor([0.8, 0.4])
    logits = torch.stack((torch.log(1 - p), torch.log(p))).view(1, 2, 2, 1)
    target, weight = torch.tensor([1, 0]).view(1, 1, 2, 1), torch.tensor([1.0, 0.3]).view(1, 1, 2, 1)
    ce = (-math.log(0.8) - 0.3 * math.log(0.6)) / 2
    dice = -(2 * 0.8 + 1e-5) / (1 + (0.8 + 0.3 * 0.4) + 1e-5)
    assert weighted_loss(nnunet_loss(False), logits, target, weight).item() == pytest.approx(ce + dice, abs=1e-6)
    # a sample of which nothing counts: nothing, or in the batch's Dice, as of 2d plans, no part of its sums
    logits, target, weight = (torch.cat((x, x)) for x in (logits, target, weight))
    weight[1] = 0
    for batch_dice, expected in ((False, (ce + dice) / 2), (True, ce / 2 + dice)):
        loss = nnunet_loss(False)
        loss.dc.batch_dice = batch_dice
        assert weighted_loss(loss, logits, target, weight).item() == pytest.approx(expected, abs=1e-5)
    logits, target, weight = logits[:1], target[:1], weight[:1]
    only_dice = nnunet_loss(False, weight_ce=0)
    assert weighted_loss(only_dice, logits, target, weight).item() == pytest.approx(dice, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- network


def unet(kind=PlainConvUNet, ndim=2, **kwargs):
    conv = (nn.Conv2d, nn.Conv3d)[ndim - 2]
    norm = (nn.InstanceNorm2d, nn.InstanceNorm3d)[ndim - 2]
    blocks = {"n_conv_per_stage": 1} if kind is PlainConvUNet else {"n_blocks_per_stage": 1}
    return kind(
        1, 3, (4, 8, 8), conv, 3, (1, 2, 2), num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=norm,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, **blocks, **kwargs,
    )  # fmt: skip


def streams(network, *args, **kwargs):
    """The outputs of the mixing stream and of the other, the halves of the batch together, and the weights."""
    *halves, weights = network.paired(*args, **kwargs)
    halves = [[network.decode(skips) for skips in half] for half in halves]
    return *(tree_map(lambda *x: torch.cat(x), *of_halves) for of_halves in zip(*halves, strict=True)), weights


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("ndim", [2, 3])
def test_streams(kind, ndim):
    torch.manual_seed(0)
    plain = unet(kind, ndim)
    network = FeatureMixingUNet(plain, "weight", dropout=0.0)
    assert network.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 1, *[8] * ndim)
    out = plain(x)
    assert network(x).equal(out)
    # w = 1 and no dropout: both streams are the plain network
    mixed, dropped, weights = streams(network, x, (0, 1, 2), torch.ones(()))
    torch.testing.assert_close(mixed, out)
    torch.testing.assert_close(dropped, out)
    assert weights == []
    # w = 0 at the first stage: the partners change places in the mixing stream
    mixed, dropped, _ = streams(network, x, (0,), torch.zeros(()))
    torch.testing.assert_close(mixed, torch.cat((out[2:], out[:2])))
    torch.testing.assert_close(dropped, out)
    # similarity: what the deeper stages see is mixed with the weights that are returned
    mixed, _, weights = streams(FeatureMixingUNet(plain, "similarity", dropout=0.5), x, (1, 2))
    assert [w.shape for w in weights] == [(2, 8, *[1] * ndim)] * 2
    assert not torch.allclose(mixed, out)


def test_what_both_streams_share_is_computed_once():
    network = FeatureMixingUNet(unet(), "similarity", dropout=0.5)
    calls = {0: 0, 1: 0, 2: 0}
    for i, stage in enumerate(network.encoder.stages):
        stage.register_forward_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
    network.paired(torch.randn(2, 1, 8, 8), (1,))
    assert calls == {0: 1, 1: 1, 2: 2}


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("samples", [1, 2])
def test_what_is_computed_again_gives_the_same_outputs_and_gradients(kind, samples):
    torch.manual_seed(0)
    network, x = FeatureMixingUNet(unet(kind), "similarity", dropout=0.5), torch.randn(4, 1, 8, 8)

    def run(samples):
        torch.manual_seed(1)  # the same channels are dropped
        network.zero_grad()
        mixed, dropped, weights = streams(network, x, (1, 2), samples=samples)
        (mixed.square().mean() + dropped.pow(3).mean()).backward()
        return [mixed, dropped, *weights, *(p.grad for p in network.parameters() if p.grad is not None)]

    kept, again = run(None), run(samples)
    assert len(kept) == len(again) > 4 and all(p.any() for p in kept[4:6])
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b)


# Three stages that pass on what they get and a decoder that returns the skips (B, 3, C, *S): the streams can be seen.
TRANSPARENT = SimpleNamespace(
    encoder=SimpleNamespace(stages=[nn.Identity()] * 3), decoder=lambda skips: torch.stack(skips, 1)
)


def test_the_enhancement_stream_drops_channels_after_each_point():
    torch.manual_seed(0)
    network = FeatureMixingUNet(TRANSPARENT, "weight", dropout=0.75)
    _, dropped, _ = streams(network, torch.ones(2, 1000, 2, 2), (1, 2), torch.tensor(0.5))
    dropped = dropped.unbind(1)
    assert dropped[0].eq(1).all()
    assert set(dropped[1].unique().tolist()) == {0.0, 4.0} and set(dropped[2].unique().tolist()) == {0.0, 16.0}
    assert (dropped[1] == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropblock_drops_its_share_of_the_mixing_stream(p):
    torch.manual_seed(0)
    x = torch.ones(2, 2000, 1, 1)  # of a map of one voxel, a block is that voxel
    mixed, _, weights = streams(FeatureMixingUNet(TRANSPARENT, "dropblock", dropout=p), x, (1,))
    mixed = mixed.unbind(1)
    assert (mixed[1] == 0).float().mean().item() == pytest.approx(p, abs=0.03) and weights == []
    assert mixed[0].equal(x) and mixed[2].equal(mixed[1])


def test_without_mixing_the_stream_is_the_plain_network():
    x = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    mixed, _, weights = streams(FeatureMixingUNet(TRANSPARENT, "off", dropout=0.5), x, (0, 1, 2))
    assert all(skip.equal(x) for skip in mixed.unbind(1)) and weights == []


@pytest.mark.parametrize("own_skips", [False, True])
def test_skips_are_mixed_or_a_samples_own(own_skips):
    """The labelled sample is 1, its partner 0, and each keeps 3/4 of its own at the first and at the last stage."""
    network = FeatureMixingUNet(TRANSPARENT, "weight", 0.0, own_skips)
    x = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    mixed, dropped, _ = streams(network, x, (0, 2), torch.tensor(0.75))
    # of 3/4 and 1/4 each keeps 3/4: 9/16 + 1/16
    first = [1, 0] if own_skips else [0.75, 0.25]
    expected = [first, [0.75, 0.25], [0.625, 0.375]]
    assert [skip.flatten().tolist() for skip in mixed.unbind(1)] == expected
    assert all(skip.equal(x) for skip in dropped.unbind(1))


# -------------------------------------------------------------------------------------------------------- pairs


def test_what_one_sample_drew_the_other_replays():
    spatial = SpatialTransform(
        (8, 8), 0, False, p_rotation=1, rotation=(-3, 3), p_scaling=1, scaling=(0.7, 1.4), p_elastic_deform=0
    )
    labeled, unlabeled = ComposeTransforms([spatial]), ComposeTransforms([spatial])
    share_spatial(labeled, unlabeled)
    images = [torch.rand(1, 8, 8) for _ in range(3)]
    ours, theirs = ([transforms(image=x)["image"] for x in images] for transforms in (labeled, unlabeled))
    for one, other, x in zip(ours, theirs, images, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, x)
    assert not labeled.transforms[0].drawn


def test_pairs_are_mirrored_alike_with_their_labels():
    """Each image is an ascending ramp on both axes; the unlabelled one is ten times as much, the target the image."""
    trainer, seen = bare_trainer(STLUNetTrainer), set()
    trainer.inference_allowed_mirroring_axes = (0, 1)
    x = torch.arange(4.0).view(1, 1, 2, 2).repeat(3, 1, 1, 1)
    for _ in range(10):
        labeled, target, unlabeled = trainer.mirrored(batch_of(x, [x, x[..., :1]], strong=10 * x))
        assert torch.equal(10 * labeled, unlabeled) and torch.equal(labeled, target[0])
        # the coarse target holds the first column: 0 and 2
        assert [c[0].tolist() for c in target[1]] == [
            [[0], [2]] if s[0].min(1)[0][0] < 2 else [[2], [0]] for s in labeled
        ]
        seen |= {tuple(sample.flatten().tolist()) for sample in labeled}
    assert seen == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}
    off = bare_trainer(STLUNetTrainer, pairs="independent")
    off.inference_allowed_mirroring_axes = (0, 1)
    batch = batch_of(x, strong=10 * x)
    assert off.mirrored(batch)[0] is batch.images


@pytest.mark.parametrize("pairs", ["alike", "independent"])
def test_the_loader_mirrors_unless_pairs_are_alike(pairs, ready):
    trainer = make_trainer(STLUNetTrainer, ready(dims=2, size=32), pairs=pairs)
    trainer.on_train_start()
    loader, alike = trainer.dataloader_train.data_loader, pairs == "alike"
    for transforms in (loader.labeled_loader.transforms, loader.unlabeled_loader.transforms.spatial):
        kinds = [type(t).__name__ for t in transforms.transforms]
        assert ("MirrorTransform" in kinds) != alike
        assert bool({"Recorded", "Replayed"} & set(kinds)) == alike
    assert trainer.inference_allowed_mirroring_axes == (0, 1)
    next(trainer.dataloader_train)
    assert not alike or not loader.labeled_loader.transforms.transforms[0].drawn


# -------------------------------------------------------------------------------------------------------- trainer


class Recording:
    """A network that keeps what `paired` gives to the decoder."""

    def __init__(self, settings):
        self.network = STLUNetTrainer.adapt_network(TRANSPARENT, settings, {}, False)

    def paired(self, *args):
        *halves, weights = self.network.paired(*args)
        self.given = [[self.network.decode(skips) for skips in half] for half in halves]
        return *halves, weights

    def decode(self, skips):
        return torch.ones(1, 2, 1, 1)


def recording_trainer(points=(0, 1, 2), **settings):
    """At the end of the ramp, with the transparent network."""
    trainer = bare_trainer(STLUNetTrainer, **settings)
    trainer.points, trainer.histogram = points, torch.zeros(len(points), 10)
    trainer.network = Recording(trainer.settings)
    return trainer


def given(trainer, labeled, unlabeled):
    """What a step of the trainer's method has its network give for the two halves: pairs of (B, 3, C, *S)."""
    terms_of(trainer, batch_of(labeled, torch.zeros(1, 1, 1, 1), strong=unlabeled))
    return trainer.network.given


def mixed_features(trainer):
    """After each stage, the labelled sample in the mixing stream: it is 1, and its partner 0."""
    one = torch.ones(1, 1, 1, 1)
    labeled, unlabeled = given(trainer, one, 0 * one)
    after = labeled[0].flatten().tolist()
    assert [1 - x for x in unlabeled[0].flatten().tolist()] == pytest.approx(after)
    return after


def test_a_scalar_weight_is_the_settings_or_drawn_with_their_beta(monkeypatch):
    monkeypatch.setattr("nnunet_semiseg.trainers.stlu_net.draw_beta", lambda b: torch.tensor(b / 10))
    fixed = recording_trainer((2,), mixing="scalar", mixing_weight=0.3)
    assert mixed_features(fixed) == pytest.approx([1, 1, 0.3])
    drawn = recording_trainer((0,), mixing="scalar", mixing_weight=0.3, mixing_beta=4.0)
    assert mixed_features(drawn) == pytest.approx([0.4, 0.4, 0.4])


def test_mixup_mixes_after_any_one_of_the_points_with_a_weight_from_its_beta(monkeypatch):
    monkeypatch.setattr("nnunet_semiseg.trainers.stlu_net.draw_beta", lambda b: torch.tensor(b / 10))
    torch.manual_seed(0)
    trainer = recording_trainer((0, 2), mixing="mixup", mixing_beta=2.0)
    seen = {tuple(round(x, 4) for x in mixed_features(trainer)) for _ in range(30)}
    assert seen == {(0.8, 0.8, 0.8), (1.0, 1.0, 0.8)}
    assert mixed_features(recording_trainer((0,), mixing="mixup")) == pytest.approx([0.9] * 3)  # Beta(1, 1)


def test_channel_dropout_is_the_settings():
    torch.manual_seed(0)
    trainer = recording_trainer((0,), channel_dropout=0.2)
    x = torch.ones(1, 1000, 1, 1)
    (_, dropped), _ = given(trainer, x, x)
    assert set(dropped[:, 0].unique().tolist()) == {0.0, 1.25}


class Saying:
    """A network that says what it is given: logits of two classes, for each half of each stream."""

    def __init__(self, *halves):
        self.halves = halves

    def paired(self, images, points, weight, mixed_at, samples):
        return *self.halves, []

    def decode(self, said):
        return said


def says(*p):
    """Logits of one sample, P(a) of each voxel."""
    p = torch.tensor(p)
    return torch.stack((1 - p, p)).log()[None, :, :, None].requires_grad_()


def terms_by_hand(halves, progress=1.0, **settings):
    """A step of one sample a stream, whose two labelled voxels are a and background."""
    trainer = bare_trainer(STLUNetTrainer, progress=progress, network=Saying(*halves), **settings)
    trainer.points, trainer.histogram = (0,), torch.zeros(1, 10)
    images = torch.zeros(1, 1, 2, 1)
    terms = terms_of(trainer, batch_of(images, torch.tensor([1, 0]).view(1, 1, 2, 1), strong=images))
    return {name: term.item() for name, term in terms.items()}


HALVES = (says(0.7, 0.4), says(0.55, 0.2)), (says(0.9, 0.6), says(0.8, 0.3))
"""of the mixing stream and of the other one, for the labelled sample and for the unlabelled one"""


def test_losses_by_hand():
    """Two voxels, with P(a) of 0.9 and 0.6 in the mixing stream's unlabelled half, of 0.8 and 0.3 in the other's."""
    supervised = {
        "supervised_mixing": -math.log(0.7 * 0.6) / 2,
        "supervised_enhancement": -math.log(0.55 * 0.8) / 2,
    }

    # labels: the mixing stream's a and a, the other's a and background
    def expected(gamma):
        return supervised | {
            "unsupervised_mixing": -gamma * math.log(0.9 * 0.4) / 2,
            "unsupervised_enhancement": -gamma * math.log(0.8 * 0.3) / 2,
        }

    assert terms_by_hand(HALVES, consistency_weight=0.5) == pytest.approx(expected(0.5), abs=1e-6)
    assert terms_by_hand(HALVES, progress=0.2) == pytest.approx(expected(math.exp(-1.25)), abs=1e-6)
    assert terms_by_hand(HALVES, progress=0.4) == pytest.approx(expected(1), abs=1e-6)
    paper = terms_by_hand(HALVES, progress=0.5, consistency="paper")
    assert paper == pytest.approx(expected(math.exp(-1.25)), abs=1e-6)
    # in both the first alone is sure: 0.9 and 0.6, 0.8 and 0.7
    sure = supervised | {
        "unsupervised_mixing": -0.5 * math.log(0.9) / 2,
        "unsupervised_enhancement": -0.5 * math.log(0.8) / 2,
    }
    terms = terms_by_hand(HALVES, consistency_weight=0.5, confidence_threshold=0.75)
    assert terms == pytest.approx(sure, abs=1e-6)
    # each voxel as much as the other stream is sure of it, and where that is less than 0.75 not at all
    soft = supervised | {
        "unsupervised_mixing": -0.5 * (0.8 * math.log(0.9) + 0.7 * math.log(0.4)) / 2,
        "unsupervised_enhancement": -0.5 * (0.9 * math.log(0.8) + 0.6 * math.log(0.3)) / 2,
    }
    for consistency in ("dice_ce", "paper"):
        about = dict(confidence="soft", consistency=consistency, consistency_weight=0.5)
        assert terms_by_hand(HALVES, **about) == pytest.approx(soft, abs=1e-6)
        of_sure = supervised | {
            "unsupervised_mixing": -0.5 * 0.8 * math.log(0.9) / 2,
            "unsupervised_enhancement": -0.5 * 0.9 * math.log(0.8) / 2,
        }
        assert terms_by_hand(HALVES, confidence_threshold=0.75, **about) == pytest.approx(of_sure, abs=1e-6)
    one = terms_by_hand(HALVES, consistency_weight=0.5, supervision="mixing")
    assert one == pytest.approx({k: v for k, v in expected(0.5).items() if k.endswith("mixing")}, abs=1e-6)


def test_a_pseudo_label_has_no_gradient():
    mixed, enhanced = says(0.9, 0.6), says(0.8, 0.3)
    network = Saying((says(0.7, 0.4), says(0.55, 0.2)), (mixed, enhanced))
    trainer = bare_trainer(STLUNetTrainer, network=network, memory="fast")  # where nothing ends at leaves
    trainer.points, trainer.histogram, images = (0,), torch.zeros(1, 10), torch.zeros(1, 1, 2, 1)
    terms = terms_of(trainer, batch_of(images, strong=images))
    for name, learns, labels in (("mixing", mixed, enhanced), ("enhancement", enhanced, mixed)):
        grads = torch.autograd.grad(terms[f"unsupervised_{name}"], [learns, labels], allow_unused=True)
        assert grads[0].abs().sum() > 0 and grads[1] is None


def test_losses_are_those_of_the_paper(ready):
    trainer = make_trainer(
        STLUNetTrainer, ready(dims=2, size=32), confidence_threshold=None, channel_dropout=0.0, consistency="paper",
        pairs="independent", largest_component="off",
    )  # fmt: skip
    trainer.on_train_start()
    trainer.step = 3  # of 6
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    images = torch.cat((batch.images, batch.views["strong"]))
    *halves, _ = trainer.network.paired(images, trainer.points)
    (p_ml, p_dl), (p_mu, p_du) = ([trainer.network.decode(skips) for skips in half] for half in halves)
    terms = terms_of(trainer, batch)
    gamma, loss = math.exp(-1.25), trainer.loss.loss
    expected = {
        "supervised_mixing": trainer.loss(p_ml, batch.target),
        "supervised_enhancement": trainer.loss(p_dl, batch.target),
        "unsupervised_mixing": gamma * loss(p_mu[0], p_du[0].argmax(1, keepdim=True)),
        "unsupervised_enhancement": gamma * loss(p_du[0], p_mu[0].argmax(1, keepdim=True)),
    }
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name])


OPTIONS = [
    dict(mixing="scalar", mixing_weight=0.3, skips="own"),
    dict(mixing="scalar", mixing_beta=0.5, mixing_groups="BI"),
    dict(mixing="mixup"),
    dict(mixing="dropblock", loss="dice", pairs="independent"),
    dict(mixing="off", channel_dropout=0, mixing_groups="S"),
    dict(supervision="mixing", confidence_threshold=0.6, confidence="soft"),
    dict(supervision="enhancement", loss="dice"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("kind", [dict(dims=2, size=32), dict(dims=3, regions=True)], ids=["2d", "3d regions"])
def test_every_option_trains(options, kind, ready):
    trainer = make_trainer(STLUNetTrainer, ready(**kind), **options)
    trainer.on_train_start()
    trainer.network.train()
    before = [p.detach().clone() for p in trainer.trainable]
    out = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(v) for v in out.values())
    only = options.get("supervision")
    expected = {f"{part}_{s}" for part in ("supervised", "unsupervised") for s in ("mixing", "enhancement")}
    assert set(out) - {"loss"} == {name for name in expected if only is None or name.endswith(f"_{only}")}
    assert any(not torch.equal(p, old) for p, old in zip(trainer.trainable, before, strict=True))
    assert trainer.finest_loss.weight_ce == (options.get("loss") != "dice")


def test_mixup_mixes_the_labels_too(monkeypatch):
    monkeypatch.setattr("nnunet_semiseg.trainers.stlu_net.draw_beta", lambda b: torch.tensor(0.2))
    terms = terms_by_hand(HALVES, mixing="mixup", consistency_weight=0.5)
    # a sample keeps the larger part of its own: 0.8
    assert terms["supervised_mixing"] == pytest.approx(-0.8 * math.log(0.7 * 0.6) / 2, abs=1e-6)
    # pseudo-labels are a and background, as the true labels happen to be
    own, of_labeled, of_true = 0.9 * 0.4, 0.7 * 0.6, 0.9 * 0.4
    expected = -0.5 * (0.8 * math.log(own) + 0.2 * (math.log(of_labeled) + math.log(of_true))) / 2
    assert terms["unsupervised_mixing"] == pytest.approx(expected, abs=1e-6)
    assert terms["supervised_enhancement"] == pytest.approx(-math.log(0.55 * 0.8) / 2, abs=1e-6)
    assert terms["unsupervised_enhancement"] == pytest.approx(-0.5 * math.log(0.8 * 0.3) / 2, abs=1e-6)


def test_mixup_of_another_label(monkeypatch):
    """As above, where the pseudo-labels are background and background, so that it matters which label is whose."""
    monkeypatch.setattr("nnunet_semiseg.trainers.stlu_net.draw_beta", lambda b: torch.tensor(0.2))
    halves = HALVES[0], (says(0.9, 0.6), says(0.1, 0.3))
    own, of_labeled, of_true = 0.1 * 0.4, 0.3 * 0.6, 0.9 * 0.4
    expected = -0.5 * (0.8 * math.log(own) + 0.2 * (math.log(of_labeled) + math.log(of_true))) / 2
    terms = terms_by_hand(halves, mixing="mixup", consistency_weight=0.5)
    assert terms["unsupervised_mixing"] == pytest.approx(expected, abs=1e-6)


def test_a_drawn_weight_lies_between_0_and_1():
    drawn = torch.stack([draw_beta(0.5) for _ in range(50)])
    assert ((0 <= drawn) & (drawn <= 1)).all() and drawn.std() > 0.2


def test_the_histogram_of_the_weights_is_logged(ready):
    trainer = make_trainer(STLUNetTrainer, ready(), mixing_groups="IB")
    trainer.run_training()
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    lines = re.findall(r"similarity weights after stage (\d), .*: ([\d. ]+)$", log, re.MULTILINE)
    assert [int(stage) for stage, _ in lines] == [1, 2] * 3  # I and B
    for _, shares in lines:
        values = [float(v) for v in shares.split()]
        assert len(values) == 10 and sum(values) == pytest.approx(1, abs=0.06)


def test_refusals(ready):
    dataset = ready()
    for settings, words in (
        (dict(unlabeled_batch_size=5), "unlabeled_batch_size=5: STLU-Net pairs each of the"),
        (dict(mixing_groups="SX"), "mixing_groups=SX: write some of the letters S, I and B"),
        (dict(mixing_groups=""), "mixing_groups=: write some of the letters S, I and B"),
        (dict(mixing_groups="SS"), "mixing_groups=SS: write some of the letters S, I and B"),
        (dict(mixing="cutmix"), "mixing=.cutmix.: must be similarity or scalar or mixup"),
        (dict(channel_dropout=1.0), "channel_dropout=1.0: must be a number from 0 to 0.99"),
    ):
        with pytest.raises(UserError, match=words):
            make_trainer(STLUNetTrainer, dataset, **settings)
    assert not dataset.results.exists()


def test_mixup_mixes_at_one_point_and_drops_channels_at_all(ready):
    trainer = make_trainer(STLUNetTrainer, ready(dims=2, size=32), mixing="mixup", memory="fast")
    trainer.on_train_start()
    dropped, mixed = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunet_semiseg.networks.feature_mixing.drop_channels", lambda x, p: (dropped.append(p), x)[1])
        patch.setattr("nnunet_semiseg.networks.feature_mixing.mix", lambda *args: (mixed.append(args), mix(*args))[1])
        trainer.network.train()
        trainer.train_step(next(trainer.dataloader_train))
    assert dropped == [0.5] * len(trainer.points) and len(trainer.points) > 1 and len(mixed) == 1


def test_streams_that_are_the_same_have_the_same_losses(ready):
    trainer = make_trainer(
        STLUNetTrainer, ready(dims=2, size=32), mixing="off", channel_dropout=0.0, pairs="independent"
    )
    trainer.on_train_start()
    trainer.network.train()
    losses, gradients = [], []
    batch = next(trainer.dataloader_train)
    for memory in ("stock", "fast"):
        trainer.settings = replace(trainer.settings, memory=memory)
        trainer.network.zero_grad()
        losses.append(trainer.backward(trainer.losses(Batch.from_loader(batch, trainer.device))))
        gradients.append([p.grad.clone() for p in trainer.network.parameters() if p.grad is not None])
    for terms in losses:
        torch.testing.assert_close(terms["supervised_mixing"], terms["supervised_enhancement"])
        torch.testing.assert_close(terms["unsupervised_mixing"], terms["unsupervised_enhancement"])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
