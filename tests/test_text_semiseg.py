"""Text-SemiSeg's formulas, on arrays small enough to work out by hand."""

import math
import shutil

import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.ramps import gaussian_ramp
from nnunet_semiseg.losses.segmentation import hard_pseudo_label, probabilities
from nnunet_semiseg.losses.text_alignment import category_alignment_loss
from nnunet_semiseg.networks.multi_decoder import Encoded
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
    # v_0 = e1: distance 0. v_1 = (0.2, 0.6) / 0.8 = (0.25, 0.75): (0.75)^2 + (0.75)^2 = 1.125; of two channels
    assert category_alignment_loss(features, probs, text).item() == pytest.approx(1.125 / 2 / 2)


def test_alignment_averages_probabilities_down_to_the_features_grid():
    features = torch.eye(2).view(1, 2, 2, 1, 1)
    fine = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]).view(1, 1, 4, 2, 1)  # means 0.5 and 1
    # v = (0.5, 1) / 1.5; text e2: (1/3)^2 + (1/3)^2
    assert category_alignment_loss(features, fine, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(2 / 9 / 2)


def test_alignment_of_a_class_that_is_nowhere_is_finite():
    probs = torch.zeros(1, 1, 2, 1, 1)
    loss = category_alignment_loss(torch.eye(2).view(1, 2, 2, 1, 1), probs, torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(1.0 / 2)


def test_alignment_teaches_the_features_and_not_the_text():
    text, features = torch.tensor([[1.0, 0.0]]).requires_grad_(), torch.ones(1, 2, 2, 1, 1, requires_grad=True)
    category_alignment_loss(features, torch.ones(1, 1, 2, 1, 1), text).backward()
    assert features.grad.any() and text.grad is None


def test_mix_keeps_every_class():
    mask = torch.tensor([True, False, True, False]).view(1, 1, 4)
    x, x_other = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4), torch.tensor([5.0, 6, 7, 8]).view(1, 1, 4)
    y, y_other = torch.tensor([2, 0, 1, 0]).view(1, 1, 4), torch.tensor([1, 2, 0, 0]).view(1, 1, 4)
    image, target = mix(mask, x, x_other, y, y_other)
    assert image.flatten().tolist() == [1, 6, 3, 8]
    assert target.flatten().tolist() == [2, 2, 1, 0]  # multiplying label by label would give 0 for 2 times 1


def foreground(target, label_manager):
    return bare_trainer(TextSemiSegTrainer, label_manager).foreground(target)


def test_foreground():
    assert foreground(torch.tensor([[[0, 1, 2]]]), CLASSES).tolist() == [[[False, True, True]]]
    ignoring = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    assert foreground(torch.tensor([[[0, 1, 2]]]), ignoring).tolist() == [[[False, True, False]]]
    regions = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 1, 1]]])  # the last channel is the ignore mask
    assert foreground(regions, REGIONS_IGNORE).tolist() == [[[True, True, False]]]


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
    assert set(out) == {"loss", "supervised_1", "supervised_2", *terms}
    assert all(torch.isfinite(v) for v in out.values())


def test_dca_begins_when_it_should_and_teaches_the_decoder_with_the_higher_loss(dataset):
    trainer = started(dataset, dca_start=0.5)
    asked = []
    decode = trainer.network.decode

    def recording(skips, decoder=0):
        if torch.is_grad_enabled():
            asked.append(decoder)
        return decode(skips, decoder)

    trainer.network.decode = recording
    batch = next(trainer.dataloader_train)
    outs = []
    for step in (2, 3, 4):
        trainer.step = step
        outs.append(trainer.train_step(batch))
    assert outs[0]["mix"] == 0 and outs[1]["mix"] != 0
    # the mixes go to the decoder whose loss was the higher one in the step before
    second_is_better = [bool(o["supervised_2"] < o["supervised_1"]) for o in outs]
    both_streams = [0, 1, 0, 1]
    expected = list(both_streams)
    for better in second_is_better[:2]:
        expected += both_streams + [0 if better else 1] * 2  # the two mixes
    assert asked == expected


@pytest.mark.parametrize("dca", ["complementary", "foreground"])
def test_masks_of_the_mixes(dca):
    trainer = bare_trainer(TextSemiSegTrainer, CLASSES, dca=dca)
    # four voxels: both images have foreground in one of them, each alone in one
    x_l, x_u = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4, 1, 1), torch.tensor([5.0, 6, 7, 8]).view(1, 1, 4, 1, 1)
    y_l, y_u = torch.tensor([1, 1, 0, 0]).view(1, 1, 4, 1, 1), torch.tensor([2, 0, 2, 0]).view(1, 1, 4, 1, 1)
    more_unlabeled = torch.cat((x_u, x_u + 10)), torch.cat((y_u, y_u))  # which have no partner
    batch = batch_of(x_l, y_l, strong=more_unlabeled[0])
    mixes = [(x.flatten().tolist(), y.flatten().tolist()) for x, y in trainer.mixes(batch, more_unlabeled[1])]
    assert mixes[0] == ([1, 2, 7, 8], [1, 1, 2, 0])  # labelled foreground in the unlabelled image
    if dca == "complementary":  # every voxel once, so that there is as much foreground as before
        assert mixes[1] == ([5, 6, 3, 4], [2, 0, 0, 0])
    else:  # both hold the union
        assert mixes[1] == ([5, 2, 7, 4], [2, 1, 2, 0])


TWO = LabelManager({"background": 0, "a": 1}, None)


class OneVoxel:
    """Decoders whose logits of two classes are 0 and the image times a factor; the bottleneck is (1, 0)."""

    def __init__(self, *factors):
        self.factors = factors

    def encode(self, x, text):
        return Encoded([x], torch.cat((torch.ones_like(x), torch.zeros_like(x)), 1))

    def decode(self, skips, decoder):
        return torch.cat((torch.zeros_like(skips[0]), self.factors[decoder] * skips[0]), 1)


def one_voxel_batch():
    """A labelled sample of class a with the logit ln 2, and an unlabelled one with ln 3."""
    x_l, x_u = (torch.full((1, 1, 1, 1), math.log(odds), requires_grad=True) for odds in (2.0, 3.0))
    return batch_of(x_l, torch.ones(1, 1, 1, 1, dtype=torch.long), strong=x_u)


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def test_all_terms_by_hand():
    """One voxel a sample, of which both decoders say a, the second with three times the logit."""
    settings = dict(consistency_weight=0.4, ramp_length=1.0, dca_start=0.5, csa_weight=3.0, dca_weight=5.0)
    trainer = bare_trainer(TextSemiSegTrainer, TWO, progress=0.5, network=OneVoxel(1, 3), **settings)
    trainer.method_state = {"second_is_better": torch.tensor(False)}
    # to the text of class a the features are as near as can be, from the background's (0, 1) their distance is 2, of
    # two channels
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0]])

    def p(odds):
        return odds / (1 + odds)

    expected = {
        "supervised_1": -math.log(p(2)),
        "supervised_2": -math.log(p(2**3)),
        "unsupervised": 0.4 * math.exp(-1.25) * -(math.log(p(3)) + math.log(p(3**3))),
        "cog": 3 * 2 * (1 + 0) / 2,  # of two decoders the mean over the classes
        # the second decoder: the labelled image in place of the unlabelled one, and the other way round; and CSA
        "mix": 5 * ((-math.log(p(2**3)) - math.log(p(3**3))) / 2 + 3 * (1 + 0) / 2),
    }
    assert values(terms_of(trainer, one_voxel_batch(), text)) == pytest.approx(expected, abs=1e-5)
    assert trainer.method_state["second_is_better"]  # for the next step


@pytest.mark.parametrize("second_is_better", [False, True])
def test_decoders_teach_each_other_and_the_better_one_labels_the_mixes(second_is_better):
    """The second decoder says the opposite of the first."""
    trainer = bare_trainer(TextSemiSegTrainer, TWO, network=OneVoxel(1, -1), csa=False, consistency="paper")
    trainer.method_state = {"second_is_better": torch.tensor(second_is_better)}
    terms = values(terms_of(trainer, one_voxel_batch(), torch.eye(2)))
    # of the unlabelled voxel P(a) is 3/4 and 1/4: each is told what it gives 1/4
    assert terms["unsupervised"] == pytest.approx(0.1 * 2 * math.log(4), abs=1e-5)
    # of the labelled one, a, it is 2/3 and 1/3. The second learns a of both, or the first a and background
    expected = -math.log(2 / 3) - math.log(1 / 4) if second_is_better else -math.log(1 / 3) - math.log(1 / 4)
    assert terms["mix"] == pytest.approx(expected / 2, abs=1e-5) and "cog" not in terms
    assert not trainer.method_state["second_is_better"]


def test_cog_is_one_mean_over_both_streams():
    """A labelled sample and three unlabelled ones, each with a feature of its own."""
    trainer = bare_trainer(TextSemiSegTrainer, TWO, network=OneVoxel(1, 1), dca="off")
    trainer.network.encode = lambda x, text: Encoded([x], torch.cat((x, 1 - x), 1))
    trainer.method_state = {"second_is_better": torch.tensor(False)}
    x_l, x_u = torch.ones(1, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    batch = batch_of(x_l, torch.ones(1, 1, 1, 1, dtype=torch.long), strong=x_u)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # the labelled sample's feature; from the others' it is 2 away
    assert terms_of(trainer, batch, text)["cog"].item() == pytest.approx(2 * (1 * 0 + 3 * 1) / 4)


def test_pseudo_labels_have_deep_supervision_or_the_papers_loss():
    """The fine output says 0.8 of class a, the coarse one 0.6; weights are 2/3 and 1/3."""
    logits = [torch.tensor([0.0, math.log(p / (1 - p))]).view(1, 2, 1, 1, 1).expand(1, 2, n, n, n)
              for p, n in ((0.8, 4), (0.6, 2))]  # fmt: skip
    for consistency, expected in (("dice_ce", -(2 * math.log(0.8) + math.log(0.6)) / 3), ("paper", -math.log(0.8))):
        trainer = bare_trainer(TextSemiSegTrainer, TWO, consistency=consistency)
        trainer.loss = DeepSupervisionWrapper(trainer.loss, (2 / 3, 1 / 3))
        assert trainer.taught_loss(logits, torch.ones(1, 1, 4, 4, 4)).item() == pytest.approx(expected)


def test_default_settings():
    settings, paper = TextSemiSegTrainer.settings_class(), TextSemiSegTrainer.settings_class(consistency="paper")
    assert (settings.csa_weight, settings.dca_weight, settings.n_ctx, settings.weight(0.4)) == (1, 1, 4, 1)
    assert paper.weight(1) == 0.1 and paper.weight(0.5) == pytest.approx(0.1 * math.exp(-1.25))


@pytest.mark.parametrize("from_file", [False, True])
def test_a_text_that_does_not_learn(dataset, from_file, tmp_path):
    settings = {}
    if from_file:
        from nnunet_semiseg.text.prompt_learner import save_embeddings
        from nnunet_semiseg.text.prompts import read_prompts

        save_embeddings(tmp_path / "e.safetensors", torch.eye(3, 16), read_prompts(dataset.dataset_json), "none")
        settings["text_embeddings"] = str(tmp_path / "e.safetensors")
    trainer = started(dataset, dca_start=0.0, n_ctx=0, **settings)
    before = trainer.prompt_learner()
    assert not before.requires_grad and not set(trainer.trainable) & set(trainer.prompt_learner.parameters())
    out = trainer.train_step(next(trainer.dataloader_train))
    assert torch.equal(trainer.prompt_learner(), before) and torch.isfinite(out["loss"])


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
