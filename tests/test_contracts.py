"""What holds for every semi-supervised trainer; a new one is found by being in `trainers/`."""

import json
import shutil

import numpy as np
import pytest
import torch
from training import PLANS, TRAINERS, in_last_epoch, make_trainer

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.training.loss_term_logger import PREFIX, LossTermLogger

DATASETS = {
    "3d": dict(dims=3),
    "2d": dict(dims=2, size=32),
    "regions": dict(dims=3, regions=True),
    "2 channels": dict(dims=3, channels=2),
    "2 classes": dict(dims=3, structures=1, labels={"background": 0, "a": 1}),
    "4 classes": dict(dims=3, structures=3, labels={"background": 0, "a": 1, "b": 2, "c": 3}),
    "ignore": dict(dims=3, labels={"background": 0, "kidney": 1, "ignore": 2}),
}

every_trainer = pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda t: t.__name__)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(LossTermLogger, "plot_progress_png", lambda self, folder: None)


def started(trainer_class, dataset, **settings):
    trainer = make_trainer(trainer_class, dataset, dca_start=0.0, **settings)
    trainer.on_train_start()
    return trainer


def snapshot(parameters):
    return [p.detach().clone() for p in parameters]


@every_trainer
@pytest.mark.parametrize("kind", DATASETS)
def test_two_steps_route_the_gradients(trainer_class, kind, ready):
    trainer = started(trainer_class, ready(**DATASETS[kind]))
    trainer.network.train()
    before = snapshot(trainer.trainable)
    frozen = [m for m in trainer.auxiliary.values() if hasattr(m, "tower")]
    towers = [snapshot(m.tower.parameters()) for m in frozen]

    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]

    terms = [k for k in outputs[0] if k != "loss"]
    assert "loss" in outputs[0] and len(terms) >= 2 and list(outputs[1]) == list(outputs[0])
    for out in outputs:
        assert all(torch.isfinite(v) and not v.requires_grad for v in out.values())
        torch.testing.assert_close(out["loss"], sum(out[k] for k in terms))

    # nnU-Net gives the coarsest output no weight, so that its layer learns nothing
    named = (*trainer.network.named_parameters(), *trainer.auxiliary.named_parameters())
    several = [n for n, _ in named if "seg_layers.1." in n]  # else the only one is the finest
    unused = {id(p) for n, p in named if "seg_layers.0." in n and n.replace("layers.0.", "layers.1.") in several}
    names = {id(p): n for n, p in named}
    for p in trainer.trainable:
        if id(p) not in unused:
            # a bias before an instance norm has a gradient of rounding errors only, but it has one
            assert p.grad is not None and torch.isfinite(p.grad).all(), names[id(p)]
            assert p.grad.abs().max() > 0 or names[id(p)].endswith("bias"), names[id(p)]
    moved = [not torch.equal(p, old) for p, old in zip(trainer.trainable, before, strict=True)]
    assert np.mean(moved) > 0.9

    for module, tower in zip(frozen, towers, strict=True):
        assert not any(m.training for m in module.tower.modules())
        assert all(p.grad is None for p in module.tower.parameters())
        assert all(torch.equal(a, b) for a, b in zip(module.tower.parameters(), tower, strict=True))
    for name, p in trainer.auxiliary.named_parameters():
        if id(p) in unused:
            continue
        old = before[[id(q) for q in trainer.trainable].index(id(p))]
        moved = (p != old).flatten(1) if p.ndim > 3 else (p != old)  # of a convolution every output channel
        assert moved.any(-1).all(), f"a token of {name} stayed where it was"

    if trainer.teacher is not None:
        assert not any(m.training for m in trainer.teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.parameters())
        shared = {id(p) for p in trainer.network.parameters()} & {id(p) for p in trainer.teacher.parameters()}
        assert not shared


@every_trainer
def test_every_term_of_the_method_teaches(trainer_class, ready):
    """That the labels give every parameter a gradient hides a term that gives none."""
    trainer = in_last_epoch(trainer_class, ready())
    semi_losses, teaches = trainer.semi_losses, {}

    def differentiated(*args):
        terms = semi_losses(*args)
        for name, term in terms.items():
            teaches[name] = term.requires_grad and any(
                g is not None
                for g in torch.autograd.grad(term, trainer.trainable, retain_graph=True, allow_unused=True)
            )
        return terms

    trainer.semi_losses = differentiated
    trainer.train_step(next(trainer.dataloader_train))
    assert teaches and all(teaches.values())


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
def test_trains_on_residual_encoder_plans(trainer_class, tiny_dataset, monkeypatch):
    dataset = tiny_dataset(dims=2, size=32)
    dataset.plan("SemiSegPlannerResEncM")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = started(trainer_class, dataset, plans="nnUNetSemiSegResEncUNetMPlans")
    trainer.network.train()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(v) for v in out.values())


@pytest.mark.slow
@every_trainer
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # as trainers that compile set it
def test_a_compiled_network_is_one_graph_and_is_not_compiled_again(trainer_class, ready):
    """Dynamo without inductor: a break raises, and a step that changes a shape or a function would add a graph."""
    trainer = started(trainer_class, ready(dims=2, size=32), mc_passes=2)
    trainer.network.train()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        assert all(isinstance(n, int) for x in inputs if isinstance(x, torch.Tensor) for n in x.shape)
        return graph.forward

    torch._dynamo.reset()
    trainer.network = torch.compile(trainer.network, backend=count, fullgraph=True)
    if trainer.teacher is not None:
        trainer.teacher = torch.compile(trainer.teacher, backend=count, fullgraph=True)
    for trainer.step in (0, 3, 0, 3):  # methods change in mid-training
        before = len(graphs)
        trainer.train_step(next(trainer.dataloader_train))
    assert len(graphs) == before > 0


@every_trainer
def test_the_predictors_network_takes_the_weights(trainer_class, ready):
    """Prediction builds the network without deep supervision, and by the class alone."""
    trainer = make_trainer(trainer_class, ready(dims=2, size=32))
    trainer.initialize()
    about = trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels
    network = trainer_class.build_network_architecture(*about, trainer.label_manager.num_segmentation_heads, False)
    network.load_state_dict(trainer.network.state_dict())


@every_trainer
def test_teacher_follows_by_ema(trainer_class, ready):
    trainer = started(trainer_class, ready())
    if trainer.teacher is None:
        pytest.skip("the method has no teacher")
    teacher = snapshot(trainer.teacher.parameters())
    trainer.train_step(next(trainer.dataloader_train))  # step 1: the average of two
    for t, old, s in zip(trainer.teacher.parameters(), teacher, trainer.network.parameters(), strict=True):
        torch.testing.assert_close(t, 0.5 * old + 0.5 * s)
    trainer.step = 10**6
    teacher = snapshot(trainer.teacher.parameters())
    trainer.train_step(next(trainer.dataloader_train))
    for t, old, s in zip(trainer.teacher.parameters(), teacher, trainer.network.parameters(), strict=True):
        torch.testing.assert_close(t, 0.99 * old + 0.01 * s)


@every_trainer
@pytest.mark.parametrize("deploy", ["student", "teacher"])
def test_resumed_training_ends_where_an_uninterrupted_one_does(trainer_class, deploy, ready):
    dataset = ready()
    settings = dict(deploy=deploy, dca_start=0.5)
    straight = make_trainer(trainer_class, dataset, **settings)
    if deploy == "teacher" and not hasattr(straight.settings, "deploy"):
        pytest.skip("the method has no teacher")
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
        deployed = straight.teacher if deploy == "teacher" else straight.network
        saved = torch.load(resumed.output_folder + "/checkpoint_final.pth", weights_only=False)
        assert_same(deployed.state_dict(), saved["network_weights"])
        assert saved["teacher"] is not None
    for key in straight.logger.local_logger.terms:
        np.testing.assert_array_equal(straight.logger.get_value(key, None), resumed.logger.get_value(key, None))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]


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


@every_trainer
def test_teacher_starts_from_weights_loaded_after_it_was_made(trainer_class, ready):
    trainer = make_trainer(trainer_class, ready())
    trainer.initialize()
    if trainer.teacher is None:
        pytest.skip("the method has no teacher")
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.fill_(0.5)  # as -pretrained_weights does
    trainer.on_train_start()
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.teacher.parameters(), trainer.network.parameters(), strict=True)
    )


@every_trainer
def test_every_term_is_logged_every_epoch(trainer_class, ready):
    trainer = make_trainer(trainer_class, ready())
    trainer.run_training()
    terms = trainer.logger.local_logger.terms
    assert len(terms) >= 2 and all(t.startswith(PREFIX) for t in terms)
    for term in terms:
        assert len(trainer.logger.get_value(term, None)) == 3
        assert np.isfinite(trainer.logger.get_value(term, None)).all()


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


@every_trainer
@pytest.mark.parametrize(
    "break_it, words",
    [
        (break_fold, ["fold 0 has no labelled case", "fold all"]),
        (break_splits, ["splits_final.json", "tr_009"]),
        (missing_validation_case, ["splits_final.json", "tr_009"]),
        (no_such_configuration, ["no configuration 3d_lowres", "use 2d or 3d_fullres"]),
        (too_few_for_five_folds, ["3 labelled cases are too few", "fold all"]),
        (not_preprocessed, ["nnunet_semiseg preprocess_unlabeled -d 901 -c 3d_fullres"]),
        (other_plans, ["other plans", "nnunet_semiseg preprocess_unlabeled -d 901 -c 3d_fullres"]),
        (labeled_not_preprocessed, ["nnunet_semiseg plan_and_preprocess -d 901"]),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line_and_nothing_is_written(trainer_class, break_it, words, ready):
    dataset = ready()
    break_it(dataset)
    with pytest.raises(UserError) as error:
        make_trainer(trainer_class, dataset, fold=0)
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value) and not dataset.results.exists()


@every_trainer
def test_what_is_not_supported_says_so_before_anything_is_written(trainer_class, ready, monkeypatch):
    dataset = ready()
    file = dataset.preprocessed / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    file.write_text(json.dumps(plans))
    with pytest.raises(UserError, match="cascade"):
        make_trainer(trainer_class, dataset)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(UserError, match="several GPUs"):
        make_trainer(trainer_class, dataset)
    assert not dataset.results.exists()


@every_trainer
def test_no_label_of_an_unlabelled_case_is_read(trainer_class, tiny_dataset, monkeypatch):
    """Labels where hidden ones might be looked for change not one bit of fingerprint, plans, batches, weights."""
    results = []
    for noise in (None, 1):
        dataset = tiny_dataset(dataset_id=910 + (noise or 0))
        if noise is not None:
            hide_labels(dataset, noise)
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        plans = dataset.plan()
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        trainer = make_trainer(trainer_class, dataset, dca_start=0.0, num_epochs=2, num_iterations_per_epoch=1)
        batches, step = [], trainer.train_step

        def recording(batch, batches=batches, step=step):
            batches.append({"data": batch["data"].clone(), **batch["unlabeled"]})
            return step(batch)

        trainer.train_step = recording
        trainer.run_training()
        plans.pop("dataset_name")
        fingerprint = (dataset.preprocessed / "dataset_fingerprint.json").read_bytes()
        results.append((plans, fingerprint, batches, trainer.network.state_dict()))
    (plans, fingerprint, batches, weights), other = results
    assert plans == other[0] and fingerprint == other[1]
    for a, b in zip(batches, other[2], strict=True):
        assert_same(a, b)
    assert_same(weights, other[3])


def hide_labels(dataset, seed: int) -> None:
    from conftest import write_image

    rng = np.random.default_rng(seed)
    for folder in ("labelsUn", "labelsTr", "labels", "imagesUn/labels", "gt_segmentations"):
        (dataset.raw / folder).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            noise = rng.integers(0, 3, [24] * 3).astype(np.uint8)
            write_image(noise, dataset.raw / folder / f"un_{i:03d}.nii.gz")
