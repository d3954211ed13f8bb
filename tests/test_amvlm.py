"""AMVLM's second stage: PAMR, text masks, sides, texts that are missing or wrong."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import bare_trainer, batch_of, make_trainer, nnunet_loss, settings_for, terms_of, write_vlm

from nnunet_semiseg.data.texts import read_texts
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.segmentation import soft_label_loss
from nnunet_semiseg.trainers.amvlm import AMVLMSettings, AMVLMTrainer
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.vlm.gate import Quality, evidence, examples_of, measure, with_evidence
from nnunet_semiseg.vlm.model import to_tower
from nnunet_semiseg.vlm.pamr import neighbours, refine
from nnunet_semiseg.vlm.pretrained import load_vlm
from nnunet_semiseg.vlm.sides import NamedSides, axes_of_sides, exchange, is_flat, named_sides
from nnunet_semiseg.vlm.slices import draw_slices
from nnunet_semiseg.vlm.text_labels import TextLabels, with_background
from nnunet_semiseg.vlm.text_mask_generator import (
    TextMaskGenerator,
    UpBlock,
    area_prior,
    collect,
    contrast_between_classes,
    contrast_between_images,
    raw_masks,
    variation,
)
from nnunet_semiseg.vlm.training_texts import CaseTexts, ClassTexts

CLASSES = LabelManager({"background": 0, "a": 1, "b": 2}, None)
REGIONS = LabelManager({"background": 0, "both": (1, 2), "b": (2,)}, [1, 2])
PAIRS = AMVLMSettings().side_pairs
KEPT = (False, False)
"""no flip"""
NO_SIDES = NamedSides({}, (), PAIRS)


# ----------------------------------------------------------------------------------------------------------- PAMR


def test_neighbours_are_all_but_the_pixel_itself():
    x = torch.arange(25.0).view(1, 1, 5, 5)
    around = neighbours(x, [1, 2])
    assert around.shape == (1, 1, 16, 5, 5)
    assert around[0, 0, :, 2, 2].tolist() == [6, 7, 8, 11, 13, 16, 17, 18, 0, 2, 4, 10, 14, 20, 22, 24]
    assert around[0, 0, :8, 0, 0].tolist() == [0, 0, 1, 0, 1, 5, 5, 6]  # the border is repeated


def test_a_mask_moves_to_the_edge_of_the_image():
    """An edge at column 12; the mask ends at column 9, and after PAMR at the edge."""
    image, mask = torch.zeros(1, 1, 24, 24), torch.zeros(1, 1, 24, 24)
    image[..., 12:] = 1
    mask[..., 9:] = 1
    refined = refine(mask, image, dilations=(1, 2, 4))
    columns = refined[0, 0, 4:-4].mean(0)
    assert columns[12:].min() > 0.99  # beyond the edge all stays
    assert columns[9:12].max() < 0.7 and (columns[9:12] < 1).all()  # what had crossed it is taken back
    assert columns[:2].max() < 0.3
    assert 0 <= refined.min() and refined.max() <= 1 + 1e-5


def test_the_dilations_are_the_papers():
    torch.manual_seed(0)
    masks, images = torch.rand(1, 1, 56, 56), torch.rand(1, 1, 56, 56)
    refined = refine(masks, images)
    assert refined.equal(refine(masks, images, iterations=10, dilations=(1, 2, 4, 8, 12, 24)))


def test_a_flat_image_gives_each_neighbour_the_same_weight():
    mask = torch.rand(1, 2, 8, 8)
    once = refine(mask, torch.ones(1, 1, 8, 8), iterations=1, dilations=(1,))
    torch.testing.assert_close(once, neighbours(mask, [1]).mean(2))


# ------------------------------------------------------------------------------------------------------ text masks


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load_vlm(write_vlm(tmp_path_factory.mktemp("vlm") / "vlm"))


def test_the_towers_are_frozen_and_stay_in_eval_mode(vlm):
    generator = TextMaskGenerator(vlm).train()
    assert not any(m.training for m in generator.tower.modules())
    assert not any(p.requires_grad for p in generator.tower.parameters())
    assert not any("visual" in key or "text" in key for key in generator.state_dict())


def test_masks_are_probabilities_that_span_0_to_1_and_use_the_refined_mask(vlm, monkeypatch):
    generator = TextMaskGenerator(vlm)
    images = torch.randn(2, 1, 40, 40)
    texts = generator.encode_texts(["a lesion", "a kidney"])[:, None]
    # features that are all that the text says, or its opposite
    said = texts[:, 0, :, None, None].expand(-1, -1, 16, 8)
    monkeypatch.setattr(generator, "features", lambda x: torch.cat((said, -said), 3))
    raw, masks, _ = generator(images, texts)
    sigmoid = 1 / (1 + torch.exp(torch.tensor(-7.5)))
    torch.testing.assert_close(raw[0, 0, 0, 0], sigmoid)
    assert raw.min() < 1e-5 and raw.max() > 0.999
    assert masks.shape == (2, 1, 40, 40) and masks.min() < 0.05 and masks.max() > 0.9 and not masks.requires_grad
    monkeypatch.setattr("nnunet_semiseg.vlm.text_mask_generator.refine", lambda mask, image: torch.zeros_like(mask))
    without = generator(images, texts)[1]
    torch.testing.assert_close(without.max(), 0.3 * sigmoid, atol=1e-3, rtol=0)


def test_relative_masks_by_hand(vlm):
    cosine = torch.tensor([0.1, 0.2, 0.3, 0.6]).view(1, 1, 2, 2)  # mean 0.3, spread sqrt(0.14 / 3)
    z = (cosine - 0.3) / math.sqrt(0.14 / 3)
    torch.testing.assert_close(raw_masks(cosine, True), z.sigmoid())
    torch.testing.assert_close(raw_masks(0.1 * cosine - 0.5, True), z.sigmoid())  # wherever cosines are
    assert (raw_masks(torch.full((1, 1, 2, 2), 0.7), True) == 0.5).all()
    images, texts = torch.randn(2, 1, 40, 40), torch.nn.functional.normalize(torch.randn(2, 1, 16), dim=2)
    relative, absolute = (TextMaskGenerator(vlm, relative=r)(images, texts)[0] for r in (True, False))
    assert not torch.allclose(relative, absolute)


def test_the_first_masks_are_the_towers_own(vlm):
    block = UpBlock(16)
    x = torch.randn(2, 16, 3, 5)
    assert torch.equal(block(x), torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"))
    block(x).square().sum().backward()  # and they are learnt from there
    assert block.convolve.weight.grad.abs().sum() > 0


def test_each_image_has_its_own_text(vlm):
    generator = TextMaskGenerator(vlm)
    images = torch.randn(1, 1, 40, 40).repeat(2, 1, 1, 1)
    texts = generator.encode_texts(["one round lesion", "a kidney"])
    raw = generator(images, texts[:, None])[0]
    assert not torch.allclose(raw[0], raw[1])
    alone = generator(images[:1], texts[:1, None])[0]
    torch.testing.assert_close(raw[:1], alone)  # the other image's text does not matter


def test_no_image_becomes_black(vlm):
    about = vlm.visual.preprocess_cfg
    mean, std = (torch.tensor(about[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for scale, shift in ((1, 0), (0.01, -40), (300, 900)):
        x = torch.randn(1, 1, 40, 40)
        taken = to_tower(scale * x + shift, about, (32, 32)) * std + mean
        torch.testing.assert_close(taken, to_tower(x, about, (32, 32)) * std + mean, atol=1e-3, rtol=0)
        assert 0 <= taken.min() and taken.max() <= 1 and taken.std() > 0.05
        assert taken.mean().item() == pytest.approx(0.5, abs=0.05)


def test_contrast_between_images_by_hand():
    """Extended InfoNCE: each image pooled under the mask of every text, in both directions."""
    features = torch.eye(2).view(1, 2, 1, 2).repeat(3, 1, 1, 1)  # pixel 0 is e1, pixel 1 is e2
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])  # the third is of no image of this batch
    own = torch.tensor([0, 1, 0])  # the third image has the first one's text
    # of each image the pixel that each text's mask is on
    on = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1]])
    raw = torch.nn.functional.one_hot(on, 2).float().unsqueeze(2)
    assert collect(raw, features)[0].tolist() == [[1, 0], [0, 1], [0, 1]]
    # similarity of what is pooled under text j's mask, and text j: e1 gives 1, 0, 0.6, and e2 gives 0, 1, 0.8
    s = [[1, 1, 0.8], [0, 1, 0.6], [1, 0, 0.8]]

    def nce(own, *others):
        return -math.log(math.exp(2 * own) / (math.exp(2 * own) + sum(math.exp(2 * x) for x in others)))

    to_text = nce(1, 1, 0.8) + nce(1, 0, 0.6) + nce(1, 0, 0.8)
    # text 0 of image 0 among images 0 and 1; text 1 of image 1 among all; text 0 of image 2 among 1 and 2
    to_image = nce(s[0][0], s[1][0]) + nce(s[1][1], s[0][1], s[2][1]) + nce(s[2][0], s[1][0])
    found = contrast_between_images(raw, features, texts, own, 2.0)
    assert found.item() == pytest.approx((to_text / 3 + to_image / 3) / 2, abs=1e-5)


def test_contrast_between_classes_by_hand():
    features = torch.eye(2).view(1, 2, 1, 2)
    raw = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)  # the class is pixel 1, so that the background is pixel 0
    # background pools e1, the class e2: e1 is 0.8 and 0 like the texts (background, class), e2 is 0.6 and 1
    texts, background = torch.tensor([[0.0, 1.0]]), torch.tensor([0.8, 0.6])
    rows = -math.log(math.exp(0.8) / (math.exp(0.8) + 1)) - math.log(math.exp(1) / (math.exp(1) + math.exp(0.6)))
    columns = -math.log(math.exp(0.8) / (math.exp(0.8) + math.exp(0.6))) - math.log(math.exp(1) / (math.exp(1) + 1))
    found = contrast_between_classes(raw, features, texts, background, 1.0)
    assert found.item() == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_priors_by_hand():
    raw = torch.tensor([[[0.2, 0.4], [0.6, 0.8]], [[0.1, 0.1], [0.3, 0.3]]]).unsqueeze(0)  # one image, two texts
    # the own text's mean is 0.5, 0.1 from the prior; the other's 0.2
    assert area_prior(raw, torch.tensor([0])).item() == pytest.approx(0.1 + 0.2)
    assert area_prior(raw, torch.tensor([1])).item() == pytest.approx(0.2 + 0.5)
    assert area_prior(raw[:, :1], torch.tensor([0])).item() == pytest.approx(0.1)  # there is no other
    # down 0.4, 0.4, across 0.2, 0.2
    assert variation(raw[0, 0]).item() == pytest.approx(0.4 + 0.2)


def test_the_generators_loss_is_contrast_and_a_tenth_of_the_priors(vlm):
    torch.manual_seed(0)
    generator = TextMaskGenerator(vlm, temperature=0.5)
    assert generator.scale.item() == pytest.approx(2)
    generator.log_scale.data.fill_(9.0)
    assert generator.scale.item() == 100  # exp(9) is too much
    generator.log_scale.data.fill_(math.log(2))
    features = torch.nn.functional.normalize(torch.randn(2, 16, 4, 4), dim=1)
    texts, own = torch.nn.functional.normalize(torch.randn(3, 16), dim=1), torch.tensor([2, 0])
    raw = raw_masks(torch.einsum("bdhw,nd->bnhw", features, texts), False)
    contrast = contrast_between_images(raw, features, texts, own, 2.0)
    priors = area_prior(raw, own) + variation(torch.stack((raw[0, 2], raw[1, 0])))
    torch.testing.assert_close(
        generator.loss_between_images(features, texts, own)[None], (contrast + 0.1 * priors)[None]
    )
    classes = contrast_between_classes(raw, features, texts, texts[0], 2.0) + 0.1 * variation(raw)
    torch.testing.assert_close(generator.loss_between_classes(features, raw, texts, texts[0]), classes)


# --------------------------------------------------------------------------------------------------------- the gate


def test_the_quality_of_masks_by_hand():
    masks = [np.array([[0.9, 0.1], [0.5, 0.6]]), np.array([[0.2, 0.7], [0.4, 0.0]]), np.zeros((2, 2))]
    labels = [np.array([[1, 0], [0, 1]], bool), np.array([[0, 1], [1, 1]], bool), np.zeros((2, 2), bool)]
    known = [np.ones((2, 2), bool), np.array([[1, 1], [1, 0]], bool), np.ones((2, 2), bool)]
    # case 0: 0.9 and 0.6 are above 0.1 and 0.5; case 1, without its last pixel: 0.7 and 0.4 above 0.2; case 2 has none
    quality = measure(masks, labels, known)
    assert quality.area == 1
    # above 0.2 to 0.4: 3 pixels of case 0 for 2, and both of case 1: (4 / 5 + 1) / 2; above 0.5: 1 and 2 / 3
    assert quality.dice == pytest.approx(0.9) and 0.2 <= quality.threshold < 0.4
    wrong = measure([-masks[0]], labels[:1], known[:1])
    assert wrong.area == 0
    nothing = measure(masks[2:], labels[2:], known[2:])
    assert math.isnan(nothing.area) and nothing.threshold == 0.5


def test_examples_are_the_slices_that_show_most():
    image = np.arange(24.0).reshape(1, 3, 2, 4)
    label = np.zeros((1, 3, 2, 4), int)
    label[0, 0], label[0, 2, 0], label[0, 1, 0, 0] = 3, [1, 2, 0, -1], 1  # slice 0 is unknown
    data = SimpleNamespace(load_case=lambda case: (image, label))
    (example,) = examples_of(data, ["a"], [(1, 2), 2], 3)
    assert np.array_equal(example.image, image[:, 2]) and example.known.all()
    assert example.labels[0].sum() == 2 and np.argwhere(example.labels[1]).tolist() == [[0, 1]]
    assert len(examples_of(data, list("abcdefghijklmnopqrstuvwxyz" * 2), [1], 3)) == 13  # every fourth of 52


def with_gate(area, trainer, monkeypatch):
    """The gate after a measurement that says this area."""
    said = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *words: said.append(" ".join(words)))
    monkeypatch.setattr("nnunet_semiseg.vlm.text_labels.measure", lambda *_: Quality(area, 0.4, 0.7))
    trainer.measure_masks()
    state = {name: trainer.method_state[name].tolist() for name in ("mask_used", "mask_threshold")}
    return state, "".join(said)


def test_masks_below_the_gate_are_not_used_and_the_log_says_so(ready, monkeypatch):
    trainer = started(ready(dims=2, size=32))
    state, said = with_gate(0.59, trainer, monkeypatch)
    assert state["mask_used"] == [0, 0] and "kidney 0.59 (below 0.6: not used), tumour 0.59 (below" in said
    state, said = with_gate(0.61, trainer, monkeypatch)
    assert state == {"mask_used": [1, 1], "mask_threshold": pytest.approx([0.4, 0.4])}
    assert "kidney 0.61 (used above 0.40, Dice 0.70)" in said
    assert with_gate(float("nan"), trainer, monkeypatch)[0]["mask_used"] == [0, 0]  # no labelled case shows it


def test_without_texts_of_labelled_cases_nothing_can_be_measured(lesions, monkeypatch):
    trainer = started(lesions("a lesion"))  # the unlabelled cases have one
    assert trainer.examples == []
    state, said = with_gate(0.9, trainer, monkeypatch)
    assert state["mask_used"] == [0] and "no labelled case has a text" in said
    trusting = started(lesions("a lesion", dataset_id=902), mask_gate=0)
    assert with_gate(0.9, trusting, monkeypatch)[0] == {"mask_used": [1], "mask_threshold": [0.5]}


def test_labels_by_the_texts_by_hand():
    """Two classes of which one is used: above its threshold it is there, and of the other the teacher's word counts."""
    labels = TextLabels(2, "hard", 0.6, CLASSES)
    labels.state |= {"mask_used": torch.tensor([1.0, 0.0]), "mask_threshold": torch.tensor([0.3, 0.5])}
    masks = torch.tensor([[0.4, 0.9], [0.2, 0.9]]).view(2, 2, 1, 1)  # two images of a pixel
    taught = torch.tensor([[0.7, 0.1, 0.2]]).expand(2, -1).view(2, 3, 1, 1)
    found = labels(masks, torch.tensor([True, True]), taught)
    # image 0: a is there (1), b 0.2: background 0; image 1: a is not, b 0.2, background 0.8
    torch.testing.assert_close(found.flatten(1), torch.tensor([[0, 1 / 1.2, 0.2 / 1.2], [0.8, 0.0, 0.2]]))
    assert torch.equal(labels(masks, torch.tensor([True, False]), taught)[1], taught[1])
    labels.state["mask_used"].zero_()
    assert labels(masks, torch.tensor([True, True]), taught) is None


def test_what_a_mask_is_worth_by_hand():
    """Of pixels at 0.25 a quarter is labelled, of those at 0.75 all but a quarter, of all one half: its logit is 0."""
    masks, labels = np.repeat([0.25, 0.75], 4), np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    known = np.ones(8, bool)
    table = evidence([masks], [labels], [known])
    assert table.shape == (65,) and table[16] == pytest.approx(-math.log(3)) == -table[48] and abs(table[32]) < 1e-6
    assert not evidence([masks], [labels & False], [known]).any() and not evidence([masks * 0], [labels], [known]).any()
    # odds of 1 and 3 to 1 become 3 and 9 to 1; halfway between two values is halfway between what they say
    table = torch.linspace(0, 2 * math.log(3), 65)
    p = with_evidence(torch.tensor([0.5, 0.75, 0.5]), torch.tensor([0.5, 0.5, 0.5 + 1 / 128]), table)
    torch.testing.assert_close(p, torch.tensor([0.75, 0.9, 1 / (1 + 3 ** -(1 + 1 / 64))]))


def test_evidence_moves_the_teachers_probabilities():
    labels = TextLabels(2, "evidence", 0.6, CLASSES)
    tables = torch.stack([torch.linspace(-math.log(4), math.log(4), 65), torch.ones(65)])
    labels.state |= {"mask_used": torch.tensor([1.0, 0.0]), "mask_evidence": tables}
    taught = torch.tensor([[0.3, 0.5, 0.2]]).view(1, 3, 1, 1)
    found = labels(torch.tensor([1.0, 1.0]).view(1, 2, 1, 1), torch.tensor([True]), taught)
    # the first class has 4 to 1 now, the second, which is not used, keeps 0.2; background (1 - 0.8) (1 - 0.2)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.16, 0.8, 0.2]) / 1.16)


def test_with_towers_that_know_nothing_it_is_a_mean_teacher(ready):
    """The towers are random: masks find labels by chance, the gate closes, and the teacher's terms are all there is."""
    dataset = ready(dims=2, size=32, labeled=4)
    trainer = started(dataset, mask_labels="hard")
    for example in trainer.examples:  # whatever a random tower is drawn to, these labels have nothing to do with it
        example.labels[:] = np.random.default_rng(0).random(example.labels.shape) < 0.3
    trainer.measure_masks()
    assert trainer.method_state["mask_used"].tolist() == [0, 0]
    off = dict(text_supervision=False, average_supervision=False, mask_weight=0)
    alone = make_trainer(AMVLMTrainer, dataset, mask_labels="hard", **off)
    alone.initialize()
    alone.network.load_state_dict(trainer.network.state_dict())
    alone.teacher.load_state_dict(trainer.teacher.state_dict())
    trainer.step = alone.step = 6
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    terms, teachers = (t.backward(t.losses(batch)) for t in (trainer, alone))
    assert terms["text"] == terms["average"] == 0 and terms["teacher"] == teachers["teacher"] != 0
    for a, b in zip(trainer.network.parameters(), alone.network.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


def test_masks_have_an_optimizer_of_their_own_that_a_checkpoint_keeps(ready):
    dataset = ready(dims=2, size=32)
    trainer = started(dataset)
    generator = trainer.auxiliary["text_masks"]
    of_masks = {id(p) for p in generator.parameters()}
    assert not of_masks & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    before = generator.up[0].convolve.weight.detach().clone()
    trainer.train_step(next(trainer.dataloader_train))
    # Adam's first step is the learning rate, whatever the gradient
    moved = (generator.up[0].convolve.weight - before).abs()
    assert moved.max().item() == pytest.approx(3e-4, rel=1e-2) and (moved > 2e-4).float().mean() > 0.9
    file = str(dataset.results / "checkpoint.pth")
    trainer.save_checkpoint(file)
    again = make_trainer(AMVLMTrainer, dataset)
    again.initialize()
    again.load_checkpoint(file)
    a, b = (t.mask_optimizer.state_dict()["state"] for t in (trainer, again))
    assert a.keys() == b.keys() != set() and all(torch.equal(a[i]["exp_avg"], b[i]["exp_avg"]) for i in a)


def test_texts_of_the_batch_are_drawn_with_others(lesions):
    trainer = started(lesions({f"un_{i:03d}": f"{i} lesions" for i in range(4)}), mask_texts=3)
    assert trainer.texts.texts == [f"{i} lesions" for i in range(4)]
    drawn = trainer.texts.draw([2, 2, 0])
    assert drawn[:2] == [0, 2] and len(drawn) == 3 and drawn[2] in (1, 3)
    assert sorted(trainer.texts.draw([0, 1, 2, 3])) == [0, 1, 2, 3]


def test_labelled_cases_are_measured_with_their_own_texts_or_with_those_of_the_classes():
    generator = SimpleNamespace(encode_texts=lambda texts: torch.tensor([[float(len(text)), 1.0] for text in texts]))
    of_cases = CaseTexts(generator, {"un": "a"}, {"tr_0": "abc", "tr_1": "ab"}, NO_SIDES, number=2)
    assert of_cases.of_labeled("tr_0").tolist() == [[3, 1]] and of_cases.of_labeled("tr_1").tolist() == [[2, 1]]
    of_classes = ClassTexts(generator, [["background"], ["ab", "abcd"]])  # the mean (3, 1) has length sqrt(10)
    torch.testing.assert_close(of_classes.of_labeled("tr_0"), torch.tensor([[3.0, 1.0]]) / math.sqrt(10))
    assert (of_cases.n_classes, of_classes.n_classes) == (1, 1)


def test_background_is_what_no_mask_takes():
    masks = torch.tensor([0.5, 0.0, 1.0, 0.0]).view(1, 2, 1, 2)
    p = with_background(masks, CLASSES)
    # pixel 0: (0.5 * 0, 0.5, 1) / 1.5, pixel 1: (1, 0, 0)
    torch.testing.assert_close(p.flatten(), torch.tensor([0.0, 1.0, 1 / 3, 0.0, 2 / 3, 0.0]))
    assert with_background(masks, REGIONS) is masks


def test_a_loss_towards_soft_labels_that_are_hard_is_nnunets():
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))
    one_hot = torch.zeros(2, 3, 8, 8).scatter_(1, label, 1)
    loss = nnunet_loss(False)
    torch.testing.assert_close(soft_label_loss(loss, logits, one_hot), loss(logits, label))
    loss = nnunet_loss(True)
    torch.testing.assert_close(soft_label_loss(loss, logits, one_hot), loss(logits, one_hot))


def test_soft_labels_by_hand_and_that_they_are_their_own_minimum():
    # one class; p = (0.5, 0.5), t = (0.4, 0.8): 2 (0.4 + 0.5) / (1 + 1.2); background (0.5 + 0.2) of 1 + 0.8
    p, t = torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.8])
    as_heads = lambda x: torch.stack((1 - x, x)).view(1, 2, 1, 2)  # noqa: E731
    loss = nnunet_loss(False)
    ce = -(0.5 * math.log(0.5) + 0.5 * math.log(0.5))
    assert soft_label_loss(loss, as_heads(p).log(), as_heads(t)).item() == pytest.approx(ce - 1.8 / 2.2, abs=1e-4)
    for regions in (False, True):
        loss, target = nnunet_loss(regions), torch.full((1, 2, 4, 4), 0.4)
        if not regions:
            target[:, 0] = 0.6
        at = {q: soft_label_loss(loss, heads(q, regions), target).item() for q in (0.2, 0.4, 0.6, 0.999)}
        assert min(at, key=at.get) == 0.4, at
        dice = {q: loss.dc(heads(q, regions), target).item() for q in at}
        assert min(dice, key=dice.get) == 0.999  # nnU-Net's own would have painted everything


def heads(q: float, regions: bool) -> torch.Tensor:
    """Logits (1, 2, 4, 4) of the probability q of the foreground."""
    p = torch.full((1, 2, 4, 4), q)
    if regions:
        return p.logit()
    p[:, 0] = 1 - q
    return p.log()


# ------------------------------------------------------------------------------------------------------------ sides


def test_sides_that_texts_name():
    assert named_sides(["two lesions", "a bright spot"], PAIRS) == []
    assert named_sides(["Left lung", "a spot"], PAIRS) == named_sides(["kidney_left"], PAIRS) == [1]
    assert named_sides(["the upper right lobe"], PAIRS) == [0, 1]
    assert named_sides(["leftover tissue"], PAIRS) == []  # a word, not a part of one
    own = AMVLMSettings(horizontal_sides=(("links", "rechts"),)).side_pairs
    assert named_sides(["im linken"], own) == [] and named_sides(["links unten"], own) == [1]


@pytest.mark.parametrize(
    "order, median, n_dims, vertical, horizontal",
    [
        ([0, 1, 2], [1, 64, 64], 2, (0,), (1,)),  # a picture: y, x
        ([0, 2, 1], [1, 64, 64], 2, (1,), (0,)),  # the same, transposed
        ([0, 1, 2], [30, 64, 64], 3, (0, 1), (2,)),  # a volume: z and y, x
        ([2, 0, 1], [64, 30, 64], 3, (1, 2), (0,)),  # sagittal first: x, z, y
        ([2, 0, 1], [64, 30, 64], 2, (0, 1), ()),  # its slices: z, y; x is never flipped
        ([0, 1, 2], [30, 64, 64], 2, (0,), (1,)),
    ],
)
def test_the_axes_of_sides_are_those_of_the_image(order, median, n_dims, vertical, horizontal):
    plans = {"transpose_forward": order, "original_median_shape_after_transp": median}
    assert axes_of_sides(plans, n_dims) == (vertical, horizontal)
    assert is_flat(plans) == (1 in median)


def test_slices_without_left_and_right_keep_their_texts():
    """No flip of such a slice makes a text true again whose words were exchanged."""
    plans = {"transpose_forward": [2, 0, 1], "original_median_shape_after_transp": [64, 30, 64]}
    sides = NamedSides.of(["left lesion"], PAIRS, plans, n_dims=2, swap=True)
    assert sides.flips == [KEPT] and sides.axes == {1: ()}
    assert NamedSides.of(["left lesion"], PAIRS, plans, n_dims=3, swap=True).flips == [KEPT, (False, True)]


def test_words_change_places_with_the_sides():
    text = "Upper left and lower right, leftover: left"
    assert exchange(text, (False, True), PAIRS) == "Upper right and lower left, leftover: right"
    assert exchange(text, (True, False), PAIRS) == "Lower left and upper right, leftover: left"
    assert exchange(exchange(text, (True, True), PAIRS), (True, True), PAIRS) == text


@pytest.fixture
def lesions(ready):
    """A factory of data sets with one lesion, and with texts for the unlabelled cases."""

    def make(texts=None, **kwargs):
        labels = {"background": 0, "lesion": 1, "ignore": 2}
        dataset = ready(**{"dims": 2, "size": 32, "labels": labels} | kwargs)
        if texts is not None:
            content = texts if isinstance(texts, dict) else {f"un_{i:03d}": texts for i in range(4)}
            for folder in (dataset.raw, dataset.preprocessed):  # where planning copies it
                (folder / "texts.json").write_text(json.dumps(content))
        return dataset

    return make


def started(dataset, **settings):
    trainer = make_trainer(AMVLMTrainer, dataset, **settings)
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def augmentation(trainer):
    rotation, _, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    return max(rotation), mirror_axes, trainer.inference_allowed_mirroring_axes


def test_flips_that_make_a_text_false_are_off(lesions):
    free = started(lesions("a lesion"))
    assert augmentation(free) == (pytest.approx(3.14159, abs=1e-3), (0, 1), (0, 1))
    sided = started(lesions("a lesion on the left", dataset_id=902))
    assert augmentation(sided) == (pytest.approx(0.2618, abs=1e-3), (0,), (0,))
    both = started(lesions("upper left lesion", dataset_id=903))
    assert augmentation(both) == (pytest.approx(0.2618, abs=1e-3), (), None)
    volume = started(lesions("left lesion", dataset_id=904, dims=3, size=24))
    assert augmentation(volume)[1:] == ((0, 1), (0, 1))
    upper = started(lesions("upper lesion", dataset_id=905, dims=3, size=24), sides="swap")
    assert augmentation(upper)[1:] == ((2,), (2,)) and upper.sides.flips == [(False, False)]  # z or y? neither


def test_flips_with_the_words_exchanged(lesions, monkeypatch):
    trainer = started(lesions("a lesion on the left"), sides="swap", turns=False)
    assert augmentation(trainer) == (pytest.approx(0.2618, abs=1e-3), (0,), (0, 1))
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    shown, asked = [], []
    forward, teacher, masks = trainer.network.forward, trainer.teacher.forward, trainer.texts.masks
    trainer.network.forward = lambda x: (shown.append(x), forward(x))[1]
    trainer.teacher.forward = lambda x: (shown.append(x), teacher(x))[1]
    trainer.texts.masks = lambda images, cases, flip: (asked.append((images, flip)), masks(images, cases, flip))[1]
    trainer.loss.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.zeros(2))  # always
    terms_of(trainer, batch)
    target, (masked, flip) = asked
    assert flip == (False, True)  # no text names upper or lower: that axis is the loader's
    labeled, taught, strong = shown
    after = labeled, target[0], masked, taught, strong
    before = batch.images, batch.target[0], batch.views["weak"], batch.views["weak"], batch.views["strong"]
    assert all(torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    generator = trainer.auxiliary["text_masks"]
    swapped = generator.encode_texts(["a lesion on the right"])
    torch.testing.assert_close(trainer.texts.features[False, True], swapped)
    monkeypatch.setattr(torch, "rand", lambda *_: torch.ones(2))  # never
    shown.clear()
    terms_of(trainer, batch)
    assert torch.equal(shown[0], batch.images)


# ------------------------------------------------------------------------------------------------------------ texts


def test_labelled_and_test_cases_may_have_texts_and_hidden_ones_need_theirs(lesions):
    unlabeled = {f"un_{i:03d}": "a lesion" for i in range(4)}
    dataset = lesions(unlabeled | {"tr_000": "a labelled lesion"}, test=1)
    assert list(make_trainer(AMVLMTrainer, dataset).case_texts) == list(unlabeled)
    with pytest.raises(UserError, match='no text for case "tr_001"'):
        make_trainer(AMVLMTrainer, dataset, num_labeled=1)
    texts = unlabeled | {f"tr_{i:03d}": "a labelled lesion" for i in range(3)} | {"ts_000": "a test"}
    for folder in (dataset.raw, dataset.preprocessed):
        (folder / "texts.json").write_text(json.dumps(texts))
    trainer = started(dataset, num_labeled=1)
    assert set(trainer.hidden_cases) < set(trainer.texts.row) and "ts_000" not in trainer.texts.row
    shutil.rmtree(dataset.raw)  # where preprocessed data are all there is, nobody knows the test cases
    assert set(read_texts(dataset.name, list(unlabeled))) == set(unlabeled)


def test_a_case_has_its_own_text_and_without_one_the_teachers_word(lesions):
    texts = {"un_000": "one lesion", "un_001": "two lesions", "un_002": " "}
    dataset = lesions(texts)
    with pytest.raises(UserError, match='texts.json: has an empty text for case "un_002" .and 1 more.'):
        make_trainer(AMVLMTrainer, dataset)
    trainer = started(dataset, missing_texts="skip")
    images = torch.randn(3, 1, 32, 32)
    masks, has_text, loss = trainer.texts.masks(images, ["un_001", "un_003", "un_000"], KEPT)
    assert has_text.tolist() == [True, False, True] and torch.isfinite(loss)
    own = trainer.auxiliary["text_masks"].encode_texts(["two lesions"])
    torch.testing.assert_close(masks[:1], trainer.auxiliary["text_masks"](images[:1], own[:, None])[1])
    assert trainer.texts.masks(images, ["un_003"] * 3, KEPT)[2] == 0


def test_what_is_wrong_with_texts_is_one_line(lesions):
    dataset = lesions("a lesion")
    file = dataset.raw / "texts.json"
    cases = [f"un_{i:03d}" for i in range(4)]
    for content, words in (
        ({"un_00": "a"}, 'there is a text for "un_00", but the dataset has no such case: did you mean un_00'),
        ({"un_000": 3}, '"un_000": 3 is not a text'),
        ({c: "a" for c in cases[:3]}, 'no text for case "un_003": add it, or use --set missing_texts=skip'),
        ([1], "is not a JSON object"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            read_texts(dataset.name, cases)
    file.write_text(json.dumps({c: "a" for c in cases} | {"un_000": "word " * 40}))
    with pytest.raises(UserError, match='texts.json: "word .* is too long: the text encoder takes 24 tokens'):
        make_trainer(AMVLMTrainer, dataset)
    # long when its words are exchanged
    file.write_text(json.dumps({c: "a" for c in cases} | {"un_000": "left " * 20}))
    settings = dict(sides="swap", horizontal_sides=[["left", "on the other side"]])
    with pytest.raises(UserError, match='texts.json: "on the other side .* is too long'):
        make_trainer(AMVLMTrainer, dataset, **settings)
    file.unlink()
    (dataset.preprocessed / "texts.json").unlink()
    with pytest.raises(UserError, match="texts.json: no such file"):
        read_texts(dataset.name, cases)


def test_refusals(lesions):
    dataset = lesions(labels={"background": 0, "kidney": 1, "tumour": 2})
    for settings, words in (
        (dict(vlm=None), "setting vlm: AMVLMTrainer needs a pre-trained model: run nnunet_semiseg pretrain_vlm"),
        (dict(vlm="/nowhere"), "vlm.json: no such file: name the folder that nnunet_semiseg pretrain_vlm made"),
        (dict(texts="cases"), "texts=cases: a single text for each case cannot tell several classes apart"),
        (dict(horizontal_sides=[["left"]]), "horizontal_sides=.*: must be a list of pairs of words"),
    ):
        with pytest.raises(UserError, match=words):
            make_trainer(AMVLMTrainer, dataset, **settings)
    assert not dataset.results.exists()


def test_labels_that_the_pretraining_saw_and_this_training_must_not_know(lesions, tmp_path):
    dataset = lesions("a lesion", labeled=4)
    folder = write_vlm(tmp_path / "vlm")
    about = {"dataset": dataset.name, "settings": {"dim": 16, "hidden": 32}}
    (dataset.preprocessed / "splits_final.json").write_text(
        json.dumps([{"train": ["tr_000", "tr_001"], "val": ["tr_002", "tr_003"]}])
    )

    def made_with(seen, fold, **settings):
        (folder / "vlm.json").write_text(json.dumps(about | {"mask_cases": seen}))
        return make_trainer(AMVLMTrainer, dataset, fold=fold, vlm=str(folder), texts="classes", **settings)

    made_with(["tr_000", "tr_001"], 0)
    message = "vlm: its pre-training used the label of tr_002, which .* --set fold=0 or --set mask_weight=0$"
    with pytest.raises(UserError, match=message):
        made_with(["tr_000", "tr_002"], 0)
    with pytest.raises(UserError, match="the label of tr_001, .*--set fold=0 num_labeled=1 or --set mask"):
        made_with(["tr_001"], 0, num_labeled=1)
    with pytest.raises(
        UserError, match="the label of tr_001 .and 1 more.,.* again with --set num_labeled=1 or --set mask"
    ):
        made_with(["tr_001", "tr_002"], "all", num_labeled=1)  # the pre-training has no fold=all
    masks = made_with(["tr_000", "tr_002"], "all")
    masks.initialize()
    masks.on_train_start()  # they are measured on labels that the towers did not learn by heart
    assert [example.case for example in masks.examples] == ["tr_001", "tr_003"]


def test_the_three_supervisions_by_hand():
    """One voxel: the teacher says 0.6 of the weak view, the text 0.8 of the first sample; the second has no text."""

    def logits_of(*p):
        p = torch.tensor(p).view(-1, 1, 1, 1)
        return torch.log(torch.cat((1 - p, p), 1))

    def says(x):  # the student, of an image that is P(a)
        return logits_of(*x.flatten().tolist())

    def teacher(x):
        return logits_of(*(0.6 + x.flatten()).tolist())

    settings = dict(pseudo_weight=0.5, mask_weight=2.0, mask_labels="soft")
    trainer = bare_trainer(AMVLMTrainer, progress=0.5, network=says, teacher=teacher, **settings)
    trainer.text_labels = TextLabels(1, "soft", 0.0, CLASSES)
    trainer.sides, asked = NO_SIDES, []

    def text_masks(images, cases, flip):
        asked.append((images, cases, flip))
        return torch.tensor([0.8, 0.99]).view(2, 1, 1, 1), torch.tensor([True, False]), torch.tensor(3.0)

    trainer.texts = SimpleNamespace(masks=text_masks)
    weak = torch.zeros(2, 1, 1, 1)
    strong, labeled = torch.tensor([0.3, 0.9]).view(2, 1, 1, 1), torch.full((2, 1, 1, 1), 0.7)
    batch = batch_of(labeled, torch.ones(2, 1, 1, 1), cases=["b", "a"], weak=weak, strong=strong)
    terms = terms_of(trainer, batch)

    def ce(q, p):
        return -(q * math.log(p) + (1 - q) * math.log(1 - p))

    weight = 0.5 * math.exp(-5 / 4)  # half way
    expected = {
        "teacher": weight * (ce(0.6, 0.3) + ce(0.6, 0.9)) / 2,
        "text": weight * (ce(0.8, 0.3) + ce(0.6, 0.9)) / 2,
        "average": weight * (ce(0.7, 0.3) + ce(0.6, 0.9)) / 2,
        "mask": 2.0 * 3.0,
        "supervised": -math.log(0.7),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-5)
    ((images, cases, flip),) = asked
    assert cases == ["b", "a"] and torch.equal(images, weak) and flip == KEPT


@pytest.mark.parametrize("used, of_first", [(1.0, -math.log(0.3)), (0.0, -math.log(0.7))])
def test_a_teacher_that_hears_the_text_by_hand(used, of_first):
    """It gives a 0.4. A mask of 1 makes that 4 times the odds, which is above one half; the second image has no text.

    So of the first image the label is a, to which the student gives 0.3, and of the second it is background. Masks
    below the gate change nothing.
    """
    p = torch.tensor([0.3, 0.9]).view(2, 1, 1, 1)
    logits_of = lambda p: torch.log(torch.cat((1 - p, p), 1))  # noqa: E731
    trainer = bare_trainer(AMVLMTrainer, network=logits_of, teacher=lambda x: logits_of(0.4 + 0 * x))
    table = torch.linspace(0, math.log(4), 65)[None]
    trainer.text_labels = TextLabels(1, "evidence", 0.6, CLASSES)
    trainer.text_labels.state |= {"mask_used": torch.tensor([used]), "mask_evidence": table}
    trainer.sides, masks = NO_SIDES, torch.ones(2, 1, 1, 1)
    trainer.texts = SimpleNamespace(masks=lambda *_: (masks, torch.tensor([True, False]), torch.tensor(0.0)))
    batch = batch_of(p, torch.ones(2, 1, 1, 1), cases=["a", "b"], weak=p, strong=p)
    assert terms_of(trainer, batch).keys() == {"supervised", "mask", "teacher"}
    assert terms_of(trainer, batch)["teacher"].item() == pytest.approx((of_first - math.log(0.1)) / 2, rel=1e-4)


def test_sides_of_class_prompts_count(ready):
    trainer = started(ready(dims=2, size=32, labels={"background": 0, "kidney_left": 1, "kidney_right": 2}))
    assert augmentation(trainer) == (pytest.approx(0.2618, abs=1e-3), (0,), (0,))


@pytest.mark.parametrize("part", ["teacher", "text", "average"])
def test_each_supervision_alone(part, lesions):
    off = {f"{name}_supervision": name == part for name in ("teacher", "text", "average")}
    trainer = started(lesions("a lesion"), mask_labels="hard", **off)
    out = trainer.train_step(next(trainer.dataloader_train))
    assert set(out) == {"loss", "supervised", part, "mask"} and torch.isfinite(out["loss"])


def test_slices_of_a_volume():
    to_slices, put_back, samples = draw_slices(torch.zeros(2, 1, 8, 16, 16), 3)
    x = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(2, 1, 8, 16, 16)
    sliced = to_slices(x)
    assert sliced.shape == (6, 1, 16, 16) and samples == [0, 0, 0, 1, 1, 1]
    assert torch.equal(sliced[:3], sliced[3:]) and len(sliced[:3, 0, 0, 0].unique()) == 3
    assert torch.equal(put_back(x, sliced), x)
    more = put_back(x, sliced + torch.tensor([10.0, 10, 10, 20, 20, 20]).view(6, 1, 1, 1)) - x
    assert more[:, 0, :, 0, 0].sum(1).tolist() == [30, 60]  # three slices of each sample, and no other


def test_the_settings_of_the_tests_have_a_pretrained_model():
    assert "vlm" in settings_for()
