import math

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import REGIONS, bare_trainer, make_trainer

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.networks import feature_perturbation as perturbation
from nnunet_semiseg.trainers.cct import PERTURBATIONS, CCTTrainer

X = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 2, 8, 8, 8)


def test_the_consistency_by_hand():
    """The main decoder says 1/2; one auxiliary decoder as well, another 0.8 and 0.2: (0 + 0.09) / 2."""
    same, other = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
    other[:, 0] = torch.logit(torch.tensor(0.8))
    loss = bare_trainer(CCTTrainer).semi_losses(None, (same, [same, other]), {})["consistency"]
    assert loss.item() == pytest.approx(0.1 * 0.09 / 2)


def test_the_weight_has_a_ramp():
    """0.2 is half of a ramp of 0.4: exp(-5 * 0.5^2)."""
    trainer = bare_trainer(CCTTrainer, progress=0.2, consistency_weight=2.0, ramp_length=0.4)
    main, other = torch.zeros(2, 1, 2, 8, 8, 8)
    other[:, 0] = torch.logit(torch.tensor(0.8))
    loss = trainer.semi_losses(None, (main, [other]), {})["consistency"]
    assert loss.item() == pytest.approx(2 * math.exp(-1.25) * 0.09)


def test_only_auxiliary_decoders_and_the_encoder_learn_from_unlabelled_samples(ready):
    trainer = make_trainer(CCTTrainer, ready())
    trainer.on_train_start()
    trainer.network.train()
    seen = {"encoder": [], "decoder": []}
    trainer.network.encoder.register_forward_hook(lambda m, x, y: seen["encoder"].append(len(x[0])))
    trainer.network.decoder.register_forward_hook(lambda m, x, y: seen["decoder"].append(len(x[0][-1])))
    batch = next(trainer.dataloader_train)
    labeled, (main, others) = trainer.forward_streams(batch)
    assert seen == {"encoder": [4], "decoder": [2, 2]}
    trainer.network.eval(), trainer.set_deep_supervision_enabled(False)
    unperturbed = trainer.network(torch.cat((batch["data"], batch["unlabeled"][trainer.student_view])))
    torch.testing.assert_close(torch.cat((labeled[0], main)), unperturbed)
    trainer.step = trainer.num_epochs * trainer.num_iterations_per_epoch
    trainer.semi_losses(labeled, (main, others), batch)["consistency"].backward()
    learn = {name for name, p in trainer.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in learn} == {"encoder", "other_decoders"}


@pytest.mark.parametrize("regions", [False, True])
def test_perturbed_are_unlabelled_features_by_their_own_foreground(regions):
    """The unlabelled samples' foreground is slices 2 and 3; features: labelled 1 and 2, unlabelled 3 and 4."""
    trainer = bare_trainer(CCTTrainer, REGIONS if regions else LabelManager({"background": 0, "a": 1, "b": 2}, None))
    inside = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    inside[:, 2:4] = True
    logits = torch.zeros(2, 2 if regions else 3, 8, 8, 8) - 3
    if not regions:
        logits[:, 0] = 0
    logits[:, -1][inside] = 3
    fine = torch.arange(1.0, 5).view(4, 1, 1, 1, 1).expand(4, 5, 8, 8, 8)
    skips = [fine, fine[..., ::2, ::2, ::2]]
    only = torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0])
    for name, expected in {"context_mask": only, "object_mask": 1 - only}.items():
        perturbed = trainer.perturb(name, 2, skips, [None, [logits]])
        for features, places in zip(perturbed, (expected, expected[::2]), strict=True):
            assert features.shape[:2] == (2, 5) and (features == features[:, :1, :, :1, :1]).all()
            assert torch.equal(features[:, 0, :, 0, 0], torch.stack((3 * places, 4 * places)))


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
    skips = [torch.ones(3, 400, 4, 4, 4), torch.ones(3, 400, 2, 2, 2)]
    for x in CCTTrainer.perturb(None, "dropout", 1, skips, []):
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
