import math

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import REGIONS, Echo, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.networks import feature_perturbation as perturbation
from nnunet_semiseg.networks.multi_decoder import Encoded
from nnunet_semiseg.trainers.cct import PERTURBATIONS, CCTTrainer
from nnunet_semiseg.training.batch import Batch

CLASSES_AND_B = LabelManager({"background": 0, "a": 1, "b": 2}, None)
X = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 2, 8, 8, 8)


def without_perturbation(monkeypatch, *args, decoders=1, **settings):
    """A trainer whose main decoder says the first channels of an image, each auxiliary one the next."""
    monkeypatch.setitem(PERTURBATIONS, "noise", lambda x: x)
    return bare_trainer(CCTTrainer, *args, network=Echo(1 + decoders), perturbations=("noise",) * decoders, **settings)


@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_the_consistency_by_hand(monkeypatch, consistency):
    """The main decoder says 1/2, so decides for 0; one auxiliary decoder as well, another 0.8 and 0.2: (0 + 0.09) / 2.

    By default: CE of 1/2 and of 0.8; and of the labels, 0, that of the decoder whose turn it is.
    """
    same, other = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
    other[:, 0] = torch.logit(torch.tensor(0.8))
    images = torch.cat((same, same, other), 1)
    trainer = without_perturbation(monkeypatch, decoders=2, consistency=consistency)
    terms = {name: term.item() for name, term in terms_of(trainer, batch_of(images, strong=images)).items()}
    expected = {"supervised": math.log(2), "consistency": 30 * 0.09 / 2}
    if consistency == "dice_ce":
        expected |= {"supervised_other": -math.log(0.8), "consistency": (math.log(2) - math.log(0.8)) / 2}
        trainer.step = 0
        terms_before = terms_of(trainer, batch_of(images, strong=images))
        assert terms_before["supervised_other"].item() == pytest.approx(math.log(2))
    assert terms == pytest.approx(expected)


def test_default_settings():
    settings, paper = CCTTrainer.settings_class(), CCTTrainer.settings_class(consistency="paper")
    assert [settings.weight(t) for t in (0.4, 1)] == [1, 1] and [paper.weight(t) for t in (0.1, 1)] == [30, 30]


def test_the_weight_has_a_ramp(monkeypatch):
    """0.2 is half of a ramp of 0.4: exp(-5 * 0.5^2)."""
    settings = dict(consistency="paper", consistency_weight=2.0, ramp_length=0.4)
    trainer = without_perturbation(monkeypatch, progress=0.2, **settings)
    main, other = torch.zeros(2, 1, 2, 8, 8, 8)
    other[:, 0] = torch.logit(torch.tensor(0.8))
    images = torch.cat((main, other), 1)
    loss = terms_of(trainer, batch_of(images, strong=images))["consistency"]
    assert loss.item() == pytest.approx(2 * math.exp(-1.25) * 0.09)


def test_only_auxiliary_decoders_and_the_encoder_learn_from_unlabelled_samples(ready):
    trainer = make_trainer(CCTTrainer, ready())
    trainer.on_train_start()
    trainer.network.train()
    trainer.step = trainer.num_epochs * trainer.num_iterations_per_epoch
    seen = {"encoder": [], "decoder": []}
    outputs = []
    bottleneck = trainer.network.encoder.stages[-1]  # the first stage runs again in the backward pass
    bottleneck.register_forward_hook(lambda m, x, y: seen["encoder"].append(len(x[0])))
    trainer.network.decoder.register_forward_hook(lambda m, x, y: seen["decoder"].append(len(x[0][-1])))
    trainer.network.decoder.register_forward_hook(lambda m, x, y: outputs.append(y[0].detach()))
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    groups = trainer.losses(batch)
    next(groups)["supervised"].backward()
    assert "supervised_other" in next(groups) and "consistency" in (group := next(groups))
    trainer.network.zero_grad()
    sum(group.values()).backward()
    trainer.backward(groups)
    assert seen == {"encoder": [2, 2], "decoder": [2, 2]}  # each stream once
    trainer.network.eval(), trainer.set_deep_supervision_enabled(False)
    unperturbed = trainer.network(torch.cat((batch.images, batch.views["strong"])))
    torch.testing.assert_close(torch.cat(outputs[:2]), unperturbed)
    learn = {name for name, p in trainer.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in learn} == {"encoder", "other_decoders"}


class TwoLevels(Echo):
    """Features on two levels are of the image's last channel; the main decoder says the others.

    An auxiliary decoder keeps what it reads.
    """

    def __init__(self):
        self.read = []

    def encode(self, x, text=None):
        fine = x[:, -1:].expand(-1, 5, -1, -1, -1)
        return Encoded([fine, fine[..., ::2, ::2, ::2], x[:, :-1]], None)

    def decode(self, skips, decoder=0):
        if decoder:
            self.read.append(skips[:2])
        return skips[2]


@pytest.mark.parametrize("regions", [False, True])
def test_perturbed_are_unlabelled_features_by_their_own_foreground(regions):
    """The unlabelled samples' foreground is slices 2 and 3; features: labelled 1 and 2, unlabelled 3 and 4."""
    names = ("context_mask", "object_mask")
    trainer = bare_trainer(
        CCTTrainer, REGIONS if regions else CLASSES_AND_B, network=(network := TwoLevels()), perturbations=names
    )
    heads = 2 if regions else 3
    inside = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    inside[:, 2:4] = True
    logits = torch.zeros(2, heads, 8, 8, 8) - 3
    if not regions:
        logits[:, 0] = 0
    logits[:, -1][inside] = 3
    labeled, unlabeled = (
        torch.cat((x, torch.tensor(values).view(2, 1, 1, 1, 1).expand(2, 1, 8, 8, 8)), 1)
        for x, values in ((-logits, [1.0, 2]), (logits, [3.0, 4]))
    )
    target = torch.zeros(2, heads if regions else 1, 8, 8, 8)
    terms_of(trainer, batch_of(labeled, target, strong=unlabeled))
    only = torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0])
    # it is the second decoder's turn to learn from labels; the labelled samples are called foreground everywhere
    expected = [(1, 0 * only), (3, only), (3, 1 - only)]
    assert len(network.read) == 3
    for perturbed, (value, kept) in zip(network.read, expected, strict=True):
        for features, places in zip(perturbed, (kept, kept[::2]), strict=True):
            assert features.shape[:2] == (2, 5) and (features == features[:, :1, :, :1, :1]).all()
            assert torch.equal(features[:, 0, :, 0, 0], torch.stack((value * places, (value + 1) * places)))


def test_noise_is_in_proportion_and_bounded():
    noisy = perturbation.feature_noise(X.repeat(2, 1, 1, 1, 1))
    assert torch.equal(noisy[0], noisy[1]) and (noisy[:, :, 0] == 0).all()
    ratio = noisy[:, :, 1:] / X[:, :, 1:]
    assert 0.7 <= ratio.min() < 0.75 and 1.25 < ratio.max() <= 1.3


def test_drop_takes_the_most_active_places():
    """Attention is 0 to 1 in steps of 1/100: a threshold of 0.6 to 0.9 keeps the first 60 to 90 of 101 places."""
    x = torch.arange(101.0).view(1, 1, 101, 1).expand(1, 2, 101, 2)
    numbers = []
    for _ in range(200):
        kept = (perturbation.feature_drop(x) == x).all(1).all(2)[0]
        numbers.append(int(kept.sum()))
        assert kept[: numbers[-1]].all()
    assert 60 <= min(numbers) < 65 and 85 < max(numbers) <= 90


def test_dropout_takes_half_of_the_channels_on_every_level():
    network = Echo()
    network.encode = lambda x: Encoded(
        [x.expand(-1, 400, -1, -1, -1), x[..., :2, :2, :2].expand(-1, 400, -1, -1, -1)], 0
    )
    network.decode = lambda skips, decoder=0: (read.append(skips), torch.zeros(len(skips[0]), 2, 4, 4, 4))[1]
    read, x = [], torch.ones(2, 1, 4, 4, 4)
    terms_of(bare_trainer(CCTTrainer, network=network, perturbations=("dropout",)), batch_of(x, strong=x))
    for x in read[-1]:
        assert x.shape[:2] == (2, 400) and (x == x[..., :1, :1, :1]).all()
        assert x.unique().tolist() == [0, 2]  # of 1 / (1 - 0.5)
        assert 0.4 < (x > 0).float().mean() < 0.6


def test_masks_of_object_and_context():
    foreground = torch.zeros(1, 1, 16, 16, 16, dtype=torch.bool)
    foreground[:, :, 4:8] = True  # slices 2 and 3 of 8
    without, only = perturbation.mask_object(X, foreground), perturbation.mask_context(X, foreground)
    assert torch.equal(without + only, X)
    assert only[0, 0, :, 0, 0].tolist() == [0, 0, 2, 3, 0, 0, 0, 0]


def test_cutout_stays_within_the_object():
    """The object is 5 voxels long on every axis: a box of 0.4 of it is 2 long, and lies elsewhere in each sample."""
    x = torch.ones(60, 1, 8, 8, 8)
    foreground = torch.zeros(60, 1, 8, 8, 8, dtype=torch.bool)
    foreground[:, :, 2:7, 1:6, 3:8] = True
    cut = perturbation.guided_cutout(x, foreground) == 0
    assert not (cut & ~foreground).any()
    places = torch.stack([sample[0].nonzero() for sample in cut])  # fails unless all boxes have one size
    first, last = places.amin(1), places.amax(1)
    assert places.shape[1] == 8 and (last - first == 1).all()
    assert len(first.unique(dim=0)) > 10 and all(len(axis.unique()) > 2 for axis in first.T)
    assert (perturbation.guided_cutout(x, foreground & False) == 1).all()  # no object, no box


@pytest.mark.parametrize("ndim", [2, 3])
def test_every_perturbation_trains(ready, ndim):
    trainer = make_trainer(
        CCTTrainer, ready(dims=ndim, size=32 if ndim == 2 else 24), perturbations=sorted(PERTURBATIONS)
    )
    trainer.on_train_start()
    trainer.network.train()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert torch.isfinite(out["loss"]) and len(trainer.network.other_decoders) == len(PERTURBATIONS)
    assert out["consistency"] > 0


def test_unknown_perturbations_are_refused(ready):
    with pytest.raises(UserError, match="perturbations=.'vat'.: must be one or more of noise, drop"):
        make_trainer(CCTTrainer, ready(), perturbations=["vat"])
