"""What holds for every semi-supervised trainer; a new one is found by being in `trainers/`."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from training import PLANS, TRAINERS, begin_last_epoch, in_last_epoch, make_trainer
from watching import nothing_of_the_test_set_is_opened

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.settings.base import TeacherSettings
from nnunet_semiseg.trainers.ad_mt import ADMTTrainer
from nnunet_semiseg.trainers.amvlm import AMVLMTrainer
from nnunet_semiseg.trainers.bcp import BCPTrainer
from nnunet_semiseg.trainers.mcf import MCFTrainer
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.self_training import SelfTrainingTrainer
from nnunet_semiseg.trainers.semi_cml import SemiCMLTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegTrainer
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.loss_term_logger import PREFIX, LossTermLogger
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.vlm.text_mask_generator import TextMaskGenerator

DATASETS = {
    "3d": dict(dims=3),
    "2d": dict(dims=2, size=32),
    "regions": dict(dims=3, regions=True),
    "2 channels": dict(dims=3, channels=2),
    "2 classes": dict(dims=3, structures=1, labels={"background": 0, "a": 1}),
    "4 classes": dict(dims=3, structures=3, labels={"background": 0, "a": 1, "b": 2, "c": 3}),
    "ignore": dict(dims=3, labels={"background": 0, "kidney": 1, "ignore": 2}),
}
FOR_ALL = ("3d", "2d")

REPRESENTATIVES = (MeanTeacherTrainer, TextSemiSegTrainer, SemiCMLTrainer)
"""a teacher; text and two decoders; a network of its own"""


def name_of(x) -> str | None:
    return x.__name__ if isinstance(x, type) else None


every_trainer = pytest.mark.parametrize("trainer_class", TRAINERS, ids=name_of)
three_trainers = pytest.mark.parametrize("trainer_class", REPRESENTATIVES, ids=name_of)
every_other_trainer = pytest.mark.parametrize(
    "trainer_class", [SupervisedTrainer, *(t for t in TRAINERS if t not in REPRESENTATIVES)], ids=name_of
)
every_trainer_with_a_teacher = pytest.mark.parametrize(
    "trainer_class", [t for t in TRAINERS if issubclass(t.settings_class, TeacherSettings)], ids=name_of
)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(LossTermLogger, "plot_progress_png", lambda self, folder: None)


def started(trainer_class, dataset, **settings):
    trainer = make_trainer(trainer_class, dataset, dca_start=0.0, **settings)
    trainer.on_train_start()
    return trainer


def snapshot(parameters):
    return [p.detach().clone() for p in parameters]


def a_batch(trainer) -> Batch:
    return Batch.from_loader(next(trainer.dataloader_train), trainer.device)


def named_trainable(trainer) -> dict[str, nn.Parameter]:
    """What must learn: nnU-Net gives the coarsest of several outputs no weight, so that its layer learns nothing."""
    named = dict((*trainer.bare_network.named_parameters(), *trainer.auxiliary.named_parameters()))
    unused = {
        id(p) for n, p in named.items() if "seg_layers.0." in n and n.replace("layers.0.", "layers.1.") in named
    }  # where there is one layer only, it is the finest
    return {n: p for n, p in named.items() if p.requires_grad and id(p) not in unused}


@pytest.mark.parametrize(
    "trainer_class, kind",
    [(t, kind) for t in TRAINERS for kind in DATASETS if t in REPRESENTATIVES or kind in FOR_ALL],
    ids=name_of,
)
def test_two_steps_route_the_gradients(trainer_class, kind, ready):
    trainer = started(trainer_class, ready(**DATASETS[kind]))
    trainer.network.train()
    before = snapshot(trainer.trainable)
    frozen = [m for m in trainer.auxiliary.values() if hasattr(m, "tower")]
    towers = [snapshot(m.tower.parameters()) for m in frozen]

    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]

    terms = [k for k in outputs[0] if k != "loss"]
    assert "loss" in outputs[0] and terms and list(outputs[1]) == list(outputs[0])
    for out in outputs:
        assert all(torch.isfinite(v) and not v.requires_grad for v in out.values())
        torch.testing.assert_close(out["loss"], sum(out[k] for k in terms))

    must_learn = named_trainable(trainer)
    for name, p in must_learn.items():
        # a bias before an instance norm has a gradient of rounding errors only, but it has one
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0 or name.endswith("bias"), name
    moved = [not torch.equal(p, old) for p, old in zip(trainer.trainable, before, strict=True)]
    assert np.mean(moved) > 0.9

    for module, tower in zip(frozen, towers, strict=True):
        assert not any(m.training for m in module.tower.modules())
        assert all(p.grad is None for p in module.tower.parameters())
        assert all(torch.equal(a, b) for a, b in zip(module.tower.parameters(), tower, strict=True))
    for name, p in trainer.auxiliary.named_parameters():
        if name not in must_learn:
            continue
        old = before[[id(q) for q in trainer.trainable].index(id(p))]
        moved = (p != old).flatten(1) if p.ndim > 3 else (p != old)  # of a convolution every output channel
        assert moved.any(-1).all(), f"a token of {name} stayed where it was"

    if trainer.teacher is not None:
        assert not any(m.training for m in trainer.teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.parameters())
        shared = {id(p) for p in trainer.network.parameters()} & {id(p) for p in trainer.teacher.parameters()}
        assert not shared
        assert not {id(p) for p in trainer.trainable} & {id(p) for p in trainer.teacher.parameters()}


@every_trainer
def test_every_term_of_every_group_teaches(trainer_class, ready):
    """That the labels give every parameter a gradient hides a term that gives none.

    At the end of the training: before, a term may be the constant 0. All pseudo-labels count, however uncertain.
    """
    # memory=fast: the other ones end a group's graph at tensors that several groups share; that their gradients
    # are the same is tested below
    trainer = in_last_epoch(trainer_class, ready(), memory="fast", match_threshold=0.0, threshold=0.0, mask_gate=0.0)
    trainer.network.train()
    if trainer.teacher is not None:
        with torch.no_grad():  # as far from the student as in mid-training: two views of a patch may be the same
            for p in trainer.teacher.parameters():
                p += 0.05 * torch.randn_like(p)
    teaches = {}
    for i, group in enumerate(trainer.losses(a_batch(trainer))):
        for name, term in group.items():
            gradients = torch.autograd.grad(term, trainer.trainable, retain_graph=True, allow_unused=True)
            teaches[name, i] = any(g is not None and g.any() for g in gradients)
    assert teaches and all(teaches.values()), teaches


@every_trainer
def test_terms_have_the_same_names_from_the_first_step_to_the_last(trainer_class, ready):
    trainer = make_trainer(trainer_class, ready(dims=2, size=32), num_epochs=2, num_iterations_per_epoch=1)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    first = list(trainer.train_step(next(trainer.dataloader_train)))
    begin_last_epoch(trainer)
    assert list(trainer.train_step(next(trainer.dataloader_train))) == first


@every_trainer
def test_a_step_leaves_nothing_behind(trainer_class, ready):
    """What a trainer kept of a step would stay in the GPU's memory during the next one."""
    trainer = in_last_epoch(trainer_class, ready())
    trainer.network.train()
    batch, names = next(trainer.dataloader_train), vars(trainer).keys()
    before = set(names)
    trainer.train_step(batch)
    assert set(names) == before
    shown = {x.untyped_storage().data_ptr() for x in tensors_in(batch)}
    kept = list(tensors_in(vars(trainer)))
    assert len(shown) > 1 and len(kept) > len(trainer.trainable)
    for x in kept:
        assert isinstance(x, nn.Parameter) or not x.requires_grad
        assert x.numel() == 0 or x.untyped_storage().data_ptr() not in shown


def tensors_in(start):
    """The tensors that are reachable: in attributes, containers, and what functions remember."""
    stack, seen = [start], set()
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, type):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, dict):
            stack += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set, frozenset)):
            stack += x
        elif isinstance(x, FunctionType):
            stack += [cell.cell_contents for cell in x.__closure__ or ()]
        elif isinstance(x, MethodType):
            stack += [x.__self__, x.__func__]
        elif hasattr(x, "__dict__") and type(x).__module__.partition(".")[0] != "sys":
            stack.append(vars(x))


def test_what_is_kept_of_a_step_is_found():
    module, x = nn.Module(), torch.ones(2)
    module.hook = lambda: x
    held = [0, {"a": (module,)}]
    assert [t is x for t in tensors_in(held)] == [True]
    assert list(tensors_in([x[:1]]))[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@contextmanager
def equal_draws():
    """What is drawn within a pass does not depend on the samples of it, nor on how many passes there were.

    With another memory there are other passes, and so other masks; here every second channel is dropped, and noise is
    one number.
    """

    def drop_every_second(x, p=0.5, *args, **kwargs):
        keep = (torch.arange(x.shape[1]) % 2).to(x).view(1, -1, *[1] * (x.ndim - 2))
        return x * keep / (1 - p) if p else x

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dropout", "dropout2d", "dropout3d"):
            patch.setattr(F, name, drop_every_second)
        patch.setattr(torch.Tensor, "uniform_", lambda x, low=0.0, high=1.0: x.fill_(low + 0.7 * (high - low)))
        yield


@every_trainer
def test_gradients_do_not_depend_on_the_memory(trainer_class, ready):
    """One pass and one backward pass, or a sample at a time: the same terms, and the same gradients of a step."""
    dataset, results = ready(dims=2, size=32), {}
    for memory in ("stock", "fast", "small"):
        trainer = make_trainer(trainer_class, dataset, num_epochs=2, dca_start=0.0, memory=memory)
        if memory == "stock":
            trainer.on_train_start()
            begin_last_epoch(trainer)
            batch, first = next(trainer.dataloader_train), trainer
            state = {name: value.clone() for name, value in trainer.method_state.items()}
        else:
            trainer.initialize()
            trainer.current_epoch, trainer.step = first.current_epoch, first.step
            trainer.network.load_state_dict(first.network.state_dict())
            trainer.auxiliary.load_state_dict(first.auxiliary.state_dict())
            if first.teacher is not None:
                trainer.teacher.load_state_dict(first.teacher.state_dict())
            for name, value in state.items():
                trainer.method_state[name].copy_(value)
            # found when a training starts
            trainer.inference_allowed_mirroring_axes = first.inference_allowed_mirroring_axes
            trainer.decide.heads = first.decide.heads
        in_float64(trainer)
        trainer.network.train()
        same = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
        with equal_draws():
            terms = trainer.backward(trainer.losses(Batch.from_loader(same, trainer.device)))
        results[memory] = terms, {n: p.grad for n, p in named_trainable(trainer).items()}
    terms, gradients = results["stock"]
    largest = max(g.abs().max() for g in gradients.values())
    assert largest > 0
    for memory in ("fast", "small"):
        torch.testing.assert_close(results[memory][0], terms, rtol=1e-5, atol=1e-7)
        for name, gradient in results[memory][1].items():
            # losses compute in float32; where an instance norm follows a bias, that is all there is of its gradient
            difference = (gradient - gradients[name]).abs().max()
            assert difference <= 1e-4 * gradients[name].abs().max() + 1e-6 * largest, (memory, name)


def in_float64(trainer) -> None:
    """So that no pseudo-label depends on which rounding a batch's size gives."""
    for module in (trainer.network, trainer.auxiliary, trainer.teacher):
        if module is not None:
            module.double()
    for module in trainer.auxiliary.values():
        if isinstance(module, TextMaskGenerator):
            module.float()  # it takes images to float32 itself


@every_trainer
def test_mixed_precision_keeps_no_gradient_from_a_weight(trainer_class, ready, monkeypatch):
    """Autocast keeps the 16-bit copy of a weight; one that a pass without gradients made would swallow them later.

    Each group of terms has to reach the weights that it reaches in float32.
    """
    trainer = in_last_epoch(trainer_class, ready(dims=2, size=32))
    trainer.network.train()
    batch = a_batch(trainer)
    expected = [names for names in weights_reached(trainer, batch) if names]
    monkeypatch.setattr(trainer, "autocast", lambda enabled=True: torch.autocast("cpu", torch.bfloat16, enabled))
    assert [names for names in weights_reached(trainer, batch) if names] == expected
    assert set(named_trainable(trainer)) <= set().union(*expected)
    for _ in range(2):  # what begins as 0 hides what it is multiplied with in the first one
        out = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(v) for v in out.values())
    for name, p in named_trainable(trainer).items():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0 or name.endswith("bias"), name


def weights_reached(trainer, batch: Batch) -> list[set[str]]:
    """The parameters that get a gradient from each group of terms, and from what it shares with those before."""
    named = dict((*trainer.bare_network.named_parameters(), *trainer.auxiliary.named_parameters()))
    groups, reached = trainer.losses(batch), []
    while True:
        for p in named.values():
            p.grad = None
        with trainer.autocast():
            group = next(groups, None)
            loss = None if group is None else sum(group.values())
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
        reached.append({name for name, p in named.items() if p.grad is not None})
        if group is None:
            return reached


@every_trainer
def test_trains_without_deep_supervision(trainer_class, ready):
    class WithoutDeepSupervision(trainer_class):
        def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.enable_deep_supervision = False

    trainer = started(WithoutDeepSupervision, ready())
    trainer.network.train()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(v) for v in out.values())
    assert trainer.network(next(trainer.dataloader_val)["data"]).ndim == 5


@pytest.mark.slow
@every_trainer
def test_trains_on_residual_encoder_plans(trainer_class, ready):
    dataset = ready("SemiSegPlannerResEncM", dims=2, size=32)
    trainer = started(trainer_class, dataset, plans="nnUNetSemiSegResEncUNetMPlans")
    trainer.network.train()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(v) for v in out.values())


@pytest.mark.slow
@every_trainer
@torch._dynamo.config.patch(automatic_dynamic_shapes=False, cache_size_limit=64)  # as trainers that compile set it
def test_what_is_compiled_is_whole_graphs_and_is_not_compiled_again(trainer_class, ready, monkeypatch):
    """Dynamo without inductor: a break raises, and a step that changes a shape or a function would add a graph."""
    graphs, compiled, compile_ = [], [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        assert all(isinstance(n, int) for x in inputs if isinstance(x, torch.Tensor) for n in x.shape)
        return graph.forward

    def counting(model, *args, **kwargs):
        compiled.append(getattr(model, "__self__", model))  # a part in place: its `_call_impl`
        return compile_(model, backend=count, fullgraph=True)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(trainer_class, "_do_i_compile", lambda self: True)
    torch._dynamo.reset()
    trainer = started(
        trainer_class, ready(dims=2, size=32), **{f"{name}.mc_passes": 2 for name in ("UAMTTrainer", "SemiCMLTrainer")}
    )
    networks = [trainer.network, *([] if trainer.teacher is None else [trainer.teacher])]
    for network in [x._orig_mod for x in networks] + [m for m in trainer.auxiliary.values() if hasattr(m, "parts")]:
        assert all(any(part is x for x in compiled) for part in (network.parts() if hasattr(network, "parts") else ()))
    trainer.network.train()
    for trainer.step in (0, 3, 0, 3):  # methods change in mid-training
        before = len(graphs)
        trainer.train_step(next(trainer.dataloader_train))
    assert len(graphs) == before > 0
    torch._dynamo.reset()


@every_trainer
def test_the_predictors_network_takes_the_weights(trainer_class, ready):
    """Prediction builds the network without deep supervision, and by the class alone."""
    trainer = make_trainer(trainer_class, ready(dims=2, size=32))
    trainer.initialize()
    about = trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels
    network = trainer_class.build_network_architecture(*about, trainer.label_manager.num_segmentation_heads, False)
    network.load_state_dict(trainer.network.state_dict())


@every_trainer_with_a_teacher
def test_teacher_follows_by_ema(trainer_class, ready):
    trainer = started(trainer_class, ready())
    teacher = snapshot(trainer.teacher.parameters())
    trainer.train_step(next(trainer.dataloader_train))  # step 1: the average of two
    for t, old, s in zip(trainer.teacher.parameters(), teacher, trainer.network.parameters(), strict=True):
        torch.testing.assert_close(t, 0.5 * old + 0.5 * s)
    trainer.step = 10**6
    teacher = snapshot(trainer.teacher.parameters())
    trainer.train_step(next(trainer.dataloader_train))
    for t, old, s in zip(trainer.teacher.parameters(), teacher, trainer.network.parameters(), strict=True):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s)  # of a training of 4 steps


@pytest.mark.parametrize(
    "trainer_class, settings",
    [
        (MeanTeacherTrainer, dict(deploy="student")),
        (MeanTeacherTrainer, dict(deploy="teacher")),
        (TextSemiSegTrainer, dict(dca_start=0.5)),
        (SemiCMLTrainer, dict(deploy="teacher")),
        (SemiCMLTrainer, dict(deploy="student", teacher="best_pool")),
        (BCPTrainer, dict(deploy="student")),
        (AMVLMTrainer, {}),
        (SelfTrainingTrainer, {}),
        (MCFTrainer, {}),
        (ADMTTrainer, dict(deploy="student", period=2)),
    ],
    ids=lambda x: name_of(x) or ",".join(map(str, x.values())) or "plain",
)
def test_resumed_training_ends_where_an_uninterrupted_one_does(trainer_class, settings, ready):
    """Of three methods, and of each that remembers more than weights."""
    dataset = ready(dims=2, size=32) if trainer_class is AMVLMTrainer else ready()
    straight = make_trainer(trainer_class, dataset, **settings)
    straight.run_training()

    class Killed(Exception):
        pass

    broken = make_trainer(trainer_class, dataset, **settings)
    step = broken.train_step

    def dies_in_the_third_epoch(batch):
        if broken.step == 5:
            raise Killed
        return step(batch)

    broken.train_step = dies_in_the_third_epoch
    with pytest.raises(Killed):
        broken.run_training()

    resumed = make_trainer(trainer_class, dataset, **settings)
    resumed.load_checkpoint(resumed.output_folder + "/checkpoint_latest.pth")
    assert resumed.current_epoch == 2 and resumed.step == 4
    resumed.run_training()

    assert resumed.current_epoch == straight.current_epoch == 3 and resumed.step == straight.step == 6
    assert resumed.progress == straight.progress == 1
    assert_same(straight.network.state_dict(), resumed.network.state_dict())
    assert_same(straight.auxiliary.state_dict(), resumed.auxiliary.state_dict())
    assert_same(straight.method_state, resumed.method_state)
    if straight.teacher is not None:
        assert_same(straight.teacher.state_dict(), resumed.teacher.state_dict())
        deployed = straight.teacher if settings.get("deploy") == "teacher" else straight.network
        saved = torch.load(resumed.output_folder + "/checkpoint_final.pth", weights_only=False)
        assert_same(deployed.state_dict(), saved["network_weights"])
        assert saved["teacher"] is not None
    assert straight.logger.local_logger.terms
    for key in straight.logger.local_logger.terms:
        np.testing.assert_array_equal(straight.logger.get_value(key, None), resumed.logger.get_value(key, None))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]


def test_methods_that_remember_more_are_among_those():
    """A new one has to be added there."""
    tested = {*REPRESENTATIVES, ADMTTrainer, BCPTrainer, AMVLMTrainer, SelfTrainingTrainer, MCFTrainer}
    remember = {t for t in TRAINERS if "initialize" in vars(t) and "method_state" in t.initialize.__code__.co_names}
    assert remember <= tested


@every_trainer
def test_a_training_goes_on_from_a_file_and_from_what_is_in_it(trainer_class, ready):
    dataset = ready()
    first = started(trainer_class, dataset)
    first.on_train_epoch_start()
    first.network.train()
    first.train_step(next(first.dataloader_train))
    file = str(dataset.results / "checkpoint.pth")
    first.save_checkpoint(file)
    content = torch.load(file, weights_only=False)
    outputs = []
    for source in (file, content):
        trainer = make_trainer(trainer_class, dataset, dca_start=0.0)
        trainer.load_checkpoint(source)
        trainer.on_train_start()
        assert trainer.current_epoch == 1 and trainer.step == trainer.num_iterations_per_epoch
        assert_same(first.network.state_dict(), trainer.network.state_dict())
        assert_same(first.auxiliary.state_dict(), trainer.auxiliary.state_dict())
        assert_same(first.method_state, trainer.method_state)
        if first.teacher is not None:
            assert_same(first.teacher.state_dict(), trainer.teacher.state_dict())
        momenta = [s["momentum_buffer"] for s in trainer.optimizer.state_dict()["state"].values()]
        expected = [s["momentum_buffer"] for s in first.optimizer.state_dict()["state"].values()]
        assert momenta and all(torch.equal(a, b) for a, b in zip(momenta, expected, strict=True))
        if trainer_class is SelfTrainingTrainer:
            trainer.on_train_epoch_start()  # it labels, and trains on the labels
        trainer.network.train()
        outputs.append(trainer.train_step(next(trainer.dataloader_train)))
    assert all(torch.isfinite(v) for v in outputs[0].values())
    assert_same(*outputs)


@every_trainer
def test_a_loaded_checkpoint_is_validated_as_it_is_deployed(trainer_class, ready):
    dataset = ready()
    first = started(trainer_class, dataset, deploy="teacher")
    first.network.train()
    first.train_step(next(first.dataloader_train))
    file = str(dataset.results / "best.pth")
    first.save_checkpoint(file)  # in mid-training, as checkpoint_best.pth is
    trainer = make_trainer(trainer_class, dataset, dca_start=0.0, deploy="teacher")
    trainer.load_checkpoint(file)
    deployed = torch.load(file, weights_only=False)["network_weights"]
    assert all(torch.equal(v, deployed[k]) for k, v in trainer.network.state_dict().items())
    trainer.on_train_start()  # but training goes on with the student
    student = first.network.state_dict()
    assert all(torch.equal(v, student[k]) for k, v in trainer.network.state_dict().items())


@every_trainer_with_a_teacher
def test_teacher_starts_from_weights_loaded_after_it_was_made(trainer_class, ready):
    trainer = make_trainer(trainer_class, ready())
    trainer.initialize()
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.fill_(0.5)  # as -pretrained_weights does
    trainer.on_train_start()
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.teacher.parameters(), trainer.network.parameters(), strict=True)
    )


@every_trainer
def test_every_term_is_logged_every_epoch(trainer_class, ready):
    trainer = make_trainer(trainer_class, ready(dims=2, size=32), num_iterations_per_epoch=1)
    trainer.run_training()
    terms = trainer.logger.local_logger.terms
    assert terms and all(t.startswith(PREFIX) for t in terms)
    for term in terms:
        assert len(trainer.logger.get_value(term, None)) == 3
        assert np.isfinite(trainer.logger.get_value(term, None)).all()
    # and what classes unlabelled voxels are taken for
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert "share of voxels in pseudo-labels (in labels), %: kidney " in log


def break_fold(dataset):
    (dataset.preprocessed / "splits_final.json").write_text('[{"train": [], "val": ["tr_000"]}]')


def break_splits(dataset):
    (dataset.preprocessed / "splits_final.json").write_text('[{"train": ["tr_009"], "val": ["tr_000"]}]')


def too_few_for_five_folds(dataset):
    (dataset.preprocessed / "splits_final.json").unlink()


def no_such_configuration(dataset):
    object.__setattr__(dataset, "configuration", "3d_lowres")


def missing_validation_case(dataset):
    splits = [{"train": ["tr_000"], "val": ["tr_009"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(splits))


def not_preprocessed(dataset):
    next(dataset.preprocessed.glob("*__unlabeled.json")).unlink()


def other_plans(dataset):
    file = dataset.preprocessed / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    file.write_text(json.dumps(plans))


def labeled_not_preprocessed(dataset):
    shutil.rmtree(dataset.preprocessed / f"{PLANS}_3d_fullres")


REFUSALS = [
    (break_fold, ["fold 0 has no labelled case", "fold all"]),
    (break_splits, ["splits_final.json", "tr_009"]),
    (missing_validation_case, ["splits_final.json", "tr_009"]),
    (no_such_configuration, ["no configuration 3d_lowres", "use 2d or 3d_fullres"]),
    (too_few_for_five_folds, ["3 labelled cases are too few", "fold all"]),
    (not_preprocessed, ["nnunet_semiseg preprocess_unlabeled -d 901 -c 3d_fullres"]),
    (other_plans, ["other plans", "nnunet_semiseg plan_and_preprocess -d 901 -c 3d_fullres"]),
    (labeled_not_preprocessed, ["nnunet_semiseg plan_and_preprocess -d 901"]),
]


@pytest.mark.parametrize(
    "trainer_class, break_it, words",
    # all are the base's; one of them shows that a method's own `prepare` calls it
    [(SemiSupervisedTrainer, *refusal) for refusal in REFUSALS] + [(t, *REFUSALS[0]) for t in TRAINERS],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_trained_is_refused_in_one_line_and_nothing_is_written(trainer_class, break_it, words, ready):
    dataset = ready()
    break_it(dataset)
    with pytest.raises(UserError) as error:
        make_trainer(trainer_class, dataset, fold=0)
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value) and not dataset.results.exists()


def test_what_is_not_supported_says_so_before_anything_is_written(ready):
    dataset = ready()
    file = dataset.preprocessed / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    file.write_text(json.dumps(plans))
    with pytest.raises(UserError, match="cascade"):
        make_trainer(SemiSupervisedTrainer, dataset)
    assert not dataset.results.exists()


@three_trainers
def test_no_label_of_an_unlabelled_case_is_read(trainer_class, tiny_dataset, monkeypatch):
    """Labels where hidden ones might be looked for change not one bit of fingerprint, plans, batches, weights."""
    results = []
    for noise in (None, 1):
        dataset = tiny_dataset(dataset_id=910 + (noise or 0), test=1)
        if noise is not None:
            hide_labels(dataset, noise)
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        plans = dataset.plan()
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        plans.pop("dataset_name")
        fingerprint = (dataset.preprocessed / "dataset_fingerprint.json").read_bytes()
        results.append((plans, fingerprint, *short_training(trainer_class, dataset)))
    (plans, fingerprint, *training), (other_plans, other_fingerprint, *other_training) = results
    assert plans == other_plans and fingerprint == other_fingerprint
    assert_same_training(training, other_training)


@every_other_trainer
def test_nor_by_the_training_of_any_other_method(trainer_class, ready):
    """The same of batches and weights, with labels that came after planning."""
    dataset = ready(test=1)
    before = short_training(trainer_class, dataset)
    hide_labels(dataset, 1)
    assert_same_training(before, short_training(trainer_class, dataset))


def short_training(trainer_class, dataset) -> tuple[list[dict], dict]:
    """The batches and the final weights of two steps, in the second of which all of the method takes part."""
    trainer = make_trainer(trainer_class, dataset, dca_start=0.0, num_epochs=2, num_iterations_per_epoch=1)
    batches, step = [], trainer.train_step

    def recording(batch):
        batches.append({"data": batch["data"].clone(), **batch.get("views", {}), **batch.get("extra", {})})
        return step(batch)

    trainer.train_step = recording
    with nothing_of_the_test_set_is_opened(dataset):
        trainer.run_training()
    return batches, trainer.network.state_dict()


def assert_same_training(a, b) -> None:
    for one, other in zip(a[0], b[0], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            x, y = ((value if isinstance(value, list) else [value]) for value in (one[key], other[key]))
            assert all(torch.equal(*pair) for pair in zip(x, y, strict=True)), key
    assert_same(a[1], b[1])


def hide_labels(dataset, seed: int) -> None:
    from conftest import write_image

    rng = np.random.default_rng(seed)
    for folder in ("labelsUn", "labelsTr", "labels", "imagesUn/labels", "gt_segmentations"):
        (dataset.raw / folder).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            noise = rng.integers(0, 3, [24] * 3).astype(np.uint8)
            write_image(noise, dataset.raw / folder / f"un_{i:03d}.nii.gz")
