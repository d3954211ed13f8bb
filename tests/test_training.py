"""The parts of the base trainer that need no training."""

import math
import pickle
import random
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from PIL import Image
from torch import nn
from training import TRAINERS, bare_trainer, make_trainer

from nnunet_semiseg.data.augmentation import flat, inner, with_local_changes
from nnunet_semiseg.settings.base import SemiSupervisedSettings, TrainingSettings
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.distributed import Ranks
from nnunet_semiseg.training.loss_term_logger import LossTermLogger
from nnunet_semiseg.training.random_state import RandomStates, get_random_state, seed_everything, set_random_state
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
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


def test_a_checkpoint_has_the_random_states_of_all_ranks():
    states = RandomStates(Ranks())
    states.gather()
    first = torch.rand(1)
    assert states.gathered["random_state_of_others"] == []
    assert states.load(states.gathered) == 1
    states.restore()
    assert torch.rand(1) == first
    states.restore()  # nothing is loaded any more
    assert torch.rand(1) != first
    states.ranks.number, states.ranks.of = 1, 2  # a rank that the checkpoint does not know
    assert states.load(states.gathered) == 1
    states.restore()
    assert torch.rand(1) != first


def test_a_batch_is_sent_and_knows_its_streams():
    """Two labelled samples and three others: a mean over all counts the former with 2/5."""
    labeled, unlabeled = torch.zeros(2, 1, 4, 4), torch.ones(3, 1, 4, 4)
    loaded = {
        "data": labeled, "target": [labeled, labeled[..., ::2, ::2]], "keys": ["tr_0", "tr_1"],
        "views": {"strong": unlabeled}, "extra": {"map": labeled}, "cases": ["un_0", "un_1", "un_2"],
    }  # fmt: skip
    batch = Batch.from_loader(loaded, torch.device("meta"))
    assert {x.device.type for x in (batch.images, *batch.target, *batch.views.values(), *batch.extra.values())} == {
        "meta"
    }
    assert batch.cases == ["un_0", "un_1", "un_2"] and loaded["data"] is labeled  # the loader's is not touched
    here = Batch.from_loader(loaded, torch.device("cpu"))
    (x_l, target, share_l), (x_u, nothing, share_u) = here.streams("strong")
    assert x_l is labeled and x_u is unlabeled and target == loaded["target"] and nothing is None
    assert (share_l, share_u) == (2 / 5, 3 / 5)


@dataclass(frozen=True, kw_only=True)
class OtherSettings(SemiSupervisedSettings):
    other: int = 1


def test_settings_are_the_type_argument_of_the_base():
    class Mine(SemiSupervisedTrainer[OtherSettings]):
        pass

    class Derived(Mine):
        pass

    class Plain(SemiSupervisedTrainer):
        pass

    assert Mine.settings_class is Derived.settings_class is OtherSettings
    assert Plain.settings_class is SemiSupervisedTrainer.settings_class is SemiSupervisedSettings
    assert SupervisedTrainer.settings_class is TrainingSettings
    assert all(issubclass(t.settings_class, SemiSupervisedSettings) for t in TRAINERS)


@pytest.mark.parametrize("memory", ["stock", "fast", "small"])
def test_each_gives_the_outputs_of_each_batch(memory):
    """One pass for all where memory does not matter, else one when its output is asked for."""
    trainer, seen = bare_trainer(SemiSupervisedTrainer, memory=memory), []
    outputs = trainer.each(lambda x: (seen.append(len(x)), [x, {"twice": 2 * x, "none": None}])[1],
                           torch.arange(2.0), torch.arange(2.0, 5))  # fmt: skip
    first, more = next(outputs)
    assert first.tolist() == [0, 1] and more["twice"].tolist() == [0, 2] and more["none"] is None
    assert seen == ([5] if memory == "fast" else [2])
    second, more = next(outputs)
    assert second.tolist() == [2, 3, 4] and more["twice"].tolist() == [4, 6, 8]
    assert next(outputs, None) is None and seen == ([5] if memory == "fast" else [2, 3])


class Groups(SemiSupervisedTrainer):
    """f = w^2 is shared by two groups: a = 3 f, and b = f + 5 v; g = v is in no group's graph; c is a constant."""

    def losses(self, batch):
        with self.shared(({"f": self.w.square(), "none": None}, [self.v.detach()])) as (tensors, (g,)):
            assert tensors["none"] is None and not g.requires_grad
            yield {"a": 3 * tensors["f"]}
            yield {"b": tensors["f"] + 5 * self.v}
        yield {}
        yield {"a": 4 * self.v, "c": self.w.new_zeros(())}


@pytest.mark.parametrize("memory", ["stock", "fast", "small"])
def test_groups_that_share_tensors_give_the_gradients_of_their_sum(memory):
    """With w = 2 and v = 10: a = 12 + 40, b = 4 + 50; dL/dw = 4 * 2 w = 16, dL/dv = 5 + 4."""
    trainer = bare_trainer(Groups, memory=memory)
    trainer.w, trainer.v = (torch.tensor(x, requires_grad=True) for x in (2.0, 10.0))
    terms = trainer.backward(trainer.losses(None))
    assert {name: term.item() for name, term in terms.items()} == {"a": 52, "b": 54, "c": 0}
    assert not any(term.requires_grad for term in terms.values())
    assert (trainer.w.grad.item(), trainer.v.grad.item()) == (16, 9)


def test_losses_are_scaled_before_their_backward_passes():
    for memory in ("stock", "fast"):
        trainer = bare_trainer(Groups, memory=memory)
        trainer.w, trainer.v = (torch.tensor(x, requires_grad=True) for x in (2.0, 10.0))
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        terms = trainer.backward(trainer.losses(None))
        assert (trainer.w.grad.item(), trainer.v.grad.item()) == (8 * 16, 8 * 9)
        assert terms["a"] == 52  # what is logged is not


@pytest.mark.parametrize("memory", ["stock", "fast"])
def test_a_group_is_learnt_from_and_freed_before_the_next_is_made(memory):
    kept, gradients = [], []

    class Two(SemiSupervisedTrainer):
        def losses(self, batch):
            for _ in range(2):
                gradients.append(self.w.grad is not None)
                features = self.w.exp()
                kept.append(weakref.ref(features))
                loss = features.square().sum()
                del features
                yield {"loss": loss}
                del loss
                gradients.append(kept[-1]() is None)

    trainer = bare_trainer(Two, memory=memory)
    trainer.w = torch.ones(3, requires_grad=True)
    trainer.backward(trainer.losses(None))
    if memory == "stock":
        assert gradients == [False, True, True, True]
    else:  # all is kept for the one backward pass
        assert gradients == [False, False, False, False] and trainer.w.grad is not None


@pytest.mark.parametrize("memory", ["stock", "fast"])
def test_decoders_in_turn_know_what_all_say(memory):
    """Three say w, 2 w and 3 w: one at a time has its graph, and each runs once or, but for the first, twice."""
    trainer, runs = bare_trainer(SemiSupervisedTrainer, memory=memory), []
    w = torch.tensor([1.0], requires_grad=True)

    def decoder(i):
        runs.append((i, torch.is_grad_enabled()))
        return [(i + 1) * w, "coarse"]

    turns = []
    for i, (output, _), said in trainer.in_turn([lambda i=i: decoder(i) for i in range(3)]):
        assert output.requires_grad and output.item() == i + 1
        assert [x.item() for x in said] == [1, 2, 3] and not any(x.requires_grad for x in said)
        turns.append(i)
    assert turns == [0, 1, 2]
    with_gradients = [(i, True) for i in range(3)]
    assert runs == (with_gradients if memory == "fast" else [(1, False), (2, False), *with_gradients])
    kept = next(trainer.in_turn([lambda: [w, None]], lambda output: output[0] * 7))[2]
    assert [x.item() for x in kept] == [7] and not kept[0].requires_grad


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


@pytest.mark.parametrize("trainer_class", [SupervisedTrainer, MeanTeacherTrainer])
def test_contrast_of_labelled_patches_changes_as_often_as_the_setting_says(trainer_class):
    probabilities = {}
    for given in (0.8, None):
        trainer = bare_trainer(trainer_class, contrast_probability=given)
        transforms = flat(trainer.get_training_transforms((9, 9, 9), (-0.1, 0.1), None, (0, 1, 2), False))
        found = [t for t in transforms if isinstance(t, RandomTransform)]
        probabilities[given] = {type(t.transform).__name__: t.apply_probability for t in found}
    for name, own in (("MultiplicativeBrightness", 0.15), ("Contrast", 0.15), ("Gamma", 0.3)):
        assert (probabilities[0.8][name + "Transform"], probabilities[None][name + "Transform"]) == (0.8, own)
    assert probabilities[0.8]["GaussianBlurTransform"] == probabilities[None]["GaussianBlurTransform"] == 0.2


@pytest.mark.parametrize("trainer_class", [SupervisedTrainer, MeanTeacherTrainer])
def test_local_changes_follow_nnunets_changes_of_intensity_and_precede_its_mask(trainer_class):
    def steps(**settings) -> list:
        trainer = bare_trainer(trainer_class, **settings)
        return flat(trainer.get_training_transforms((9, 9, 9), (-0.1, 0.1), None, (0, 1, 2), False, [True]))

    names = [type(inner(t)).__name__ for t in steps()]
    assert not any("Local" in name for name in names)
    last = len(names) - names[::-1].index("GammaTransform")
    assert names.index("MaskImageTransform") > last
    changed = steps(local_probability=0.3)
    assert [type(t).__name__ for t in changed[last : last + 2]] == [
        "BrightnessGradientAdditiveTransform", "LocalGammaTransform",
    ]  # fmt: skip
    assert [t.p_per_channel for t in changed[last : last + 2]] == [0.3, 0.3]
    assert [type(inner(t)).__name__ for t in changed[:last] + changed[last + 2 :]] == names


def test_local_changes_do_not_touch_the_labels_of_the_stage_before():
    """In a cascade nnU-Net makes them channels of the image, after its changes of intensity."""
    trainer = bare_trainer(SupervisedTrainer, local_probability=0.3)
    made = trainer.get_training_transforms(
        (9, 9, 9), (-0.1, 0.1), None, (0, 1, 2), False, is_cascaded=True, foreground_labels=[1]
    )
    names = [type(inner(t)).__name__ for t in made.transforms]
    assert names.index("LocalGammaTransform") < names.index("MoveSegAsOneHotToDataTransform")


def test_a_process_that_is_spawned_can_take_the_transforms():
    """The loaders of Windows and macOS send them to their processes."""
    trainer = bare_trainer(SupervisedTrainer, local_probability=0.3, contrast_probability=0.8)
    made = trainer.get_training_transforms((9, 9, 9), (-0.1, 0.1), None, (0, 1, 2), False)
    assert len(pickle.loads(pickle.dumps(made)).transforms) == len(made.transforms)


@pytest.mark.parametrize("shape", [(1, 128, 128), (2, 3, 64, 64)])
def test_local_changes_differ_from_place_to_place(shape):
    """3 voxels are too few for DA5's own draw of a width: it takes the logarithm of 3 // 6."""
    np.random.seed(0)
    image = torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
    transforms = ComposeTransforms([])
    assert torch.equal(with_local_changes(transforms, 0)(image=image.clone())["image"], image)
    difference = with_local_changes(transforms, 1)(image=image.clone())["image"] - image
    assert all(channel.std() > 0.1 and channel.isfinite().all() for channel in difference)


@pytest.mark.parametrize("unit", [0.001, 1000])
def test_a_hill_is_as_high_as_the_image_varies(unit):
    """Images whose values lie between 0 and 1, or are not normalised, are changed as much as others."""
    image = unit * torch.randn(1, 64, 64)
    (hill, _) = with_local_changes(ComposeTransforms([]), 1).transforms
    height = (hill(image=image.clone())["image"] - image).abs().max() / image.std()
    assert 0.99 < height < 5.01


def test_a_term_that_only_some_steps_have_is_refused(ready):
    """The mean over an epoch would leave it out, or not know it."""
    trainer = make_trainer(MeanTeacherTrainer, ready(dims=2, size=32))
    one, two = ({"loss": torch.ones(()), name: torch.ones(())} for name in ("a", "b"))
    trainer.initialize()
    for outputs in ([one, two], [one, one | two], [one | two, two]):
        with pytest.raises(
            RuntimeError, match="MeanTeacherTrainer.losses must yield the same names in every step of an epoch"
        ):
            trainer.on_train_epoch_end(outputs)


@torch._dynamo.config.patch(automatic_dynamic_shapes=True)
def test_what_is_compiled_has_fixed_shapes(ready, monkeypatch):
    """A method that begins with one stream and goes on with two has two graphs; dynamo would make one of any shape."""
    monkeypatch.setattr(torch, "compile", lambda network: network)
    trainer = make_trainer(MeanTeacherTrainer, ready(dims=2, size=32))
    trainer._do_i_compile = lambda: True
    trainer.initialize()
    assert not torch._dynamo.config.automatic_dynamic_shapes
