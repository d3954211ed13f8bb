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


def test_the_losses_by_hand():
    """Both classes differ by 0.3 between student and teacher; the labels' cross-entropy is that of 0.75."""
    terms = terms_of(bare_trainer(MeanTeacherTrainer, consistency_weight=2.0), a_batch())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {"supervised": -math.log(0.75), "consistency": 2 * 0.3**2}, rel=1e-4
    )


def test_regions_one_by_one():
    """Region 0 is 1/2 for both; region 1 differs by 0.3: half of it."""
    batch = a_batch(target=torch.zeros(2, 2, 8, 8, 8))
    loss = terms_of(bare_trainer(MeanTeacherTrainer, REGIONS, consistency_weight=2.0), batch)["consistency"]
    assert loss.item() == pytest.approx(2 * 0.3**2 / 2, rel=1e-4)


@pytest.mark.parametrize("progress, ramp", [(0.0, math.exp(-5)), (0.2, math.exp(-1.25)), (0.4, 1), (0.9, 1)])
def test_the_weight_has_a_ramp_over_two_fifths_of_the_training(progress, ramp):
    loss = terms_of(bare_trainer(MeanTeacherTrainer, progress=progress), a_batch())["consistency"]
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


def test_the_student_learns_towards_the_teacher_which_learns_nothing():
    student, teacher = (torch.ones(1, requires_grad=True) for _ in range(2))
    trainer = bare_trainer(MeanTeacherTrainer, network=lambda x: student * x, teacher=lambda x: teacher * x)
    terms_of(trainer, a_batch())["consistency"].backward()
    assert student.grad.item() < 0 and teacher.grad is None  # 0.6 has to grow to 0.9


def test_default_settings():
    settings = MeanTeacherTrainer.settings_class()
    assert (settings.ema_decay, settings.consistency_weight, settings.ramp_length) == (0.99, 0.1, 0.4)
    assert settings.deploy == "student"
