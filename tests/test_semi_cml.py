"""Semi-CML: its equations on arrays small enough to work out by hand, its modalities, phases and teachers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn
from torch.nn import functional as F
from training import CLASSES, REGIONS, bare_trainer, batch_of, make_trainer, nnunet_loss, terms_of

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.area_similarity import area_similarity, area_similarity_contrast
from nnunet_semiseg.losses.deep_supervision import soft_pseudo_loss
from nnunet_semiseg.losses.relearning import certainty, dynamic_threshold
from nnunet_semiseg.losses.segmentation import disagree, soft_label_loss
from nnunet_semiseg.networks.modalities import (
    ContrastCurve,
    Window,
    check_windows,
    draw_present,
    halves,
    two_thirds,
)
from nnunet_semiseg.networks.mutual_learning import CrossModalFusion, average_logits, presence
from nnunet_semiseg.trainers.semi_cml import SemiCMLTrainer
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.best_pool import BestPool, pseudo_dice

# ------------------------------------------------------------------------------------------------------ equations


def test_area_similarity_by_hand():
    # one class, two voxels: P_1 = (1, 0), P_2 = (1, 1), P_3 = (0, 0.5)
    p = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.5]])[:, None]
    expected = [[1, 2 / 3, 0], [2 / 3, 1, 2 * 0.5 / 2.5], [0, 2 * 0.5 / 2.5, 0.5]]
    torch.testing.assert_close(area_similarity(p), torch.tensor(expected), atol=1e-4, rtol=0)
    squared = area_similarity(p, squared=True)  # P_3 with itself 1; P_2 and P_3: 2 * 0.5 / (2 + 0.25)
    expected = [[1, 2 / 3, 0], [2 / 3, 1, 1 / 2.25], [0, 1 / 2.25, 1]]
    torch.testing.assert_close(squared, torch.tensor(expected), atol=1e-4, rtol=0)
    two_classes = torch.cat((p, torch.ones(3, 1, 2)), 1)  # the second class is everywhere the same
    torch.testing.assert_close(area_similarity(two_classes)[0, 1].item(), (2 / 3 + 1) / 2, atol=1e-4, rtol=0)


S = torch.tensor([[9, 0.1, 0.8, 0.2], [0.1, 9, 0.3, 0.6], [0.8, 0.3, 9, 0.4], [0.2, 0.6, 0.4, 9]])
"""similarities of samples 1 and 2 in modalities a and b: a1, a2, b1, b2"""
ALL = torch.ones(4, 4, dtype=torch.bool)


def test_area_similarity_contrast_of_a_batch_of_two():
    """T = 1/2."""

    def e(s):
        return math.exp(2 * s)

    terms = [
        -math.log(e(0.8) / (e(0.1) + e(0.8) + e(0.2))),
        -math.log(e(0.6) / (e(0.1) + e(0.3) + e(0.6))),
        -math.log(e(0.8) / (e(0.8) + e(0.3) + e(0.4))),
        -math.log(e(0.6) / (e(0.2) + e(0.6) + e(0.4))),
    ]
    assert area_similarity_contrast(S, ALL, 2, 0.5).item() == pytest.approx(sum(terms) / 4)
    # sample 1 is unlabelled, sample 2 gives negatives alone
    assert area_similarity_contrast(S, ALL, 1, 0.5).item() == pytest.approx((terms[0] + terms[2]) / 2)
    # a2 and b2 have no class, nor has a pair of both; and b1 and a2 are no pair
    counts = ALL.clone()
    counts[1, 3] = counts[3, 1] = counts[2, 1] = False
    without_a2 = -math.log(e(0.8) / (e(0.8) + e(0.4)))
    assert area_similarity_contrast(S, counts, 2, 0.5).item() == pytest.approx((terms[0] + without_a2) / 2)
    assert area_similarity_contrast(S, ~ALL, 2, 0.5).item() == 0


def test_negatives_as_near_as_the_positive_are_not_pushed_away():
    s = S.clone()
    s[0, 1] = 0.8  # as near as b1
    s.requires_grad_()
    area_similarity_contrast(s, ALL, 1, 0.5).backward()
    assert s.grad[0, 1] == 0 < s.grad[0, 3] and s.grad[0, 2] < 0 and not s.grad[1].any()


def test_threshold_at_its_start_in_the_middle_and_at_its_end():
    assert dynamic_threshold(0, 0.7) == pytest.approx(0.7)
    assert dynamic_threshold(0.5, 0.7) == pytest.approx(0.85)
    assert dynamic_threshold(0.9, 0.7) == dynamic_threshold(1, 0.7) == dynamic_threshold(25, 0.7) == pytest.approx(0.97)


def test_certainty_by_hand():
    p = torch.tensor([[0.5, 1.0, 0.75], [0.5, 0.0, 0.25]])[None]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(certainty(p, CLASSES), torch.tensor([[[0.0, 1.0, 1 - entropy / math.log(2)]]]))
    regions = torch.tensor([[0.5, 1.0], [0.5, 0.5]])[None]
    torch.testing.assert_close(certainty(regions, REGIONS), torch.tensor([[[0.0, 0.5]]]))


def test_disagreement():
    a = torch.tensor([[2.0, 0.0], [0.0, 2.0]])[None]
    assert disagree(a, torch.zeros(1, 2, 2) + a, CLASSES).tolist() == [[[False, False]]]
    assert disagree(a, torch.tensor([[2.0, 2.0], [0.0, 0.0]])[None], CLASSES).tolist() == [[[False, True]]]
    assert disagree(a - 1, -(a - 1), REGIONS).tolist() == [[[True, True]]]
    assert disagree(a - 1, torch.tensor([[1.0, -1.0], [1.0, 1.0]])[None], REGIONS).tolist() == [[[True, False]]]


def logits_of(*p):
    p = torch.tensor(p).view(1, 1, -1, 1, 1)
    return torch.log(torch.cat((1 - p, p), 1))


class Decoders:
    """A network of two decoders that says the same whatever it is shown, and remembers what it is asked."""

    def __init__(self, *branches, mean=None, sampled=None):
        self.branches, self.mean, self.sampled, self.asked = branches, mean, sampled, []

    def __call__(self, images, branches=False, passes=None, dropout=0.0):
        assert branches
        self.asked.append((images, passes, dropout))
        outputs = [x.expand(len(images), *x.shape[1:]) for x in self.branches]
        return outputs if passes is None else (outputs, self.mean, self.sampled)


OFF = dict(inter_weight=0, contrast_weight=0, consistency_weight=0, relearning_weight=0, ramp_length=1.0)


def terms_by_hand(student, teacher=None, label_manager=CLASSES, progress=1.0, **settings):
    """A step of one labelled and one unlabelled sample, of which the networks say what they always say."""
    trainer = bare_trainer(
        SemiCMLTrainer, label_manager, progress=progress, network=student, teacher=teacher, **OFF | settings
    )
    images = torch.zeros_like(student.branches[0][:, :1])
    target = images if label_manager is CLASSES else torch.zeros_like(student.branches[0])
    terms = terms_of(trainer, batch_of(images, target, weak=images - 1, strong=images))
    return {name: term.item() for name, term in terms.items()}


def relearning(student, branches, mean, sampled=None, progress=0.5, **settings):
    """The loss of the re-learning, its ramp and the other terms taken away."""
    own = dict(relearning_start=0.5, threshold_warmup=0.1, threshold=0.7, disagreement_weight=0.3)
    own |= dict(relearning="hard") | settings
    ramp = math.exp(-5 * (1 - progress) ** 2)
    teacher = Decoders(*branches, mean=mean, sampled=sampled)
    terms = terms_by_hand(Decoders(*student), teacher, progress=progress, relearning_weight=1 / ramp, **own)
    assert set(terms) == {"supervised_a", "supervised_b", "relearning"}
    return terms["relearning"]


def test_disagreement_weighs_the_loss_and_not_the_label():
    """Three voxels: the modalities agree, differ, and the third is below tau = 0.7. Labels: a, a, (background)."""
    student, other = logits_of(0.6, 0.2, 0.9), logits_of(0.3, 0.7, 0.9)
    a, b, mean = logits_of(0.9, 0.9, 0.4), logits_of(0.9, 0.4, 0.4), logits_of(0.9, 0.8, 0.4)
    # had the label been scaled, the second were background's
    expected = (-math.log(0.6) - 0.3 * math.log(0.2)) / 3
    of_other = (-math.log(0.3) - 0.3 * math.log(0.7)) / 3
    assert relearning([student, other], [a, b], mean) == pytest.approx(expected + of_other, abs=1e-6)
    assert relearning([student, student], [a, b], mean) == pytest.approx(2 * expected, abs=1e-6)
    # after the warm-up tau is 0.97: nothing counts
    assert relearning([student, student], [a, b], mean, progress=0.7) == 0
    # in the middle of it tau is 0.85: the first voxel alone
    halfway = relearning([student, student], [a, b], mean, progress=0.55)
    assert halfway == pytest.approx(2 * -math.log(0.6) / 3, abs=1e-6)
    # before it there is no re-learning
    assert relearning([student, student], [a, b], mean, progress=0.45) == 0


@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_soft_pseudo_labels(consistency):
    """P(a) of the teacher is 0.9 and 0.75, of which the modalities differ in the second: CE towards probabilities."""
    student, mean = logits_of(0.6, 0.2), logits_of(0.9, 0.75)
    a, b = logits_of(0.9, 0.9), logits_of(0.9, 0.4)
    first = -0.9 * math.log(0.6) - 0.1 * math.log(0.4)
    second = -0.75 * math.log(0.2) - 0.25 * math.log(0.8)
    soft = relearning([student, student], [a, b], mean, relearning="soft", consistency=consistency)
    assert soft == pytest.approx(2 * (first + 0.3 * second) / 2, abs=1e-6)


def test_a_weighted_soft_loss_by_hand():
    """P(a) is 0.8 and 0.4, of the target 0.9 and 0.5; the second voxel counts 0.3. Dice has the smaller of both."""
    logits, target = logits_of(0.8, 0.4), logits_of(0.9, 0.5).exp()
    weight = torch.tensor([1.0, 0.3]).view(1, 1, 2, 1, 1)
    first = -0.9 * math.log(0.8) - 0.1 * math.log(0.2)
    second = -0.5 * math.log(0.4) - 0.5 * math.log(0.6)
    dice = 2 * (0.8 + 0.3 * 0.4) / (0.8 + 0.9 + 0.3 * (0.4 + 0.5))
    expected = (first + 0.3 * second) / 2 - dice
    assert soft_label_loss(nnunet_loss(False), logits, target, weight).item() == pytest.approx(expected, abs=1e-4)
    logits, target, weight = (torch.cat((x, x)) for x in (logits, target, weight))
    weight[1] = 0  # a sample in which nothing counts
    loss = soft_label_loss(nnunet_loss(False), logits, target, weight)
    assert loss.item() == pytest.approx(expected / 2, abs=1e-4)


def test_coarse_outputs_learn_the_mean_of_soft_labels():
    """Of two voxels with 1 and 0.5 the coarse output, which says 0.6, learns 0.75; weights are 2/3 and 1/3."""
    loss = DeepSupervisionWrapper(nnunet_loss(False, weight_dice=0), (2 / 3, 1 / 3))
    target = logits_of(1.0, 0.5).exp()
    fine = -(math.log(0.8) + 0.5 * math.log(0.8) + 0.5 * math.log(0.2)) / 2
    coarse = -0.75 * math.log(0.6) - 0.25 * math.log(0.4)
    value = soft_pseudo_loss(loss, [logits_of(0.8, 0.8), logits_of(0.6)], target)
    assert value.item() == pytest.approx(2 / 3 * fine + 1 / 3 * coarse, abs=1e-6)


def test_uncertain_voxels_weigh_less():
    student, sure = logits_of(0.6, 0.6), logits_of(0.9, 0.9)
    sampled = logits_of(0.5, 0.75)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = 2 * (0 + (1 - entropy / math.log(2)) * -math.log(0.6)) / 2
    assert relearning([student, student], [sure, sure], sure, sampled) == pytest.approx(expected, abs=1e-6)


def test_the_supervised_loss_and_that_between_the_modalities_by_hand():
    """Two voxels of background; P(a) of the decoders is (1/2, 0) and (1/2, 1/2) of both streams."""
    a, b = logits_of(0.51, 1e-9), logits_of(0.5, 0.5)
    terms = terms_by_hand(Decoders(a, b), progress=0.5, inter_weight=0.7)
    dice = 2 * (0.51 * 0.5 + 0) / (0.51 + 1)
    assert terms == pytest.approx(
        {
            "supervised_a": -math.log(0.49) / 2,
            "supervised_b": math.log(2),
            "inter": 0.7 * math.exp(-1.25) * (1 - dice),  # one mean over both streams
        },
        abs=1e-4,
    )
    # class a is in neither decision: there is nothing to agree on
    terms = terms_by_hand(Decoders(logits_of(0.4, 1e-9), b), progress=0.5, inter_weight=0.7)
    assert terms["inter"] == 0


def test_only_unlabelled_samples_are_anchors_of_the_contrast():
    """P(a) of two voxels; decoder a says (1, 0), b (1, 1) of the unlabelled sample, of the labelled one (0, 1) both.

    With squares: s(a1, b1) = 2/3, s(a1, a2) = s(a1, b2) = 0, s(b1, a2) = s(b1, b2) = 2/3. T = 1.
    """

    def logits(*p):
        return 40 * (logits_of(*p) > -0.1) - 20.0

    of_unlabeled, of_labeled = (logits(1.0, 0.0), logits(1.0, 1.0)), (logits(0.0, 1.0), logits(0.0, 1.0))
    trainer = bare_trainer(SemiCMLTrainer, **OFF | dict(contrast_weight=0.3, contrast_temperature=1.0))
    trainer.network = lambda x, branches: of_unlabeled if x.any() else of_labeled
    images = torch.zeros(1, 1, 2, 1, 1)
    contrast = terms_of(trainer, batch_of(images, weak=images, strong=images + 1))["contrast"]
    e = math.exp(2 / 3)
    expected = (-math.log(e / (e + 2)) - math.log(e / (3 * e))) / 2
    assert contrast.item() == pytest.approx(0.3 * expected, abs=1e-4)


@pytest.mark.parametrize("consistency, expected", [("dice_ce", -2 * math.log(0.4)), ("paper", 2 * 0.5**2)])
def test_the_consistency_with_the_teacher_by_hand(consistency, expected):
    """P(a) of the student's decoders is 0.4 and 0.6, of the teacher's 0.9 and 0.1."""
    teacher = Decoders(logits_of(0.9), logits_of(0.1), mean=logits_of(0.5))
    about = dict(progress=0.5, consistency=consistency, consistency_weight=0.3)
    terms = terms_by_hand(Decoders(logits_of(0.4), logits_of(0.6)), teacher, **about)
    assert terms["intra"] == pytest.approx(0.3 * math.exp(-1.25) * expected, abs=1e-6)
    ((images, passes, _),) = teacher.asked
    assert passes == 0 and (images == -1).all()  # the weak view, without dropout


def test_the_first_region_is_compared_too():
    """The modalities differ in the first region and agree in the second."""
    a, b = torch.tensor([[[[30.0]], [[30.0]]], [[[-30.0]], [[30.0]]]])[:, None]
    terms = terms_by_hand(Decoders(a, b), label_manager=REGIONS, inter_weight=1.0)
    assert terms["inter"] == pytest.approx(0.5, abs=1e-3)


def test_relearning_asks_the_teacher_for_its_passes_and_is_weighted_and_ramped():
    sure = logits_of(0.999)
    teacher = Decoders(sure, sure, mean=sure)
    terms = terms_by_hand(
        Decoders(logits_of(0.5), logits_of(0.8)), teacher, progress=0.75, relearning_weight=0.6, mc_passes=3,
        mc_dropout=0.35, relearning="hard",
    )  # fmt: skip
    expected = 0.6 * math.exp(-5 / 16) * -(math.log(0.5) + math.log(0.8))  # one voxel, both decoders
    assert terms["relearning"] == pytest.approx(expected, abs=1e-6)
    ((images, passes, dropout),) = teacher.asked
    assert (passes, dropout) == (3, 0.35) and (images == -1).all()


def test_a_pool_of_two_by_hand():
    """P(a) of decoders a and b and over dropout passes; the first network's better decoder is a, the second's b."""

    def network(a, b, sampled):
        return lambda *_, **__: ([logits_of(a), logits_of(b)], None, logits_of(sampled))

    pool = BestPool([network(0.2, 0.6, 0.3), network(0.4, 0.9, 0.6)], regions=False)
    pool.state |= {"pool_dice": torch.tensor([0.5, 0.7]), "pool_branch": torch.tensor([0, 1])}
    branches, mean, sampled = pool.predict(torch.zeros(1), 2, 0.2)
    p = [x.softmax(1)[:, 1].item() for x in (*branches, mean, sampled)]
    assert p == pytest.approx([(0.2 + 0.4) / 2, (0.6 + 0.9) / 2, (0.2 + 0.9) / 2, (0.3 + 0.6) / 2])


def test_the_student_lacks_a_modality_of_each_sample():
    student = Decoders(logits_of(0.5), logits_of(0.5))
    student.modalities = SimpleNamespace(groups=((0, 2), (1,)))
    trainer = bare_trainer(SemiCMLTrainer, network=student, modality_dropout=1.0, **OFF)
    ones = torch.ones(10, 3, 1, 1, 1)
    terms_of(trainer, batch_of(ones, strong=ones, weak=ones))
    images = torch.cat([images for images, _, _ in student.asked])
    assert set(map(tuple, images.flatten(1).tolist())) == {(0.0, 1.0, 0.0), (1.0, 0.0, 1.0)} and len(images) == 20


def test_each_modality_takes_the_others_voxels_and_keeps_its_own():
    """One voxel, so all attention is on it; with projections of 1 it is LN of the other modality."""
    fusion = CrossModalFusion(2, nn.Conv2d, nn.BatchNorm2d(2, affine=False, eps=0)).eval()
    with torch.no_grad():
        for attention in fusion.attentions:
            attention.in_proj_weight.copy_(torch.eye(2).repeat(3, 1))
            attention.out_proj.weight.copy_(torch.eye(2))
        fusion.fuse[0].weight.copy_(torch.cat((torch.eye(2), 10 * torch.eye(2)), 1)[..., None, None])
        fusion.fuse[0].bias.zero_()
        fusion.fuse[1].running_mean.copy_(torch.tensor([1.0, 42.0]))
    a, b = torch.tensor([[0.0, 2.0], [5.0, 3.0]]).view(2, 1, 2, 1, 1)
    # LN(a) = (-1, 1), LN(b) = (1, -1): a' = (0 + 1, 2 - 1), b' = (5 - 1, 3 + 1), fused = a' + 10 b'
    # both are 41, of which the norm takes 1 and 42; and ReLU
    torch.testing.assert_close(fusion(a, b).flatten(), torch.tensor([40.0, 0.0]), atol=1e-3, rtol=0)


def test_without_fusion_the_networks_are_apart(ready):
    trainer = started(ready(dims=2, size=32, channels=2), fusion="off")
    network = trainer.network.eval()
    assert network.fusion is None and "loss" in trainer.train_step(next(trainer.dataloader_train))
    x = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        a, b = network(x, branches=True)
        x[:, 1] += 1
        other_a, other_b = network(x, branches=True)
    assert torch.equal(a[0], other_a[0]) and not torch.equal(b[0], other_b[0])
    fused = started(ready(dataset_id=902, dims=2, size=32, channels=2)).network.fusion.fuse
    assert [type(layer).__name__ for layer in fused] == ["Conv2d", "InstanceNorm2d", "ReLU"]


# ------------------------------------------------------------------------------------------------------ modalities


def test_the_mean_of_logits_is_that_of_their_probabilities():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 8, 8, 8)
    torch.testing.assert_close(average_logits([a, b], False).softmax(1), (a.softmax(1) + b.softmax(1)) / 2)
    torch.testing.assert_close(average_logits([a, b], True).sigmoid(), (a.sigmoid() + b.sigmoid()) / 2)
    weights = torch.tensor([[0.5, 1.0], [0.5, 0.0]])  # the second sample lacks the second modality
    mean = average_logits([a, b], True, weights)
    torch.testing.assert_close(mean[1], a[1])
    torch.testing.assert_close(average_logits([a, b], False, weights)[1].softmax(0), a[1].softmax(0))


def test_presence():
    some, none = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    a, b = torch.cat((some, some, none, none)), torch.cat((some, none, some, none))
    assert presence([a, b]).tolist() == [[0.5, 1.0, 0.0, 0.5], [0.5, 0.0, 1.0, 0.5]]


def test_windows_and_contrast_curves():
    window = Window(level=50, width=300, mean=90, std=40)
    hu = torch.tensor([-1000.0, -100.0, 50.0, 125.0, 200.0, 900.0])
    torch.testing.assert_close(window((hu - 90) / 40), torch.tensor([-1.0, -1.0, 0.0, 0.5, 1.0, 1.0]))
    x = torch.tensor([0.0, math.log(3.0)])  # sigmoid: 0.5, 0.75
    torch.testing.assert_close(ContrastCurve(2.0)(x), torch.tensor([-0.5, 0.125]))
    torch.testing.assert_close(ContrastCurve(0.5)(x), 2 * torch.tensor([0.5, 0.75]).sqrt() - 1)


def test_windows_of_a_range_differ_within_it():
    assert two_thirds(-20, 100) == [(20, 80), (60, 80)]  # -20 to 60, 20 to 100
    check_windows([(20, 80), (60, 80)], -20, 100)
    check_windows([(40, 1000), (60, 80)], -20, 100)
    for windows in ([(50, 350), (0, 2000)], [(20, 80), (400, 100)]):
        with pytest.raises(UserError, match="nnU-Net keeps -20 to 100 HU .*: both windows show all of it, or one"):
            check_windows(windows, -20, 100)


def test_halves_of_the_channels():
    assert halves(2) == ((0,), (1,)) and halves(4) == ((0, 1), (2, 3)) and halves(3) == ((0,), (1, 2))


def test_what_is_the_only_modality_is_not_dropped():
    images = torch.ones(3, 3, 2, 2)
    images[0, 1], images[1, [0, 2]] = 0, 0
    for _ in range(20):
        keep = draw_present(((0, 2), (1,)), images, 1.0).flatten(1)
        assert keep[0].tolist() in ([1, 1, 1], [1, 0, 1]) and keep[1].tolist() in ([1, 1, 1], [0, 1, 0])
        assert keep[2].tolist() in ([1, 0, 1], [0, 1, 0])


def test_dropped_modalities():
    torch.manual_seed(0)
    keep = draw_present(((0, 2), (1,)), torch.ones(4000, 3, 2, 2), 0.4)
    assert keep.shape == (4000, 3, 1, 1)
    rows = keep.flatten(1)
    assert torch.equal(rows[:, 0], rows[:, 2]) and (rows.sum(1) > 0).all()
    assert (1 - rows[:, 0]).mean().item() == pytest.approx(0.2, abs=0.03)
    assert (1 - rows[:, 1]).mean().item() == pytest.approx(0.2, abs=0.03)


# --------------------------------------------------------------------------------------------------------- trainer


@pytest.mark.parametrize("name, old, new", [("width", "half", "full"), ("teacher", "ema", "best_pool")])
def test_a_setting_that_changed_before_a_validation_is_named(ready, name, old, new):
    """As with `--val`: the user may want to keep the model, so training again is only the second way out."""
    dataset = ready(channels=2)
    trainer = make_trainer(SemiCMLTrainer, dataset)
    trainer.initialize()
    file = str(dataset.results / "checkpoint.pth")
    trainer.save_checkpoint(file)
    with pytest.raises(UserError) as error:
        make_trainer(SemiCMLTrainer, dataset, **{name: new}).load_checkpoint(file)
    assert str(error.value) == (
        f"{file}: does not fit, because {name} was {old} and is {new}: set this back with --set '{name}=\"{old}\"', or"
        " train again from the beginning, which replaces this model"
    )


def started(dataset, **settings):
    trainer = make_trainer(SemiCMLTrainer, dataset, **settings)
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_both_halves_cost_less_than_what_the_plan_budgeted(ready):
    dataset = ready()
    half = started(dataset)
    assert [e.output_channels for e in half.network.encoder] == [[8, 16, 32]] * 2
    full = started(dataset, width="full")
    assert [e.output_channels for e in full.network.encoder] == [[16, 32, 64]] * 2
    assert parameters(half.network) < 0.3 * parameters(full.network)


def test_single_channels_have_two_views(ready):
    mr = started(ready())
    assert [type(v).__name__ for v in mr.network.modalities.contrasts] == ["ContrastCurve"] * 2
    dataset = ready(dataset_id=902, channel_names={"0": "CT"})
    ct = started(dataset)
    x = next(ct.dataloader_val)["data"]
    a, b = (view(x) for view in ct.network.modalities.contrasts)
    assert (a == 1).any() and (b == -1).any() and not a.equal(b)
    about = ct.plans_manager.foreground_intensity_properties_per_channel["0"]
    low, high = about["percentile_00_5"], about["percentile_99_5"]
    middle = (low + high) / 2
    first, _ = started(dataset, ct_windows=[[middle, 1], [middle, 10]]).network.modalities.contrasts
    assert isinstance(first, Window) and first.centre == pytest.approx((middle - about["mean"]) / about["std"])
    with pytest.raises(UserError, match="ct_windows=.*both windows show all of it"):
        make_trainer(SemiCMLTrainer, dataset, ct_windows=[[middle, 5000], [middle, 6000]])
    assert isinstance(started(dataset, modality_views="contrast").network.modalities.contrasts[0], ContrastCurve)


def test_an_old_data_set_names_its_channels_as_modality(ready):
    dataset = ready(channels=3)
    file = dataset.preprocessed / "dataset.json"
    file.write_text(file.read_text().replace("channel_names", "modality"))
    assert [m.shape[1] for m in started(dataset).network.modalities(torch.randn(1, 3, 16, 16, 16))] == [1, 2]


def test_channel_groups(ready):
    dataset = ready(channels=3)
    x = torch.randn(1, 3, 16, 16, 16)
    default = started(dataset).network
    assert [m.shape[1] for m in default.modalities(x)] == [1, 2]
    chosen = started(dataset, modalities=[[0, 2], [1]]).network
    a, b = chosen.modalities(x)
    assert a.equal(x[:, [0, 2]]) and b.equal(x[:, [1]])


@pytest.mark.parametrize("regions", [False, True])
def test_a_case_that_lacks_a_modality(regions, ready):
    trainer = started(ready(channels=2, regions=regions), modality_dropout=1.0, relearning_start=0.0)
    batch = next(trainer.dataloader_train)
    out = trainer.train_step(batch)
    assert all(torch.isfinite(v) for v in out.values())
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    x = batch["data"].clone()
    x[:, 1] = 0
    with torch.no_grad():
        mean, branches = trainer.network(x), trainer.network(x, branches=True)
        sampled = trainer.network(x, branches=True, passes=1, dropout=0.0)[2]
    p = trainer.probabilities
    torch.testing.assert_close(p(mean), p(branches[0]))  # the missing one has no share
    torch.testing.assert_close(p(sampled), p(branches[0]))
    assert disagree(*branches, trainer.label_manager).any()
    # nor has its decoder a say in what is taught
    taught, _, _ = trainer.predict(trainer.network, x, 0)
    assert taught[0].equal(branches[0]) and not disagree(*taught, trainer.label_manager).any()
    torch.testing.assert_close(p(taught[1]), p(branches[0]))
    assert torch.isfinite(trainer.network(torch.zeros_like(x))).all()


def test_losses(ready):
    trainer = started(ready(dims=2, size=32, channels=2))
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    labeled, unlabeled = (trainer.network(x, branches=True) for x in (batch.images, batch.views["strong"]))
    trainer.step = 2  # of 6: before re-learning
    trainer.settings = replace(trainer.settings, consistency="paper")
    terms = terms_of(trainer, batch)
    assert set(terms) == {"supervised_a", "supervised_b", "inter", "contrast", "intra", "relearning"}
    assert terms["relearning"] == 0
    ramp = math.exp(-5 * (2 / 3) ** 2)
    for name, output in zip("ab", labeled, strict=True):
        torch.testing.assert_close(terms[f"supervised_{name}"], trainer.loss(output, batch.target))
    a, b = (torch.cat((x[0], y[0])).softmax(1) for x, y in zip(labeled, unlabeled, strict=True))
    foreground = a[:, 1:].flatten(2), b[:, 1:].flatten(2)
    dice = 2 * (foreground[0] * foreground[1]).sum(2) / (foreground[0].sum(2) + foreground[1].sum(2))
    there = [F.one_hot(p.argmax(1), 3)[..., 1:].flatten(1, 2).any(1) for p in (a, b)]
    either = there[0] | there[1]
    of_samples = (dice * either).sum(1) / either.sum(1).clamp_min(1)
    losses = (1 - of_samples).split(len(batch.images))
    expected = sum(x[y.any(1)].mean() / 2 if y.any() else 0 for x, y in zip(losses, either.split(2), strict=True))
    torch.testing.assert_close(terms["inter"], 0.5 * ramp * expected, rtol=1e-3, atol=1e-5)
    assert terms["contrast"] > 0
    teacher = trainer.teacher(batch.views["weak"], branches=True)
    n = len(batch.images)
    mse = sum(F.mse_loss(p[n:], t.softmax(1)) for p, t in zip((a, b), teacher, strict=True))
    torch.testing.assert_close(terms["intra"], 0.1 * ramp * mse)
    trainer.step = 3
    assert terms_of(trainer, batch)["relearning"] != 0


@pytest.mark.parametrize("contrast_weight", [0.4, 0.0])
def test_the_gradients_do_not_depend_on_the_memory(contrast_weight, ready):
    trainer = started(ready(dims=2, size=32, channels=2), contrast_weight=contrast_weight, mc_passes=0)
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    trainer.step, results, encoded = 4, [], []
    trainer.network.encoder[0].register_forward_pre_hook(lambda *_: encoded.append(1))
    for memory in ("stock", "fast"):
        trainer.settings = replace(trainer.settings, memory=memory)
        trainer.network.zero_grad()
        encoded.clear()
        terms = trainer.backward(trainer.losses(batch))
        gradients = {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}
        results.append((terms, gradients))
        assert len(encoded) == (1 if memory == "fast" else 2)  # both streams at once, or one after the other
    (terms, gradients), other = results
    assert terms.keys() == other[0].keys() and gradients.keys() == other[1].keys()
    for a, b in ((terms, other[0]), (gradients, other[1])):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def test_dropout_passes_leave_the_encoder_alone_and_differ(ready):
    trainer = started(ready())
    calls = []
    trainer.teacher.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    images = next(trainer.dataloader_train)["views"]["weak"]
    outputs, mean, sampled = trainer.predict(trainer.teacher, images, 3)
    assert len(calls) == 1 and not sampled.equal(mean)
    torch.testing.assert_close(mean, trainer.teacher(images))
    again = trainer.predict(trainer.teacher, images, 3)
    assert again[1].equal(mean) and not again[2].equal(sampled)
    assert trainer.predict(trainer.teacher, images, 0)[2] is None
    without = trainer.teacher(images, branches=True, passes=2, dropout=0.0)[2]
    torch.testing.assert_close(without.softmax(1), mean.softmax(1))


@pytest.mark.parametrize("term", ["inter", "contrast", "intra", "relearning"])
def test_each_loss_alone(term, ready):
    settings = OFF | {"consistency_weight" if term == "intra" else f"{term}_weight": 1.0}
    trainer = started(ready(dims=2, size=32), relearning_start=0.0, mc_passes=0, **settings)
    out = trainer.train_step(next(trainer.dataloader_train))
    assert set(out) == {"loss", "supervised_a", "supervised_b", term} and torch.isfinite(out["loss"])


def test_resume_across_the_phases_with_a_pool(ready):
    dataset = ready(dims=2, size=32, channels=2)
    settings = dict(teacher="best_pool", pool_size=2, relearning_start=0.5, mc_passes=1)
    settings |= dict(threshold=0.0, threshold_warmup=1.0)  # in so short a training nothing is certain
    straight = make_trainer(SemiCMLTrainer, dataset, **settings)
    straight.run_training()
    dice, branch = straight.method_state["pool_dice"], straight.method_state["pool_branch"]
    assert (dice >= 0).all() and set(branch.tolist()) <= {0, 1}

    class Killed(Exception):
        pass

    broken = make_trainer(SemiCMLTrainer, dataset, **settings)
    step = broken.train_step

    def dies(batch):
        if broken.step == 3:  # re-learning has just begun
            raise Killed
        return step(batch)

    broken.train_step = dies
    with pytest.raises(Killed):
        broken.run_training()
    resumed = make_trainer(SemiCMLTrainer, dataset, **settings)
    resumed.load_checkpoint(resumed.output_folder + "/checkpoint_latest.pth")
    assert resumed.current_epoch == 1
    resumed.run_training()
    assert torch.equal(dice, resumed.method_state["pool_dice"])
    for a, b in ((straight.network, resumed.network), (straight.auxiliary, resumed.auxiliary)):
        b = b.state_dict()
        assert all(torch.equal(v, b[k]) for k, v in a.state_dict().items())
    relearned = straight.logger.get_value("loss/relearning", None)
    assert relearned[0] == 0 != relearned[2]


def test_the_pool_keeps_the_best_and_labels_with_their_better_decoder(ready):
    trainer = started(ready(), teacher="best_pool", pool_size=2, mc_passes=0)
    images = next(trainer.dataloader_train)["views"]["weak"]
    assert trainer.pool.predict(images, 0, 0.2) is None
    kept = []
    for dice, branch in ((0.5, 0), (0.3, 1), (0.2, 0), (0.7, 1)):
        with torch.no_grad():
            for p in trainer.network.parameters():
                p.add_(0.01 * torch.randn_like(p))
        trainer.pool.offer(trainer.bare_network, dice, branch)
        kept.append(trainer.predict(trainer.auxiliary["pool"][0], images, 0) if dice == 0.5 else None)
    assert sorted(trainer.method_state["pool_dice"].tolist()) == pytest.approx([0.5, 0.7])
    best, worst = trainer.auxiliary["pool"][1], trainer.auxiliary["pool"][0]
    (_, mean, sampled) = trainer.pool.predict(images, 0, 0.2)
    expected = average_logits([worst(images, branches=True)[0], best(images, branches=True)[1]], False)
    torch.testing.assert_close(mean, expected)
    assert sampled is None
    torch.testing.assert_close(kept[0][0][0], worst(images, branches=True)[0])  # the first offer is still there


def test_the_pool_does_not_label_with_the_decoder_of_a_modality_that_is_not_there(ready):
    trainer = started(ready(channels=2), teacher="best_pool", pool_size=1, mc_passes=0)
    trainer.pool.offer(trainer.bare_network, 0.9, 1)
    images = next(trainer.dataloader_train)["views"]["weak"].clone()
    images[0, 1] = 0
    branches, mean, _ = trainer.pool.predict(images, 0, 0.2)
    a, b = trainer.auxiliary["pool"][0](images, branches=True)
    torch.testing.assert_close(mean.softmax(1), torch.stack((a[0], b[1])).softmax(1))
    torch.testing.assert_close(branches[1].softmax(1), mean.softmax(1))


def test_the_decoders_are_judged_apart_on_validation_patches(ready):
    trainer = started(ready(), teacher="best_pool")
    trainer.network.eval()
    out = trainer.validation_step(next(trainer.dataloader_val))
    assert {"tp_hard", "tp_hard_a", "tp_hard_b", "loss"} <= set(out)
    assert trainer.network is trainer.bare_network
    with torch.no_grad():  # now a says background everywhere, b the first class
        for decoder, head in zip(trainer.network.decoder, (0, 1), strict=True):
            decoder.seg_layers[-1].bias[head] = 1000
    out = trainer.validation_step(next(trainer.dataloader_val))
    assert out["tp_hard_a"].sum() == out["fp_hard_a"].sum() == 0 < out["tp_hard_b"][0] and out["fn_hard_b"][0] == 0
    trainer.on_validation_epoch_end([out])
    assert trainer.method_state["pool_branch"][0] == 1 and trainer.method_state["pool_dice"][0] > 0
    counts = {"tp_hard_a": np.array([3, 0]), "fp_hard_a": np.array([1, 0]), "fn_hard_a": np.array([1, 0])}
    assert pseudo_dice([counts, counts], "a") == pytest.approx(6 / 8)  # a class that is nowhere does not count
    assert pseudo_dice([{k: 0 * v for k, v in counts.items()}], "a") == 0


def test_refusals(ready):
    single, double = ready(), ready(dataset_id=902, channels=2)
    for dataset, settings, words in (
        (
            single,
            dict(modalities=[[0], [1]]),
            r"modalities=\[\[0\], \[1\]\]: the dataset has a single channel: set it to null",
        ),
        (single, dict(modality_dropout=0.5), "setting modality_dropout=0.5: the dataset has a single channel"),
        (single, dict(modality_views="ct_windows"), "modality_views=ct_windows: the images are not CT"),
        (double, dict(modalities=[[0], [2]]), "two lists of different channels from 0 to 1"),
        (double, dict(modalities=[[0], [0, 1]]), "two lists of different channels from 0 to 1"),
        (double, dict(modalities=[[0, 1]]), "modalities=.*: must have two entries"),
        (
            double,
            dict(modality_views="contrast"),
            "modality_views=contrast: the dataset has 2 channels, which are used",
        ),
        (double, dict(ct_windows=[[40, 400], [40]]), "ct_windows=.*: must have two entries, each a level and a width"),
        (double, dict(contrast_gammas=[0.5, -1]), "gammas must be above 0"),
        (double, dict(threshold=1.5), "threshold=1.5: must be a number from 0 to 1"),
    ):
        with pytest.raises(UserError, match=words):
            make_trainer(SemiCMLTrainer, dataset, **settings)
    assert not single.results.exists() and not double.results.exists()
