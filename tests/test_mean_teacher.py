import math

import pytest
import torch
from training import REGIONS, bare_trainer, batch_of, terms_of

from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer


def of_probability(p):
    """Logits (2, 2, 8, 8, 8) whose probability of class 1 is p everywhere."""
    logits = torch.zeros(2, 2, 8, 8, 8)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def a_batch(**kwargs):
    """Images are logits: labelled background with 0.75, the weak view class 1 with 0.9, the strong one with 0.6."""
    return batch_of(of_probability(0.25), weak=of_probability(0.9), strong=of_probability(0.6), **kwargs)


@pytest.mark.parametrize("consistency, expected", [("dice_ce", -math.log(0.6)), ("paper", 0.3**2)])
def test_the_losses_by_hand(consistency, expected):
    """The teacher decides for class 1, to which the student gives 0.6; both classes differ by 0.3 between the two."""
    terms = terms_of(bare_trainer(MeanTeacherTrainer, consistency=consistency, consistency_weight=2.0), a_batch())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {"supervised": -math.log(0.75), "consistency": 2 * expected}, rel=1e-4
    )


@pytest.mark.parametrize("consistency, expected", [("dice_ce", math.log(2) - math.log(0.6)), ("paper", 0.3**2)])
def test_regions_one_by_one(consistency, expected):
    """Region 0 is 1/2 for both, which is no; region 1 as above. The mean of both."""
    batch = a_batch(target=torch.zeros(2, 2, 8, 8, 8))
    trainer = bare_trainer(MeanTeacherTrainer, REGIONS, consistency=consistency, consistency_weight=2.0)
    assert terms_of(trainer, batch)["consistency"].item() == pytest.approx(2 * expected / 2, rel=1e-4)


@pytest.mark.parametrize("progress, ramp", [(0.0, math.exp(-5)), (0.2, math.exp(-1.25)), (0.4, 1), (0.9, 1)])
def test_the_weight_has_a_ramp_over_two_fifths_of_the_training(progress, ramp):
    loss = terms_of(bare_trainer(MeanTeacherTrainer, progress=progress), a_batch())["consistency"]
    assert loss.item() == pytest.approx(ramp * -math.log(0.6), rel=1e-4)
    loss = terms_of(bare_trainer(MeanTeacherTrainer, progress=progress, consistency="paper"), a_batch())["consistency"]
    assert loss.item() == pytest.approx(0.1 * ramp * 0.3**2, rel=1e-4)


def test_the_student_sees_the_strong_view_and_the_teacher_the_weak_one():
    seen = {"student": [], "teacher": []}
    trainer = bare_trainer(
        MeanTeacherTrainer,
        network=lambda x: (seen["student"].append(x), x)[1],
        teacher=lambda x: (seen["teacher"].append(x), x)[1],
    )
    batch = a_batch()
    terms_of(trainer, batch)
    assert [x is y for x, y in zip(seen["student"], (batch.images, batch.views["strong"]), strict=True)] == [True] * 2
    assert len(seen["teacher"]) == 1 and seen["teacher"][0] is batch.views["weak"]


@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_the_student_learns_towards_the_teacher_which_learns_nothing(consistency):
    student, teacher = (torch.ones(1, requires_grad=True) for _ in range(2))
    networks = dict(network=lambda x: student * x, teacher=lambda x: teacher * x)
    trainer = bare_trainer(MeanTeacherTrainer, consistency=consistency, **networks)
    terms_of(trainer, a_batch())["consistency"].backward()
    assert student.grad.item() < 0 and teacher.grad is None  # 0.6 has to grow to 0.9


class Flip:
    """A turn that flips the first axis of what it is given, and remembers that."""

    def __init__(self):
        self.turned = []

    def __call__(self, x):
        self.turned.append(x)
        return x.flip(2)


def test_the_students_view_and_the_teachers_label_are_turned_alike():
    """The teacher says class 1 of the first half of the slices, the student as well, with 0.8, else 0 with 0.8."""
    halves = torch.cat([of_probability(p)[:, :, :4] for p in (0.8, 0.2)], 2)
    trainer = bare_trainer(MeanTeacherTrainer)
    trainer.draw_turn = Flip
    loss = terms_of(trainer, batch_of(of_probability(0.25), weak=halves, strong=halves))["consistency"]
    assert loss.item() == pytest.approx(-math.log(0.8), rel=1e-4)
    seen = []
    trainer.network, trainer.teacher = lambda x: (seen.append(x), x)[1], lambda x: (seen.append(x), x)[1]
    terms_of(trainer, batch_of(of_probability(0.25), weak=halves, strong=halves))
    assert torch.equal(seen[1], halves) and torch.equal(seen[2], halves.flip(2))  # the teacher, and then the student


def test_default_settings():
    settings = MeanTeacherTrainer.settings_class()
    assert (settings.decay, settings.consistency, settings.deploy) == (0.999, "dice_ce", "student")  # 250,000 steps
    assert settings.weight(0.4) == settings.weight(1) == 1
    paper = MeanTeacherTrainer.settings_class(consistency="paper")
    assert paper.weight(0.4) == paper.weight(1) == 0.1
