"""Distillation to a stock model, and export to ONNX."""

import builtins
import json
import math
import os
import shutil
from functools import partial
from types import SimpleNamespace

import blosc2
import numpy as np
import onnx
import onnxruntime
import pytest
import SimpleITK as sitk
import torch
from commands import command
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from training import PLANS, TRAINERS, bare_trainer, batch_of, make_trainer, terms_of
from watching import no_room_for_files_of, nothing_of_the_test_set_is_opened

from nnunet_semiseg import cli
from nnunet_semiseg.data.preprocessed import case_files
from nnunet_semiseg.data.stamps import stamp
from nnunet_semiseg.deployment import onnx_export
from nnunet_semiseg.deployment.distillation import DistillationTrainer, distill, publish, soft_target_loss
from nnunet_semiseg.deployment.sharing import share
from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import BusyError, DiskError, only_one
from nnunet_semiseg.runs import Run
from nnunet_semiseg.trainers.dtc import DTCTrainer
from nnunet_semiseg.trainers.mc_net import MCNetTrainer
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.semi_cml import SemiCMLTrainer
from nnunet_semiseg.trainers.semiseg import SemiSegTrainer
from nnunet_semiseg.trainers.stlu_net import STLUNetTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegTrainer
from nnunet_semiseg.trainers.urpc import URPCTrainer
from nnunet_semiseg.training.loss_term_logger import LossTermLogger


def test_soft_target_loss_by_hand():
    """One voxel, T = 2: logits halve before the softmax."""
    student, teacher = torch.tensor([0.0, 2 * math.log(3.0)]), torch.tensor([0.0, 0.0])
    # student's (1/4, 3/4), teacher's (1/2, 1/2): KL = ln(1/2) - (ln(1/4) + ln(3/4)) / 2
    kl = math.log(0.5) - (math.log(0.25) + math.log(0.75)) / 2
    s, t = student.view(1, 2, 1).requires_grad_(), teacher.view(1, 2, 1).requires_grad_()
    loss = soft_target_loss(s, t, 2.0, regions=False)
    assert loss.item() == pytest.approx(4 * kl, abs=1e-6)
    loss.backward()
    assert s.grad.abs().sum() > 0 and t.grad is None
    # two regions: sigmoids of 0 and ln 3 are 1/2 and 3/4; only the second differs from the teacher's 1/2
    loss = soft_target_loss(s, t, 2.0, regions=True)
    assert loss.item() == pytest.approx(4 * (0 + kl) / 2, abs=1e-6)
    for regions in (False, True):
        assert soft_target_loss(s, s, 3.0, regions).item() == pytest.approx(0, abs=1e-6)


def test_distillation_teaches_on_both_halves_from_the_weak_view_at_the_settings_temperature():
    """One voxel a sample, T = 3; the networks' logits are 0 and the image; the model that teaches is shown zeros."""

    def says(x):
        return torch.cat((torch.zeros_like(x), x), 1)

    trainer = bare_trainer(DistillationTrainer, network=says, temperature=3.0, distillation_weight=0.5)
    shown = []
    trainer.model = lambda x: (shown.append(x), says(torch.zeros_like(x)))[1]
    weak = torch.full((3, 1, 1, 1), 9.0)
    kl = math.log(0.5) - (math.log(0.25) + math.log(0.75)) / 2  # of (1/4, 3/4) from (1/2, 1/2); of the same it is 0
    same, other = 0.0, 3 * math.log(3.0)
    for labeled, unlabeled, part in ((same, other, 3 / 4), (other, same, 1 / 4)):
        images, strong = torch.full((1, 1, 1, 1), labeled), torch.full((3, 1, 1, 1), unlabeled)
        terms = terms_of(trainer, batch_of(images, weak=weak, strong=strong))
        assert terms["distillation"].item() == pytest.approx(0.5 * 9 * part * kl, abs=1e-6)  # of four samples
        assert terms["supervised"].item() == pytest.approx(math.log(1 + math.exp(labeled)), abs=1e-6)
        assert torch.equal(shown[-2], images) and torch.equal(shown[-1], weak)


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(LossTermLogger, "plot_progress_png", lambda self, folder: None)


REGIONS = dict(regions=True)
ONE_OF_EACH_NETWORK = (MeanTeacherTrainer, TextSemiSegTrainer, DTCTrainer, STLUNetTrainer, SemiCMLTrainer)
"""what is distilled is a network's forward pass"""
EVERY_NETWORK = (*ONE_OF_EACH_NETWORK, SemiSegTrainer, MCNetTrainer, URPCTrainer)
"""what is exported is a network, down to its parts and hooks, and other trainers have the networks of these"""


def test_every_other_trainer_has_the_network_of_one_of_these(ready):
    dataset = ready(dims=2, size=32, channels=2)

    def network_of(trainer_class):
        trainer = make_trainer(trainer_class, dataset)
        trainer.initialize()
        network = trainer.bare_network
        hooked = {module for module in network.modules() if module._forward_pre_hooks or module._forward_hooks}
        return type(network), frozenset((type(module), module in hooked) for module in network.modules())

    these = [network_of(t) for t in EVERY_NETWORK]
    assert len(set(these)) == len(these)
    assert [t.__name__ for t in TRAINERS if network_of(t) not in these] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer_class, kind",
    [*((t, dict(channels=2)) for t in ONE_OF_EACH_NETWORK), (SemiCMLTrainer, REGIONS)],
    ids=[*(t.__name__ for t in ONE_OF_EACH_NETWORK), "SemiCMLTrainer-regions"],
)
def test_a_distilled_model_predicts_without_this_package(trainer_class, kind, trained, tmp_path):
    dataset, run, _ = trained(trainer_class, **kind)
    with nothing_of_the_test_set_is_opened(dataset):
        stock = distill(run, ["num_epochs=1", "distillation_weight=0.5"], "cpu")
    assert stock.name == f"nnUNetTrainer__{PLANS}_from_{trainer_class.__name__}__3d_fullres"
    checkpoint = torch.load(stock / "fold_all" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and not {"teacher", "semiseg"} & set(checkpoint)
    assert "semiseg" not in json.loads((stock / "plans.json").read_text())

    without = {"without": ["nnunet_semiseg"]}
    model = ["-d", dataset.id, "-c", "3d_fullres", "-f", "all", "-p", f"{PLANS}_from_{trainer_class.__name__}"]
    about = ["-i", dataset.raw / "imagesTs", "-o", tmp_path / "out", "-device", "cpu", "-npp", 1, "-nps", 1]
    command("nnUNetv2_predict", *model, *about, **without)
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "ts_000.nii.gz")))
    assert predicted.shape == (24, 24, 24)
    command("nnUNetv2_export_model_to_zip", *model, "-o", tmp_path / "model.zip", **without)


def test_a_shared_model_is_a_stock_one_and_gives_the_same_voxels(trained):
    """The weights that are shared are those that are deployed: the teacher's."""
    _, run, trainer = trained(SemiSegTrainer)
    stock = share(run)
    assert stock.name == f"nnUNetTrainer__{PLANS}_from_SemiSegTrainer__3d_fullres"
    checkpoint = torch.load(stock / "fold_all" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and not {"teacher", "semiseg"} & set(checkpoint)
    plans = json.loads((stock / "plans.json").read_text())
    assert "semiseg" not in plans and plans["plans_name"] == f"{PLANS}_from_SemiSegTrainer"
    assert checkpoint["init_args"]["plans"]["plans_name"] == plans["plans_name"]
    stock_predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock_predictor.initialize_from_trained_model_folder(str(stock), ("all",), "checkpoint_final.pth")
    image = torch.randn(1, 20, 24, 24)
    own, shared = (p.predict_sliding_window_return_logits(image) for p in (load_predictor(run), stock_predictor))
    assert torch.equal(own, shared)
    weight = next(iter(trainer.teacher.parameters()))
    assert torch.equal(next(iter(stock_predictor.network.parameters())), weight)


@pytest.mark.parametrize("trainer_class", [DTCTrainer, SemiCMLTrainer])
def test_another_network_than_the_plans_is_not_shared(trainer_class, trained):
    kind = dict(channels=2) if trainer_class is SemiCMLTrainer else {}
    dataset, run, _ = trained(trainer_class, **kind)
    with pytest.raises(UserError, match=f"is not the one of the plans: use nnunet_semiseg distill -d {dataset.name}"):
        share(run)
    assert not list(run.model_folder.parent.glob("nnUNetTrainer__*"))


def test_distillation_learns_goes_on_and_is_left_alone_when_finished(trained, no_plots, monkeypatch):
    dataset, run, _ = trained(SemiCMLTrainer)
    dataset_plans = (dataset.preprocessed / f"{PLANS}.json").read_bytes()

    class Killed(Exception):
        pass

    step = DistillationTrainer.train_step

    def dies(self, batch):
        if self.step == 3:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(DistillationTrainer, "train_step", dies)
    with pytest.raises(Killed):
        distill(run, ["temperature=3"], "cpu")
    steps = []
    monkeypatch.setattr(DistillationTrainer, "train_step", lambda s, b: (steps.append(s.step), step(s, b))[1])
    stock = distill(run, ["temperature=3"], "cpu")
    assert steps == [2, 3, 4, 5]
    file = stock / "fold_all" / "checkpoint_final.pth"
    before = file.stat()
    assert distill(run, ["temperature=3"], "cpu") == stock and file.stat() == before and len(steps) == 4
    assert not list(dataset.results.glob("DistillationTrainer__*"))
    assert (dataset.preprocessed / f"{PLANS}.json").read_bytes() == dataset_plans
    log = torch.load(file, weights_only=False)["logging"]["loss/distillation"]
    assert len(log) == 3 and all(value > 0 for value in log)
    # a stock trainer takes it for its own
    plans = json.loads((stock / "plans.json").read_text()) | {"continue_training": True}
    theirs = nnUNetTrainer(
        plans, "3d_fullres", "all", json.loads((stock / "dataset.json").read_text()), torch.device("cpu")
    )
    theirs.load_checkpoint(str(file))
    assert theirs.current_epoch == 3
    student = load_predictor(Run(run.dataset, run.configuration, "all", "nnUNetTrainer", plans["plans_name"])).network
    assert torch.equal(next(student.parameters()), next(theirs.network.parameters()).cpu())


def test_removed_it_is_distilled_again_and_another_model_or_setting_is_not_mixed_in(trained, no_plots, monkeypatch):
    dataset, run, trainer = trained(SupervisedTrainer, dims=2, size=32)
    settings = ["num_epochs=3", "save_every=1"]
    end = DistillationTrainer.on_epoch_end

    def dies(self):
        end(self)
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DistillationTrainer, "on_epoch_end", dies)
    with pytest.raises(KeyboardInterrupt):
        distill(run, settings, "cpu")
    with pytest.raises(
        UserError, match="a distillation that was begun, but temperature changed since then: remove that"
    ):
        distill(run, [*settings, "temperature=3"], "cpu")
    monkeypatch.setattr(DistillationTrainer, "on_epoch_end", end)
    stock = distill(run, settings, "cpu")
    with pytest.raises(UserError, match="a distillation that was finished, but temperature changed since"):
        distill(run, [*settings, "temperature=3"], "cpu")
    first = torch.load(stock / "fold_all" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    shutil.rmtree(stock)
    stock = distill(run, [*settings, "temperature=7", "distillation_weight=50"], "cpu")
    again = torch.load(stock / "fold_all" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert any(not torch.equal(first[k], again[k]) for k in first)


def test_a_full_disk_publishes_no_half_model(tmp_path):
    trained, stock = tmp_path / "trained" / "fold_0", tmp_path / "stock"
    (trained / "validation").mkdir(parents=True)
    (trained / "validation" / "a.nii.gz").write_bytes(bytes(200_000))
    with no_room_for_files_of(100_000), pytest.raises(DiskError) as error:
        publish(trained, stock, "other")
    half = stock / "fold_0" / "validation" / "a.nii.gz"
    assert str(error.value).startswith(f"{half}: cannot be written (") and "File too large" in str(error.value)
    assert not list(stock.rglob("checkpoint*"))


def test_another_model_is_not_gone_on_with(trained, no_plots, monkeypatch):
    _, run, trainer = trained(SupervisedTrainer, dims=2, size=32)
    validate = DistillationTrainer.perform_actual_validation
    monkeypatch.setattr(DistillationTrainer, "perform_actual_validation", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill(run, ["num_epochs=1"], "cpu")
    torch.nn.init.normal_(next(trainer.network.parameters()))
    trainer.save_checkpoint(str(run.checkpoint))
    with pytest.raises(UserError, match="was begun, but the trained model changed since"):
        distill(run, ["num_epochs=1"], "cpu")
    monkeypatch.setattr(DistillationTrainer, "perform_actual_validation", validate)
    for folder in run.model_folder.parent.glob("DistillationTrainer__*"):
        shutil.rmtree(folder)
    distill(run, ["num_epochs=1"], "cpu")
    torch.nn.init.zeros_(next(trainer.network.parameters()))
    trainer.save_checkpoint(str(run.checkpoint))
    with pytest.raises(UserError, match="was finished, but the trained model changed since"):
        distill(run, ["num_epochs=1"], "cpu")


def test_what_a_case_lacks_is_not_shown_to_the_model_as_noise(trained, no_plots, monkeypatch):
    """A channel that is 0 in the file stays 0 under augmentation, in every view."""
    dataset, run, _ = trained(SemiCMLTrainer, dims=2, size=32, channels=2)
    for file in dataset.preprocessed.rglob("*.b2nd"):
        if "_seg" not in file.name:
            blosc2.open(str(file), mode="a")[1] = 0
    for file in dataset.preprocessed.glob("*__unlabeled.json"):  # it would not pass for what was preprocessed
        manifest = json.loads(file.read_text())
        for case, entry in manifest["cases"].items():
            entry["made"] = [stamp(f) for f in case_files(file.with_suffix(""), case)]
        file.write_text(json.dumps(manifest))
    for file in dataset.preprocessed.glob("*__labeled.json"):
        file.unlink()
    seen = []
    step = DistillationTrainer.train_step
    monkeypatch.setattr(DistillationTrainer, "train_step", lambda s, b: (seen.append(b), step(s, b))[1])
    distill(run, ["num_epochs=3"], "cpu")
    for batch in seen:
        for images in (batch["data"], *batch["views"].values()):
            assert (images[:, 1] == 0).all() and (images[:, 0] != 0).any()


def test_a_model_that_knows_sides_teaches_no_flips(trained, no_plots, monkeypatch):
    _, run, trainer = trained(SupervisedTrainer, dims=2, size=32)
    trainer.inference_allowed_mirroring_axes = (0,)
    trainer.save_checkpoint(str(run.checkpoint))
    seen = []
    ranges = DistillationTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size
    monkeypatch.setattr(
        DistillationTrainer,
        "configure_rotation_dummyDA_mirroring_and_inital_patch_size",
        lambda self: seen.append(ranges(self)) or seen[-1],
    )
    stock = distill(run, ["num_epochs=1"], "cpu")
    rotation, _, _, axes = seen[0]
    assert axes == (0,) and max(map(abs, rotation)) == pytest.approx(math.radians(15))
    checkpoint = torch.load(stock / "fold_all" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] == (0,)


def test_the_fix_names_the_plans_that_there_are(trained):
    dataset, run, _ = trained(SupervisedTrainer, dims=2, size=32)
    shutil.copy(dataset.image("un_000"), dataset.image("un_009"))
    with pytest.raises(UserError, match=f"preprocess_unlabeled -d 901 -c 2d -plans_name {PLANS}$"):
        distill(run, [], "cpu")


def test_the_taught_network_comes_nearer_to_its_teacher(trained, no_plots):
    _, run, _ = trained(SemiCMLTrainer, dims=2, size=32)
    stock = distill(run, ["num_epochs=6", "num_iterations_per_epoch=5", "distillation_weight=10"], "cpu")
    terms = torch.load(stock / "fold_all" / "checkpoint_final.pth", weights_only=False)["logging"]["loss/distillation"]
    assert terms[-1] < 0.5 * terms[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer_class, kind",
    [
        *((t, dict(dims=2, size=32, channels=2)) for t in EVERY_NETWORK),
        (SemiCMLTrainer, REGIONS),
        (DTCTrainer, REGIONS),
    ],
    ids=[*(t.__name__ for t in EVERY_NETWORK), "SemiCMLTrainer-3d-regions", "DTCTrainer-3d-regions"],
)
def test_onnx_gives_what_torch_gives(trainer_class, kind, trained, tmp_path):
    dataset, run, _ = trained(trainer_class, **kind)
    file = tmp_path / "model.onnx"
    assert onnx_export.export_onnx(run, file) <= onnx_export.TOLERANCE
    about = json.loads({p.key: p.value for p in onnx.load(str(file)).metadata_props}["nnunet"])
    assert (
        about["trainer"] == trainer_class.__name__
        and about["labels"] == json.loads((dataset.raw / "dataset.json").read_text())["labels"]
    )
    x = np.random.default_rng(0).normal(size=(3, len(about["channel_names"]), *about["patch_size"]))
    (got,) = onnxruntime.InferenceSession(str(file)).run(None, {"image": x.astype(np.float32)})
    with torch.no_grad():
        expected = load_predictor(run).network(torch.from_numpy(x).float())
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("channels", ["channel_names", "modality"])  # the latter in old data sets
def test_an_export_says_what_stands_around_the_network(channels):
    plans = dict(
        foreground_intensity_properties_per_channel={"0": {"mean": 90.0}},
        transpose_forward=(1, 0, 2), transpose_backward=(1, 2, 0),
    )  # fmt: skip
    configuration = dict(
        patch_size=(8, 16, 32), spacing=(3.0, 0.7, 0.8), normalization_schemes=["ZScoreNormalization"],
        use_mask_for_norm=[True],
    )  # fmt: skip
    dataset_json = dict(labels={"background": 0, "both": [1, 2]}, regions_class_order=[1, 2])
    resampling = {"resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": {"order": 3}}
    manager = SimpleNamespace(**configuration, configuration=configuration | resampling)
    predictor = SimpleNamespace(
        plans_manager=SimpleNamespace(**plans), configuration_manager=manager,
        dataset_json=dataset_json | {channels: {"0": "T1"}},
        allowed_mirroring_axes=(0, 2), trainer_name="DTCTrainer", tile_step_size=0.5, use_gaussian=True,
    )  # fmt: skip
    about = json.loads(json.dumps(onnx_export.metadata(predictor)))
    expected = plans | configuration | dataset_json | dict(mirroring_axes=(0, 2), trainer="DTCTrainer")
    expected |= dict(channel_names={"0": "T1"}, resampling=resampling, tile_step_size=0.5, use_gaussian=True)
    assert about == json.loads(json.dumps(expected))


def test_an_export_into_no_folder_is_refused_at_once(trained, tmp_path, monkeypatch):
    _, run, _ = trained(SupervisedTrainer, dims=2, size=32)
    monkeypatch.setattr(torch.onnx, "export", None)
    with pytest.raises(UserError, match="model.onnx: there is no folder .*: make it, or choose another"):
        onnx_export.export_onnx(run, tmp_path / "nosuch" / "model.onnx")
    with pytest.raises(UserError, match=": is a folder: give the name of a file with --onnx FILE"):
        onnx_export.export_onnx(run, tmp_path)


def test_a_damaged_checkpoint_is_said_to_be_one(trained, tmp_path):
    _, run, _ = trained(SupervisedTrainer, dims=2, size=32)
    whole = run.checkpoint.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:1000], whole[:middle] + bytes(64) + whole[middle + 64 :]):  # torch reads the latter
        run.checkpoint.write_bytes(damaged)
        onnx = partial(onnx_export.export_onnx, run, tmp_path / "model.onnx")
        for use in (onnx, partial(distill, run, [], "cpu"), partial(share, run)):
            with pytest.raises(
                UserError, match="checkpoint_final.pth: cannot be read .*: remove it and continue the training"
            ):
                use()


def test_a_second_distillation_of_a_model_is_told_who_distils(trained):
    _, run, _ = trained(SupervisedTrainer, dims=2, size=32)
    lock = run.model_folder.parent / f".{run.model_folder.name}__fold_all.lock"
    with only_one(lock, "x"), pytest.raises(BusyError, match=rf"^{lock}: process {os.getpid()} on \S+ distils"):
        distill(run, [], "cpu")


def test_an_export_that_differs_is_not_written(trained, tmp_path, monkeypatch):
    _, run, _ = trained(SupervisedTrainer, dims=2, size=32)
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1)
    with pytest.raises(UserError, match="model.onnx: not written, because the outputs of ONNX and torch differ"):
        onnx_export.export_onnx(run, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_wrong_use_is_one_line(trained, tmp_path, monkeypatch, capsys):
    dataset, run, _ = trained(SemiCMLTrainer, dims=2, size=32)
    model = ["-d", str(dataset.id), "-c", "2d", "-f", "all", "-p", PLANS]
    for words, expected in (
        (["distill", *model, "-tr", "MeanTeacherTrainer", "-device", "cpu"], "training of MeanTeacherTrainer first"),
        (["export", *model, "-tr", "MeanTeacherTrainer", "--onnx", "m.onnx"], "training of MeanTeacherTrainer first"),
        (["distill", *model, "-tr", "MeanTeacher"], "MeanTeacherTrainer"),
        (["distill", *model, "-tr", "SemiCMLTrainer", "-device", "cpu", "--set", "temprature=2"], "temprature"),
        (["distill", *model, "-tr", "SemiCMLTrainer", "-device", "cpu", "--set", "temperature=0"], "temperature=0"),
        (["distill", *model, "-tr", "SemiCMLTrainer", "-device", "cpu", "--set", "width=full"], "setting width"),
        (["distill", *model, "-tr", "SemiCMLTrainer"], "-device cuda: PyTorch finds no GPU: use -device cpu"),
        (["distill", *model, "-tr", "SemiCMLTrainer", "-device", "mps"], "-device mps: this exists only on a Mac"),
    ):
        assert cli.main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and len(error.splitlines()) == 1, error
    assert not list(dataset.results.glob("*_from_*"))

    def without_onnx(name, *rest, real=builtins.__import__):
        if name == "onnxruntime":
            raise ImportError("no", name="onnxruntime")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    assert cli.main(["export", *model, "-tr", "SemiCMLTrainer", "--onnx", str(tmp_path / "m.onnx")]) == 1
    assert "onnxruntime: not installed: pip install onnx onnxruntime onnxscript" in capsys.readouterr().err
