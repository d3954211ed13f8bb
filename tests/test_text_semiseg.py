"""Text-SemiSeg's formulas, on arrays small enough to work out by hand."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import make_trainer

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.pseudo_labels import hard_pseudo_label, probabilities
from nnunet_semiseg.losses.ramps import gaussian_ramp
from nnunet_semiseg.losses.text_alignment import category_alignment_loss
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegTrainer, mix

CLASSES = LabelManager({"background": 0, "a": 1, "b": 2}, None)
REGIONS = LabelManager({"background": 0, "both": (1, 2), "b": (2,)}, [1, 2])
REGIONS_IGNORE = LabelManager({"background": 0, "both": (1, 2), "b": (2,), "ignore": 3}, [1, 2])


def test_ramp():
    assert gaussian_ramp(0) == pytest.approx(math.exp(-5))
    assert gaussian_ramp(0.5) == pytest.approx(math.exp(-1.25))
    assert gaussian_ramp(1) == gaussian_ramp(2) == 1


def test_pseudo_labels_and_probabilities():
    logits = torch.tensor([[0.0, 3.0], [2.0, -1.0], [-1.0, 4.0]]).view(1, 3, 2).requires_grad_()
    label = hard_pseudo_label(logits, CLASSES)
    assert label.tolist() == [[[1, 2]]] and not label.requires_grad
    two = logits[:, :2]
    assert hard_pseudo_label(two, REGIONS).tolist() == [[[False, True], [True, False]]]
    assert hard_pseudo_label(two, REGIONS_IGNORE).tolist() == [[[False, True], [True, False], [False, False]]]
    torch.testing.assert_close(probabilities(logits, CLASSES).sum(1), torch.ones(1, 2))
    assert probabilities(two, REGIONS)[0, 0, 0].item() == 0.5


def test_alignment_by_hand():
    """Grid 2x1x1 of features e1, e2; class 0 sees the first voxel alone, class 1 both (weights 1 and 3)."""
    features = torch.eye(2).view(1, 2, 2, 1, 1)  # channel, voxel
    probs = torch.tensor([[1.0, 0.0], [0.2, 0.6]]).view(1, 2, 2, 1, 1)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # v_0 = e1: distance 0. v_1 = (0.2, 0.6) / 0.8 = (0.25, 0.75): (0.75)^2 + (0.75)^2 = 1.125
    assert category_alignment_loss(features, probs, text).item() == pytest.approx(1.125 / 2)


def test_alignment_averages_probabilities_down_to_the_features_grid():
    features = torch.eye(2).view(1, 2, 2, 1, 1)
    fine = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]).view(1, 1, 4, 2, 1)  # means 0.5 and 1
    # v = (0.5, 1) / 1.5; text e2: (1/3)^2 + (1/3)^2
    assert category_alignment_loss(features, fine, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(2 / 9)


def test_alignment_of_a_class_that_is_nowhere_is_finite():
    probs = torch.zeros(1, 1, 2, 1, 1)
    loss = category_alignment_loss(torch.eye(2).view(1, 2, 2, 1, 1), probs, torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(1.0)


def test_mix_keeps_every_class():
    mask = torch.tensor([True, False, True, False]).view(1, 1, 4)
    x, x_other = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4), torch.tensor([5.0, 6, 7, 8]).view(1, 1, 4)
    y, y_other = torch.tensor([2, 0, 1, 0]).view(1, 1, 4), torch.tensor([1, 2, 0, 0]).view(1, 1, 4)
    image, target = mix(mask, x, x_other, y, y_other)
    assert image.flatten().tolist() == [1, 6, 3, 8]
    assert target.flatten().tolist() == [2, 2, 1, 0]  # multiplying label by label would give 0 for 2 times 1


def foreground(target, label_manager):
    return TextSemiSegTrainer.foreground(SimpleNamespace(label_manager=label_manager), target)


def test_foreground():
    assert foreground(torch.tensor([[[0, 1, 2]]]), CLASSES).tolist() == [[[False, True, True]]]
    ignoring = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    assert foreground(torch.tensor([[[0, 1, 2]]]), ignoring).tolist() == [[[False, True, False]]]
    regions = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 1, 1]]])  # the last channel is the ignore mask
    assert foreground(regions, REGIONS_IGNORE).tolist() == [[[True, True, False]]]


def test_largest_component():
    trainer = SimpleNamespace(label_manager=CLASSES, settings=SimpleNamespace(largest_component=True))
    logits = torch.zeros(1, 3, 8, 8, 8)
    logits[:, 0] = 1
    logits[:, 1, 1:4, 1:4, 1:4] = 2  # 27 voxels of class 1
    logits[:, 1, 6, 6, 6] = 2  # and one apart
    logits[:, 2, 5:7, 1:3, 1] = 3  # class 2, four voxels: stays, as each class keeps its own
    label = TextSemiSegTrainer.pseudo_label(trainer, logits)
    assert label.shape == (1, 1, 8, 8, 8) and label.dtype == torch.int64
    assert [(label == k).sum().item() for k in (1, 2)] == [27, 4] and label[0, 0, 6, 6, 6] == 0


def test_largest_component_of_every_region():
    trainer = SimpleNamespace(label_manager=REGIONS, settings=SimpleNamespace(largest_component=True))
    logits = torch.full((1, 2, 8, 8, 8), -1.0)
    logits[:, :, 1:4, 1:4, 1:4] = 1  # 27 voxels of both regions
    logits[:, :, 6, 6, 6] = 1  # and one apart
    label = TextSemiSegTrainer.pseudo_label(trainer, logits)
    assert label.flatten(2).sum(2).tolist() == [[27, 27]]


@pytest.fixture
def dataset(ready):
    return ready()


def started(dataset, **settings):
    trainer = make_trainer(TextSemiSegTrainer, dataset, **settings)
    trainer.on_train_start()
    trainer.network.train()
    return trainer


@pytest.mark.parametrize(
    "settings, terms",
    [
        (dict(csa=False), ["mix", "unsupervised"]),
        (dict(dca="off"), ["cog", "unsupervised"]),
        (dict(tmr="off"), ["cog", "mix", "unsupervised"]),
        (dict(tmr="copy", csa=False, dca="off"), ["unsupervised"]),
    ],
)
def test_options(dataset, settings, terms):
    trainer = started(dataset, dca_start=0.0, **settings)
    out = trainer.train_step(next(trainer.dataloader_train))
    assert list(out) == ["loss", "supervised_1", "supervised_2", *terms]
    assert all(torch.isfinite(v) for v in out.values())


def test_dca_begins_when_it_should_and_teaches_the_decoder_with_the_higher_loss(dataset):
    trainer = started(dataset, dca_start=0.5)
    asked = []
    forward = trainer.network.forward

    def recording(x, text=None, decoders=None):
        asked.append(decoders)
        return forward(x, text, decoders)

    trainer.network.forward = recording
    batch = next(trainer.dataloader_train)
    outs = []
    for step in (2, 3, 4):
        trainer.step = step
        outs.append(trainer.train_step(batch))
    assert outs[0]["mix"] == 0 and outs[1]["mix"] != 0
    # the mixes go to the decoder whose loss was the higher one in the step before
    second_is_better = [bool(o["supervised_2"] < o["supervised_1"]) for o in outs]
    expected = [(0, 1)]
    for better in second_is_better[:2]:
        expected += [(0, 1), (0,) if better else (1,)]
    assert asked == expected


@pytest.mark.parametrize("dca", ["complementary", "foreground"])
def test_masks_of_the_mixes(dataset, dca):
    trainer = started(dataset, dca_start=0.0, dca=dca, csa=False)
    batch = next(trainer.dataloader_train)
    x_l, y_l, x_u = batch["data"], batch["target"][0], batch["unlabeled"]["strong"]
    y_u = torch.zeros_like(y_l)
    y_u[:, :, :4] = 2  # the pseudo-label: a slab
    mixed, targets = [], []
    forward, loss = trainer.network.forward, trainer.finest_loss.forward
    trainer.network.forward = lambda x, *args: (mixed.append(x), forward(x, *args))[1]
    trainer.finest_loss.forward = lambda output, target: (targets.append(target), loss(output, target))[1]
    trainer.text = trainer.prompt_learner()
    trainer.mix_loss(batch, y_u)
    (images,) = mixed
    n, m_l, m_u = len(x_l), y_l > 0, y_u > 0
    assert m_l.any() and (y_l == 0).any()
    assert torch.equal(images[:n], torch.where(m_l, x_l, x_u)) and torch.equal(targets[0], torch.where(m_l, y_l, y_u))
    if dca == "complementary":  # every voxel once, so that there is as much foreground as before
        torch.testing.assert_close(images[:n] + images[n:], x_l + x_u)
        assert torch.equal(targets[0] + targets[1], y_l + y_u)
    else:  # both hold the union
        assert torch.equal(images[n:], torch.where(m_u, x_u, x_l))
        assert torch.equal(targets[1], torch.where(m_u, y_u, y_l))
        assert torch.equal(targets[0] > 0, m_l | m_u) and torch.equal(targets[1] > 0, m_l | m_u)


def test_mixing_needs_an_unlabelled_sample_for_each_labelled_one(dataset):
    with pytest.raises(UserError, match="unlabeled_batch_size=1"):
        make_trainer(TextSemiSegTrainer, dataset, unlabeled_batch_size=1)
    assert not (dataset.results / f"TextSemiSegTrainer__nnUNetSemiSegSmallPlans__{dataset.configuration}").exists()
    make_trainer(TextSemiSegTrainer, dataset, unlabeled_batch_size=1, dca="off")


@pytest.mark.parametrize(
    "prompts, words",
    [
        ({"kidney": "a kidney", "tumour": "a tumour", "liver": "a liver"}, "liver"),
        ({"kidney": "a kidney"}, "tumour"),
        ({"kidney": "a kidney " * 20, "tumour": "a tumour"}, "kidney"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_and_nothing_is_written(dataset, prompts, words):
    dataset.update_dataset_json(semiseg={"prompts": prompts})
    shutil.copy(dataset.raw / "dataset.json", dataset.preprocessed / "dataset.json")
    with pytest.raises(UserError, match=words) as error:
        make_trainer(TextSemiSegTrainer, dataset)
    assert "\n" not in str(error.value) and not dataset.results.exists()


def test_prompts_that_changed_after_planning_are_refused(dataset):
    dataset.update_dataset_json(semiseg={"prompts": {"kidney": "a kidney in MRI", "tumour": "a tumour"}})
    with pytest.raises(UserError, match="its prompts are no longer those in .*: copy the file there"):
        make_trainer(TextSemiSegTrainer, dataset)
    shutil.copy(dataset.raw / "dataset.json", dataset.preprocessed / "dataset.json")
    make_trainer(TextSemiSegTrainer, dataset)


def test_exchanging_two_classes_text_changes_a_trained_networks_output(dataset):
    trainer = make_trainer(TextSemiSegTrainer, dataset, dca_start=0.0)
    trainer.run_training()
    network = trainer.network.eval()
    features = network.guidance.features
    torch.testing.assert_close(features, trainer.prompt_learner().detach())  # refreshed when it was saved
    x = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        before = network(x)[0]
        features.copy_(features[[0, 2, 1]])
        after = network(x)[0]
    assert (before - after).abs().max() > 1e-4
