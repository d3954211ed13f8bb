"""A training's folder: who trains there, with which settings, and what is left when something goes wrong."""

import json
import os
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from training import PLANS, make_trainer
from watching import no_room_for_files_of, opened_in

from nnunet_semiseg import files
from nnunet_semiseg.data.pseudo_label_files import write_pseudo_label
from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled
from nnunet_semiseg.data.written_images import check_written, write_image
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import BusyError, DiskError, only_one, reading
from nnunet_semiseg.settings.plans import ACCEPT_CHANGES, given_settings, parse_assignments, store_settings
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training import plans_trainer
from nnunet_semiseg.training.checkpoint import refuse_other_settings
from nnunet_semiseg.training.finite import what_is_not_finite
from nnunet_semiseg.training.loss_term_logger import LossTermLogger

two_trainers = pytest.mark.parametrize("trainer_class", [SupervisedTrainer, MeanTeacherTrainer])


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(LossTermLogger, "plot_progress_png", lambda self, folder: None)


@pytest.fixture
def dataset(ready):
    return ready(dims=2, size=32)


def one_line_of(error) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


def saved(trainer, name="checkpoint_latest.pth") -> dict:
    return torch.load(Path(trainer.output_folder, name), weights_only=False)


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# -------------------------------------------------------------------------------------------------------- not finite


def test_what_is_not_finite_is_named():
    ok, bad = torch.zeros(2), torch.tensor([0.0, float("inf")])
    log = {"train_losses": [float("nan"), 1.0], "loss/a": [float("nan"), 2.0], "val_losses": [float("nan")]}
    assert what_is_not_finite(log, [ok, ok]) is None  # of the last epoch's training
    assert what_is_not_finite(log, [ok, bad]) == "the weights are not finite"
    log = {"train_losses": [float("inf")], "loss/a": [2.0], "loss/b": [float("inf")], "loss/c": [float("nan")]}
    assert what_is_not_finite(log, [ok]) == "the loss is inf (terms: b, c)"
    assert what_is_not_finite({"train_losses": [float("nan")]}, [ok]) == "the loss is nan"


@two_trainers
@pytest.mark.parametrize("when", ["in the epoch", "in its last step"])
def test_a_training_without_finite_numbers_ends_and_keeps_the_last_good_checkpoint(trainer_class, when, dataset):
    """Weights become NaN before, or after, the second step of the second epoch."""
    trainer = make_trainer(trainer_class, dataset)
    train_step, steps = trainer.train_step, []

    def breaks(batch):
        steps.append(batch)
        if len(steps) == 4 and when == "in the epoch":
            next(trainer.network.parameters()).data.fill_(float("nan"))
        result = train_step(batch)
        if len(steps) == 4:
            next(trainer.network.parameters()).data.fill_(float("nan"))
        return result

    trainer.train_step = breaks
    with pytest.raises(UserError) as error:
        trainer.run_training()
    line = one_line_of(error)
    what = "the loss is nan" if when == "in the epoch" else "the weights are not finite"
    assert line.startswith(f"{trainer.output_folder}: epoch 1: {what}") and "checkpoint_latest.pth is kept" in line
    assert line.endswith("and continue with --c or train again")
    if trainer_class is MeanTeacherTrainer and when == "in the epoch":
        assert "(terms: supervised, consistency)" in line
    assert len(steps) == 4 and not Path(trainer.output_folder, "checkpoint_final.pth").exists()
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        kept = saved(trainer, name)
        assert kept["current_epoch"] == 1
        assert all(w.isfinite().all() for w in kept["network_weights"].values())


# ---------------------------------------------------------------------------------------------------------- settings


def test_a_training_keeps_the_settings_that_it_was_started_with(dataset):
    trainer = make_trainer(MeanTeacherTrainer, dataset, num_epochs=1, num_labeled=2)
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "training cases: 2 labelled, 5 unlabelled; validation cases: 2" in log  # of fold all: 3 and 4 before
    (line,) = re.findall("settings that differ from the defaults: (.*)", log)
    assert "num_epochs=1, " in line and "num_labeled=2, " in line and "ema_decay" not in line
    store_settings(dataset.preprocessed / f"{PLANS}.json", {"num_epochs": 7, "ema_decay": 0.5})
    assert trainer.num_epochs == 1
    settings = json.loads(Path(trainer.output_folder, "settings.json").read_text(encoding="utf-8"))
    assert settings == json.loads(json.dumps(asdict(trainer.settings)))
    assert settings["num_epochs"] == 1 and settings["ema_decay"] is None  # the default is written down, too


def test_given_settings_are_trained_with_and_written_when_it_begins(dataset):
    file = dataset.preprocessed / f"{PLANS}.json"
    with given_settings({"num_epochs": 2, "ema_decay": 0.9}):
        trainer = make_trainer(MeanTeacherTrainer, dataset)
        assert "semiseg" not in dataset.plans(PLANS) and trainer.settings.ema_decay == 0.9
        trainer.on_train_start()
    assert dataset.plans(PLANS)["semiseg"] == {"num_epochs": 2, "ema_decay": 0.9}
    trained_with = json.loads(Path(trainer.output_folder).parent.joinpath("plans.json").read_text(encoding="utf-8"))[
        "semiseg"
    ]
    assert (trained_with["num_epochs"], trained_with["ema_decay"]) == (2, 0.9)
    before = file.read_bytes()
    with given_settings({"num_labeled": 99}), pytest.raises(UserError, match="num_labeled"):
        make_trainer(MeanTeacherTrainer, dataset).on_train_start()
    assert file.read_bytes() == before


def test_where_given_settings_cannot_be_stored_a_model_keeps_its_own(dataset, monkeypatch):
    make_trainer(SupervisedTrainer, dataset, num_epochs=1).on_train_start()
    monkeypatch.setattr(plans_trainer, "store_given", Mock(side_effect=DiskError("read-only")))
    trainer = make_trainer(SupervisedTrainer, dataset, num_epochs=5)
    with pytest.raises(DiskError):
        trainer.on_train_start()
    assert json.loads(Path(trainer.output_folder, "settings.json").read_text(encoding="utf-8"))["num_epochs"] == 1


@two_trainers
def test_going_on_with_other_settings_is_refused_unless_they_are_accepted(trainer_class, dataset, monkeypatch):
    first = make_trainer(trainer_class, dataset)
    first.on_train_start()
    first.save_checkpoint(str(Path(first.output_folder, "checkpoint_latest.pth")))
    file = str(Path(first.output_folder, "checkpoint_latest.pth"))

    trainer = make_trainer(trainer_class, dataset, goes_on=True, num_epochs=5, dca="off")  # dca is another trainer's
    with pytest.raises(UserError) as error:
        trainer.load_checkpoint(file)
    line = one_line_of(error)
    assert not Path(trainer.log_file).exists()  # nothing was trained
    assert line.startswith(f"{file}: was trained with other settings: num_epochs was 3 and is 5: set them back with")
    assert "--set num_epochs=3," in line and "--accept-changes" in line and f"{ACCEPT_CHANGES}=1 nnUNetv2_train" in line

    make_trainer(trainer_class, dataset, goes_on=True).load_checkpoint(file)  # the same settings
    make_trainer(trainer_class, dataset, num_epochs=5).load_checkpoint(file)  # to be validated alone
    with given_settings({}, accept_changes=True):
        trainer = make_trainer(trainer_class, dataset, goes_on=True, num_epochs=5)
        trainer.load_checkpoint(file)
    assert trainer.num_epochs == 5 and ACCEPT_CHANGES not in os.environ
    assert "num_epochs was 3 and is 5" in Path(trainer.log_file).read_text(encoding="utf-8")
    trainer.save_checkpoint(file)  # of now on these are its settings
    make_trainer(trainer_class, dataset, goes_on=True, num_epochs=5).load_checkpoint(file)


def test_going_on_after_a_default_has_changed_is_refused(dataset):
    """The plans do not name the setting, so only the checkpoint knows what was used."""
    file = Path(make_trainer(SupervisedTrainer, dataset).output_folder, "checkpoint_latest.pth")
    trainer = make_trainer(SupervisedTrainer, dataset)
    trainer.settings = replace(trainer.settings, local_probability=0.25)  # the default of an older version
    trainer.on_train_start()
    trainer.save_checkpoint(str(file))
    with pytest.raises(UserError, match="local_probability was 0.25 and is 0.0: .*--set local_probability=0.25"):
        make_trainer(SupervisedTrainer, dataset, goes_on=True).load_checkpoint(str(file))


def test_the_way_back_can_be_pasted_into_a_shell():
    old = {"modalities": [[0, 1], [2]], "width": "half", "num_labeled": None, "pretrained_encoder": "/my models/a.pth"}
    with pytest.raises(UserError) as error:
        refuse_other_settings({name: (value, 0) for name, value in old.items()}, "checkpoint_latest.pth")
    words = str(error.value).partition("--set ")[2].partition(", or continue")[0]
    assert parse_assignments(shlex.split(words)) == old


@two_trainers
def test_the_labelled_cases_are_checked_once(trainer_class, dataset, monkeypatch):
    check = Mock(wraps=plans_trainer.check_labeled_cases)
    monkeypatch.setattr(plans_trainer, "check_labeled_cases", check)
    make_trainer(trainer_class, dataset)
    assert check.call_count == 1


# -------------------------------------------------------------------------------------------------------------- alone


def test_a_second_training_of_the_same_run_is_told_who_trains_it(dataset, monkeypatch):
    """So is one who would rewrite what it trains with; another training may use it, too."""
    monkeypatch.setattr(files, "WAIT", 0.0)
    first, second = (make_trainer(SupervisedTrainer, dataset) for _ in range(2))
    train_step, refused = first.train_step, []

    def meanwhile(batch):
        before = sorted(os.listdir(first.output_folder))
        for work in (
            second.run_training,
            second.perform_actual_validation,
            lambda: make_trainer(SupervisedTrainer, dataset),
            lambda: preprocess_unlabeled(dataset.id, ["2d"], PLANS, 0, clean=True),
            lambda: dataset.plan(),
        ):
            with pytest.raises(BusyError) as error:
                work()
            refused.append(one_line_of(error))
        assert sorted(os.listdir(first.output_folder)) == before  # no second log
        first.train_step = train_step
        return train_step(batch)

    first.train_step = meanwhile
    first.run_training()
    lock = Path(first.output_folder, "training.lock")
    assert all(line.startswith(f"{lock}: process {os.getpid()} on ") for line in refused[:3])
    assert all(f"process {os.getpid()} on {os.uname().nodename} uses these" in line for line in refused[3:])
    assert len(refused) == 5 and not list(dataset.preprocessed.glob(".*"))
    assert not lock.exists() and saved(first, "checkpoint_final.pth")["current_epoch"] == 3
    other = make_trainer(SupervisedTrainer, dataset, fold=0)
    with only_one(lock, "trains"), reading(dataset.preprocessed / f"{PLANS}_2d"):
        other.run_training()  # another fold is another training


# -------------------------------------------------------------------------------------------------------------- disks


@two_trainers
def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_one_before_stays(trainer_class, dataset):
    trainer = make_trainer(trainer_class, dataset)
    trainer.initialize()
    file = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    with no_room_for_files_of(len(before) // 2), pytest.raises(DiskError) as error:
        trainer.save_checkpoint(str(file))
    assert one_line_of(error).startswith(f"{file}: cannot be written (File too large): make room")
    assert file.read_bytes() == before and not list(file.parent.glob("*.tmp"))


def test_a_disk_that_fills_in_a_training_is_one_line(dataset):
    trainer = make_trainer(SupervisedTrainer, dataset)
    with no_room_for_files_of(100_000), pytest.raises(DiskError) as error:
        trainer.run_training()
    assert one_line_of(error).startswith(trainer.output_folder) and "(File too large)" in str(error.value)
    assert "--c" not in str(error.value)  # there is no checkpoint yet
    Path(trainer.output_folder, "checkpoint_best.pth").write_bytes(b"")
    with no_room_for_files_of(100_000), pytest.raises(DiskError, match="then run the command again, with --c$"):
        make_trainer(SupervisedTrainer, dataset).run_training()
    Path(trainer.output_folder, "checkpoint_best.pth").unlink()
    left = os.listdir(trainer.output_folder)
    assert not [name for name in left if name.endswith((".tmp", ".pth", ".lock"))], left


def test_what_a_killed_training_left_half_is_removed(dataset):
    trainer = make_trainer(SupervisedTrainer, dataset, num_epochs=1)
    left = Path(trainer.output_folder, "checkpoint_latest.pth.1234abcd.tmp")
    left.write_bytes(b"half")
    trainer.run_training()
    assert not left.exists()


@two_trainers
def test_half_a_checkpoint_is_named_with_the_command_that_goes_on(trainer_class, dataset):
    trainer = make_trainer(trainer_class, dataset)
    trainer.initialize()
    file = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(file))
    half(file)
    command = f"nnUNetv2_train {dataset.name} 2d all -tr {trainer_class.__name__} -p {PLANS} --c"
    for damage in (lambda: None, lambda: file.write_bytes(b""), lambda: torch.save([1, 2], file)):
        damage()
        with pytest.raises(UserError) as error:
            make_trainer(trainer_class, dataset, goes_on=True).load_checkpoint(str(file))
        line = one_line_of(error)
        assert line.startswith(f"{file}: ") and f"remove it and run {command}" in line


def noise(shape=(60, 60, 60)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)  # it cannot be compressed


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
def test_an_image_that_is_half_written_is_found_and_removed(ending, tmp_path):
    """SimpleITK itself says nothing of a NIfTI file for which there is no room."""
    file, image = tmp_path / f"a{ending}", sitk.GetImageFromArray(noise())
    with no_room_for_files_of(100_000), pytest.raises((DiskError, RuntimeError), match=f"a{ending}"):
        write_image(image, file)
    assert not file.exists()
    write_image(image, file)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), noise())


def test_so_is_one_that_nnunet_wrote(tmp_path):
    file = tmp_path / "case.nii.gz"
    with pytest.raises(DiskError) as error, check_written(tmp_path):
        with no_room_for_files_of(100_000):
            sitk.WriteImage(sitk.GetImageFromArray(noise()), str(file))
        raise RuntimeError("it cannot be evaluated")
    assert one_line_of(error).startswith(f"{file}: cannot be written (") and not file.exists()
    with pytest.raises(RuntimeError, match="evaluated"), check_written(tmp_path):
        raise RuntimeError("it cannot be evaluated")


def test_half_a_pseudo_label_is_none(tmp_path, dataset):
    manager, folder = make_trainer(SupervisedTrainer, dataset).label_manager, tmp_path / "labels"
    folder.mkdir()
    label = np.random.default_rng(0).integers(0, 3, (60, 60, 60))
    with no_room_for_files_of(10_000), pytest.raises(DiskError, match="case.b2nd: cannot be written"):
        write_pseudo_label(label, folder, "case", manager)
    assert not list(folder.iterdir())
    write_pseudo_label(label, folder, "case", manager)
    assert sorted(file.name for file in folder.iterdir()) == ["case.b2nd", "case.pkl"]


def test_what_is_opened_is_seen(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    sitk.WriteImage(sitk.GetImageFromArray(noise((2, 2, 2))), str(tmp_path / "b.nii.gz"))
    with opened_in(tmp_path) as opened:
        (tmp_path / "a").stat()
    assert not opened
    with opened_in(tmp_path) as opened:
        sitk.ReadImage(str(tmp_path / "b.nii.gz"))
    assert {Path(path).name for path in opened} == {"b.nii.gz"}
    with opened_in(tmp_path) as opened:
        os.system(f"cat {tmp_path / 'a'}")
    assert [Path(path).name for path in opened] == ["a"]
