"""The parts of the base trainer that need no training."""

import math
import random

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from PIL import Image
from torch import nn
from training import make_trainer

from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training.loss_term_logger import LossTermLogger
from nnunet_semiseg.training.random_state import get_random_state, seed_everything, set_random_state
from nnunet_semiseg.training.semi_supervised import split_streams
from nnunet_semiseg.training.teacher import make_teacher, update_teacher


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 1, bias=False)
        self.decoder.deep_supervision = True
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("text", torch.zeros(2))


def test_teacher_is_frozen_in_eval_mode_and_apart():
    student = Student()
    teacher = make_teacher(student)
    assert not teacher.training and not teacher.dropout.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.decoder.deep_supervision is False and student.decoder.deep_supervision is True
    with torch.no_grad():
        student.decoder.weight += 1
    assert not torch.equal(teacher.decoder.weight, student.decoder.weight)
    assert student.training and student.decoder.weight.requires_grad


@pytest.mark.parametrize("step, decay, expected", [(1, 0.99, 5.0), (3, 0.99, 2.5), (1000, 0.9, 1.0), (5, 0.0, 10.0)])
def test_ema_by_hand(step, decay, expected):
    """Teacher 0, student 10: 10 (1 - a) with a = min(1 - 1 / (step + 1), decay)."""
    student = Student()
    nn.init.zeros_(student.decoder.weight)
    teacher = make_teacher(student)
    nn.init.constant_(student.decoder.weight, 10)
    student.text += 3
    update_teacher(teacher, student, step, decay)
    torch.testing.assert_close(teacher.decoder.weight, torch.full((1, 2), expected))
    assert teacher.text.tolist() == [3, 3]  # buffers are copied, not averaged


def test_random_state_is_restored_in_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(1)
    state = get_random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first
    seed_everything(1)
    assert draw() == first


def test_streams_are_split_in_nested_outputs():
    x = torch.arange(5)
    labeled, unlabeled = split_streams(([x, x + 1], {"a": x}), 2)
    assert labeled[0][1].tolist() == [1, 2] and unlabeled[0][1].tolist() == [3, 4, 5]
    assert unlabeled[1]["a"].tolist() == [2, 3, 4]


def epoch(logger, i):
    for key in ("mean_fg_dice", "ema_fg_dice", "train_losses", "val_losses", "lrs", "epoch_start_timestamps"):
        logger.log(key, 0.5, i)
    logger.log("epoch_end_timestamps", 1.5, i)
    logger.log("dice_per_class_or_region", [0.5], i)


def test_loss_terms_are_kept_from_the_epoch_they_appear_in_and_drawn(tmp_path, monkeypatch):
    logger, plain = LossTermLogger(), tmp_path / "plain"
    plain.mkdir()
    epoch(logger, 0)
    logger.plot_progress_png(str(plain))
    epoch(logger, 1)
    logger.log("loss/mix", 2.0, 1)
    values = logger.get_value("loss/mix", None)
    assert math.isnan(values[0]) and values[1:] == [2.0] and logger.terms == ["loss/mix"]
    logger.plot_progress_png(str(tmp_path))
    above, both = (Image.open(f / "progress.png") for f in (plain, tmp_path))
    assert both.height > 1.2 * above.height
    panel = np.asarray(both)[above.height :]
    assert (panel < 250).any()  # something is drawn there

    restored = LossTermLogger()
    restored.load_checkpoint(logger.get_checkpoint())
    restored.log("loss/mix", 3.0, 2)
    assert restored.get_value("loss/mix", None)[1:] == [2.0, 3.0]


def test_other_keys_are_refused_as_in_nnunet():
    with pytest.raises(AssertionError):
        LossTermLogger().log("no such key", 1.0, 0)


@pytest.mark.parametrize("trainer_class", [SupervisedTrainer, MeanTeacherTrainer])
def test_with_a_seed_blur_is_computed_in_one_way(trainer_class, ready):
    """nnU-Net's takes the algorithm that was faster when it was tried: with another load other last digits."""
    dataset = ready(dims=2, size=32)
    for seed in (7, None):
        trainer = make_trainer(trainer_class, dataset, seed=seed)
        transforms = trainer.get_training_transforms((32, 32), (0, 0), None, (0, 1), False).transforms
        (blur,) = [t.transform for t in transforms if isinstance(getattr(t, "transform", None), GaussianBlurTransform)]
        assert blur.benchmark == (seed is None)


def test_a_term_that_only_some_steps_have_is_refused(ready):
    """The mean over an epoch would leave it out, or not know it."""
    trainer = make_trainer(MeanTeacherTrainer, ready(dims=2, size=32))
    one, two = ({"loss": torch.ones(()), name: torch.ones(())} for name in ("a", "b"))
    trainer.initialize()
    for outputs in ([one, two], [one, one | two], [one | two, two]):
        with pytest.raises(RuntimeError, match="MeanTeacherTrainer: .* not the same names in every step"):
            trainer.on_train_epoch_end(outputs)


@torch._dynamo.config.patch(automatic_dynamic_shapes=True)
def test_what_is_compiled_has_fixed_shapes(ready, monkeypatch):
    """A method that begins with one stream and goes on with two has two graphs; dynamo would make one of any shape."""
    monkeypatch.setattr(torch, "compile", lambda network: network)
    trainer = make_trainer(MeanTeacherTrainer, ready(dims=2, size=32))
    trainer._do_i_compile = lambda: True
    trainer.initialize()
    assert not torch._dynamo.config.automatic_dynamic_shapes
