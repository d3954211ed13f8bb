"""Whole trainings and predictions through nnU-Net's own commands, each in a process of its own (`commands`).

Three trainers stand for all: with a teacher, with text, with a network of its own. The others are run once, in this
process; what holds for every trainer is in test_contracts.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import command, start
from conftest import in_threads
from nnunetv2.run.run_training import run_training
from test_contracts import assert_same
from training import PLANS, TRAINERS, write_settings
from watching import nothing_of_the_test_set_is_opened

from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.runs import Run
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.semi_cml import SemiCMLTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegTrainer

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


THOROUGH = [MeanTeacherTrainer, TextSemiSegTrainer, SemiCMLTrainer]
thoroughly = pytest.mark.parametrize("trainer_class", THOROUGH, ids=lambda t: t.__name__)
briefly = pytest.mark.parametrize("trainer_class", [t for t in TRAINERS if t not in THOROUGH], ids=lambda t: t.__name__)


@pytest.fixture
def dataset(ready):
    dataset = ready(test=2)
    write_settings(dataset, num_epochs=2)
    return dataset


def train_args(dataset, trainer_class):
    return [dataset.id, dataset.configuration, "all", "-tr", trainer_class.__name__, "-p", PLANS, "-device", "cpu"]


def images(folder: Path) -> dict:
    return {f.name: sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in sorted(folder.glob("*.nii.gz"))}


@thoroughly
def test_predict_export_and_install_without_open_clip(trainer_class, dataset, tmp_path):
    with nothing_of_the_test_set_is_opened(dataset):
        command("nnUNetv2_train", *train_args(dataset, trainer_class))
    model = dataset.results / f"{trainer_class.__name__}__{PLANS}__{dataset.configuration}"
    assert (model / "fold_all" / "progress.png").stat().st_size > 0
    summary = model / "fold_all" / "validation" / "summary.json"
    validated = json.loads(summary.read_text())["foreground_mean"]
    summary.unlink()
    command("nnUNetv2_train", *train_args(dataset, trainer_class), "--val")
    assert json.loads(summary.read_text())["foreground_mean"] == validated

    # from here on importing open_clip fails, and there is no internet to want
    block = {"without": ["open_clip"], "HF_HUB_OFFLINE": "1"}
    source = dataset.raw / "imagesTs"
    chosen = ["-d", dataset.id, "-c", dataset.configuration, "-tr", trainer_class.__name__, "-p", PLANS, "-f", "all"]
    common = ["-i", source, "-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta"]

    command("nnUNetv2_predict", *chosen, *common, "-o", tmp_path / "a", **block)
    command("nnUNetv2_predict_from_modelfolder", "-m", model, "-f", "all", *common, "-o", tmp_path / "b", **block)
    command("nnUNetv2_export_model_to_zip", *chosen, "-o", tmp_path / "model.zip", **block)
    block["nnUNet_results"] = str(tmp_path / "elsewhere")
    os.mkdir(block["nnUNet_results"])
    command("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "model.zip", **block)
    command("nnUNetv2_predict", *chosen, *common, "-o", tmp_path / "c", **block)

    first = images(tmp_path / "a")
    assert list(first) == ["ts_000.nii.gz", "ts_001.nii.gz"]
    for other in (images(tmp_path / "b"), images(tmp_path / "c")):
        assert all(np.array_equal(first[name], other[name]) for name in first)


@briefly
def test_trains_and_predicts(trainer_class, ready, tmp_path, monkeypatch):
    dataset = ready(dims=2, size=32, test=1)
    epochs = 1 + getattr(trainer_class.settings_class, "rounds", 0)  # self-training begins anew in each
    write_settings(dataset, num_epochs=epochs, num_iterations_per_epoch=1)
    with in_threads(), nothing_of_the_test_set_is_opened(dataset):
        run_training(str(dataset.id), "2d", "all", trainer_class.__name__, PLANS, device=torch.device("cpu"))
    run = Run(dataset.name, "2d", "all", trainer_class.__name__, PLANS)
    assert (run.folder / "validation" / "summary.json").exists()
    monkeypatch.setitem(sys.modules, "open_clip", None)  # from here on importing it fails
    image = dataset.image("ts_000", folder="imagesTs")
    load_predictor(run).predict_from_files_sequential([[str(image)]], [str(tmp_path / "out")])
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.png")))
    assert predicted.shape == (32, 32) and set(np.unique(predicted)) <= {0, 1, 2}


def test_a_refusal_is_one_line_in_nnunets_own_command(dataset):
    args = train_args(dataset, MeanTeacherTrainer)
    (dataset.preprocessed / f"{PLANS}_{dataset.configuration}__unlabeled.json").unlink()
    done = subprocess.run([BIN / "nnUNetv2_train", *map(str, args)], capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and lines[-1].startswith("error: ") and "preprocess_unlabeled" in lines[-1]
    assert not dataset.results.exists()


@thoroughly
def test_killed_in_mid_epoch_and_continued(trainer_class, dataset, tmp_path):
    """SIGKILL, then `--c`: the same weights, teacher and epoch count as a training that was never stopped."""
    args = train_args(dataset, trainer_class)
    folder = Path(dataset.name) / f"{trainer_class.__name__}__{PLANS}__{dataset.configuration}" / "fold_all"
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command("nnUNetv2_train", *args, nnUNet_results=str(straight))

    process, log = start("nnUNetv2_train", *args, nnUNet_results=str(killed))
    while not re.search("Epoch 1 *\n", log.read_text()):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (killed / folder / "checkpoint_final.pth").exists()
    command("nnUNetv2_train", *args, "--c", nnUNet_results=str(killed))

    a, b = (
        torch.load(where / folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        for where in (straight, killed)
    )
    assert a["current_epoch"] == b["current_epoch"] == 2
    assert a["logging"]["train_losses"] == b["logging"]["train_losses"]  # says in which epoch they part
    assert_same(a["network_weights"], b["network_weights"])
    assert (a["teacher"] is None) == (b["teacher"] is None)
    if a["teacher"] is not None:
        assert_same(a["teacher"], b["teacher"])
    assert not list(killed.rglob("*.tmp"))


def test_the_baseline_trains_for_as_long_as_the_plans_say(dataset):
    with nothing_of_the_test_set_is_opened(dataset):
        command("nnUNetv2_train", *train_args(dataset, SupervisedTrainer))
    folder = dataset.results / f"SupervisedTrainer__{PLANS}__{dataset.configuration}" / "fold_all"
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 2 and len(checkpoint["logging"]["train_losses"]) == 2


def test_a_second_training_with_stock_plans_and_no_variable_set(tiny_dataset, monkeypatch):
    """The road of one who has nnU-Net's own plans: nothing but `preprocess_unlabeled` in between."""
    dataset = tiny_dataset(labeled=5, size=16)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    command("nnUNetv2_plan_and_preprocess", "-d", dataset.id, "-c", "3d_fullres", "-npfp", 1, "-np", 1)
    command("nnunet_semiseg", "preprocess_unlabeled", "-d", dataset.id, "-c", "3d_fullres", "-np", 1)
    write_settings(dataset, "nnUNetPlans", num_epochs=1, num_iterations_per_epoch=1)
    words = [dataset.id, "3d_fullres", 0, "-tr", "TextSemiSegTrainer", "-device", "cpu"]
    subprocess.run([BIN / "nnUNetv2_train", *map(str, words)], check=True, capture_output=True)  # as it is installed
    folder = dataset.results / "TextSemiSegTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    assert (folder / "checkpoint_final.pth").exists() and (folder / "validation" / "summary.json").exists()
