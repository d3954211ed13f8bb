"""What nnUNetv2_train is asked for is refused in one line, by our command and by nnU-Net's, and leaves nothing."""

import json
import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import set_folders
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch.distributed.elastic.multiprocessing.api import SignalException
from training import PLANS, make_trainer, save_untrained, write_settings

from nnunet_semiseg import cli
from nnunet_semiseg.discovery import ext_folder
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training_command import check_running_command

REFUSED = [
    ("3d_fullres 0", "-device cuda: PyTorch finds no GPU: use -device cpu"),
    ("3d_fullres 0 -device mps", "-device mps: this exists only on a Mac"),
    ("3d_fullres x -device cpu", "fold x: give the number of a fold, 0 or more, or all"),
    ("3d_fullres 1.5 -device cpu", "fold 1.5: give"),
    ("3d_fullres -1 -device cpu", "fold -1: give"),
    ("3d_lowres 0 -device cpu", f"{PLANS}.json: no configuration 3d_lowres: use 2d or 3d_fullres"),
    ("3d_fullres 0 -device cpu -p nope", "nope.json: no such plans; there is"),
    ("3d_fullres 0 -device cpu -pretrained_weights /nix.pth", "/nix.pth: no such file: give a checkpoint"),
    ("3d_fullres 0 -device cpu -pretrained_weights /nix.pth --c", "-pretrained_weights and --c: give one"),
    ("3d_fullres 0 -device cpu --val", "checkpoint_final.pth: no such file: --val needs a finished training"),
    ("3d_fullres 00 -device cpu --val", "fold_0/checkpoint_final.pth: no such file: --val needs"),
    ("3d_fullres 0 -device cpu --val --c", "--c and --val: give one of them"),
    ("3d_fullres 0 -device cpu -num_gpus 0", "-num_gpus 0: give a whole number"),
]
ONLY_OURS = [
    ("3d_fullres 0 -device tpu", "-device tpu: no such device: use cuda or cpu or mps"),
    ("3d_fullres 0 -device cpu --as ../x", "--as ../x: use letters, digits, - _ and . only"),
    ("3d_fullres 0 -device cpu --as _b", "at most 100 of them, and begin with a letter or a digit"),
    (f"3d_fullres 0 -device cpu --as {'a' * 300}", "--as aaa"),
]


@pytest.fixture
def dataset(ready):
    return ready(labeled=2, unlabeled=2)


def nothing_is_left(dataset) -> bool:
    return not dataset.results.exists() and not (dataset.preprocessed / "x.json").exists()


@pytest.mark.parametrize("trainer", ["MeanTeacherTrainer", "SupervisedTrainer", "nnUNetTrainer"])
@pytest.mark.parametrize("words, message", REFUSED + ONLY_OURS)
def test_our_command_refuses(words, message, trainer, dataset, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    plans = dataset.preprocessed / f"{PLANS}.json"
    before = plans.read_bytes()
    assert cli.main(f"train 901 -p {PLANS} -tr {trainer} {words}".split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert nothing_is_left(dataset) and plans.read_bytes() == before


@pytest.mark.parametrize("words, message", [case for case in REFUSED if not any(w in case[0] for w in (" x ", "1.5"))])
def test_nnunets_command_refuses(words, message, dataset, monkeypatch):
    from nnunetv2.run.run_training import run_training_entry

    argv = f"/bin/nnUNetv2_train 901 -p {PLANS} -tr MeanTeacherTrainer {words}".split()
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda n: None)  # can be called once
    with pytest.raises(UserError) as refused:
        run_training_entry()
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert nothing_is_left(dataset)


@pytest.mark.parametrize("name, folder, error", [
    ("MeanTeachrTrainer", "", "^MeanTeachrTrainer: no such trainer: use MeanTeacherTrainer or "),
    ("nothing_like_ours", "", "^Could not find requested nnunet trainer"),
    ("MeanTeachrTrainer", f"{os.pathsep}/others", "^Could not find requested nnunet trainer"),  # it may be there
])  # fmt: skip
def test_nnunets_command_refuses_a_misspelt_trainer(name, folder, error, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", ext_folder() + folder)
    monkeypatch.setattr(sys, "argv", f"/bin/nnUNetv2_train 901 3d_fullres 0 -tr {name} -device cpu".split())
    with pytest.raises((UserError, RuntimeError), match=error):
        recursive_find_trainer_class_by_name(name)


def test_nnunets_command_has_one_process_on_a_cpu(dataset, monkeypatch):
    words = f"/bin/nnUNetv2_train 901 3d_fullres 0 -p {PLANS} -tr MeanTeacherTrainer -device cpu -num_gpus 2"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(UserError, match="^-num_gpus 2: .* use nnunet_semiseg train for -device cpu$"):
        check_running_command()


@pytest.mark.parametrize("more", ["", "--c"])
def test_what_torchrun_starts_again_must_continue(more, dataset, monkeypatch):
    """Otherwise it would replace the checkpoints of the training that was interrupted."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    words = f"/bin/nnUNetv2_train 901 3d_fullres 0 -p {PLANS} -tr MeanTeacherTrainer -device cpu {more}"
    monkeypatch.setattr(sys, "argv", words.split())
    with nullcontext() if more else pytest.raises(UserError, match="torchrun has started all again: .*give --c"):
        check_running_command()


@pytest.mark.parametrize("content", ["[]", "{}", "null", '\ufeff{"plans_name": "P"}'])
def test_nnunets_command_refuses_plans_that_are_none(content, dataset, monkeypatch):
    from nnunetv2.run.run_training import run_training_entry

    (dataset.preprocessed / f"{PLANS}.json").write_text(content, encoding="utf-8")
    words = f"nnUNetv2_train 901 3d_fullres 0 -device cpu -p {PLANS} -tr MeanTeacherTrainer"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(UserError, match=f"^{dataset.preprocessed / PLANS}.json: .*plan first with"):
        run_training_entry()


def test_several_processes_are_started_by_torchrun_where_there_are_gpus_for_them(dataset, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_semiseg.devices.check_device", lambda device: None)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    started = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    given = f"train 901 3d_fullres 0 -p {PLANS} -num_gpus 2 -tr".split()

    def run(*words: str) -> str:
        status = cli.main([*given, *words])
        assert (status == 0) == bool(started)
        return capsys.readouterr().err

    assert "-num_gpus 2: this machine has 1: give 1 or less" in with_gpus(1, monkeypatch, run, "MeanTeacherTrainer")
    assert "nnU-Net's own trainers need -device cuda" in run("nnUNetTrainer", "-device", "cpu")
    weights = "-pretrained_weights", "x.pth"
    assert "-pretrained_weights: with several processes" in run("MeanTeacherTrainer", "-device", "cpu", *weights)
    run("MeanTeacherTrainer", "-device", "cpu", "--set", "num_epochs=3")
    assert started.pop() == [
        "--standalone", "--max_restarts=0", "--nproc_per_node=2", "-m", "nnunet_semiseg.cli", *given,
        "MeanTeacherTrainer", "-device", "cpu", "--set", "num_epochs=3",
    ]  # fmt: skip
    with_gpus(2, monkeypatch, run, "nnUNetTrainer")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_several_processes_that_are_told_to_end_leave_no_traceback(number, status, dataset, monkeypatch, capsys):
    monkeypatch.setattr("torch.distributed.run.main", Mock(side_effect=SignalException("got a signal", number)))
    words = f"train 901 3d_fullres 0 -p {PLANS} -tr MeanTeacherTrainer -device cpu -num_gpus 2".split()
    with nullcontext() if number == signal.SIGINT else pytest.raises(SystemExit) as ended:
        assert cli.main(words) == status
    assert ended is None or ended.value.code == status
    assert capsys.readouterr().err.strip() in ("", "interrupted: continue with the same command and --c")


@pytest.mark.parametrize(
    "given, saved, then",
    [
        ("", True, "continue with the same command and --c"),
        (" --val", True, "run the same command again"),
        (" --as x", True, "continue with nnunet_semiseg train 901 3d_fullres 0 -tr nnUNetTrainer -p x --c"),
        (" --as x", False, "run the same command again"),
        (
            " --as x --continue_from MODEL -p two -tr UAMTTrainer -device cpu --npz", True,
            "continue with nnunet_semiseg train 901 3d_fullres 0 -tr UAMTTrainer -p x -device cpu --npz --c",
        ),
    ],
)  # fmt: skip
def test_how_an_interrupted_training_continues(given, saved, then, tmp_path, monkeypatch, capsys):
    *_, results = set_folders(tmp_path, monkeypatch)
    if saved:
        trainer = "UAMTTrainer" if "UAMT" in given else "nnUNetTrainer"
        folder = results / "Dataset901_Tiny" / f"{trainer}__x__3d_fullres" / "fold_0"
        folder.mkdir(parents=True)
        (folder / "checkpoint_latest.pth").touch()
    monkeypatch.setattr("nnunet_semiseg.discovery.find_trainer", Mock(side_effect=KeyboardInterrupt))
    assert cli.main(f"train 901 3d_fullres 0{given}".split()) == 130
    assert capsys.readouterr().err == f"interrupted: {then}\n"


@pytest.mark.parametrize("processes, seconds", [("1", []), ("2", [5])])
def test_the_process_that_failed_first_speaks_first(processes, seconds, dataset, monkeypatch):
    """The others fail because they have lost it, and are ended meanwhile."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr("nnunet_semiseg.discovery.find_trainer", Mock(side_effect=RuntimeError("connection closed")))
    with pytest.raises(RuntimeError, match="connection closed"):
        cli.main(f"train 901 3d_fullres 0 -p {PLANS} -tr MeanTeacherTrainer -device cpu".split())
    assert waited == seconds


def with_gpus(number: int, monkeypatch, function, *args):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    return function(*args)


def test_validation_of_a_finished_training_begins(dataset, monkeypatch, capsys):
    save_untrained(MeanTeacherTrainer, dataset)
    called = []
    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", lambda: called.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    words = f"train 901 3d_fullres all -p {PLANS} -tr MeanTeacherTrainer -device cpu --val"
    assert cli.main(words.split()) == 0 and called[0][-1] == "--val"


def test_a_trainer_refuses_a_configuration_that_is_not_there(dataset):
    plans = dataset.plans(PLANS) | {"continue_training": False}
    for trainer_class in (SupervisedTrainer, MeanTeacherTrainer):
        with pytest.raises(UserError, match=f"{PLANS}.json: no configuration 3d_cascade: use 2d or 3d_fullres"):
            trainer_class(plans, "3d_cascade", 0, dataset.dataset_json, torch.device("cpu"))
        with pytest.raises(UserError, match=f'{dataset.preprocessed}/dataset.json: "labels" is 1'):
            trainer_class(plans, "3d_fullres", 0, dataset.dataset_json | {"labels": 1}, torch.device("cpu"))
    assert nothing_is_left(dataset)


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def in_plans(change):
    return lambda dataset: change_json(dataset.preprocessed / f"{PLANS}.json", change)


def in_configuration(**changes):
    return in_plans(lambda plans: plans["configurations"]["3d_fullres"].update(changes))


def empty_folder(dataset):
    for file in (dataset.preprocessed / f"{PLANS}_3d_fullres").iterdir():
        file.unlink()


def split(dataset):
    content = json.dumps([{"train": ["tr_000", "tr_001"], "val": []}])
    (dataset.preprocessed / "splits_final.json").write_text(content)


def other_dataset_json(**changes):
    return lambda dataset: change_json(dataset.preprocessed / "dataset.json", lambda content: content.update(changes))


BROKEN = {
    "no validation case": (split, "splits_final.json: fold 0 has no validation case"),
    "emptied folder": (
        empty_folder,
        f"{PLANS}_3d_fullres: has no preprocessed labelled.*: run nnunet_semiseg plan.* -pl SemiSegPlannerSmall",
    ),
    "huge patch": (
        in_configuration(patch_size=[10**6] * 3),
        rf"{PLANS}.json: the batches of 3d_fullres are too large: plan again .* \(2 patches of 1000000 x 1000000 x"
        " 1000000 voxels take 7450580597 GiB, and this",
    ),
    "odd patch": (in_configuration(patch_size=[23, 24, 24]), f'{PLANS}.json: "patch_size" is .*23, 24, 24.*divisible'),
    "huge batch": (
        in_plans(lambda plans: plans.update(semiseg={"unlabeled_batch_size": 10**6 * 50})),
        "setting unlabeled_batch_size=50000000: set it to a smaller number",
    ),
    "setting": (
        in_plans(lambda plans: plans.update(semiseg={"num_epochs": 0})),
        f"{PLANS}.json: setting num_epochs=0: must be a whole number of 1 or more",
    ),
    "other labels": (
        other_dataset_json(labels={"background": 0, "kidney": 1, "tumour": 2, "new": 3}),
        'dataset.json: "labels" differs from that in .*/Dataset901_Tiny/dataset.json: run nnunet_semiseg plan_and',
    ),
    "other channel": (other_dataset_json(channel_names={"0": "CT"}), 'dataset.json: "channel_names" differs from'),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_trainer_refuses_what_nnunet_would_fail_on(kind, dataset):
    damage, message = BROKEN[kind]
    damage(dataset)
    dataset_json = json.loads((dataset.preprocessed / "dataset.json").read_text())
    plans = dataset.plans(PLANS) | {"continue_training": False}
    with pytest.raises(UserError, match=rf"^\S*{message}"):
        MeanTeacherTrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    assert nothing_is_left(dataset)


@pytest.mark.parametrize("trainer, locks", [("nnUNetTrainer", 1), ("SupervisedTrainer", 0)])
def test_our_command_keeps_data_as_it_is_for_nnunets_own_trainers(trainer, locks, dataset, monkeypatch):
    """Our trainers do it themselves, when they begin."""
    found = []
    monkeypatch.setattr(
        "nnunetv2.run.run_training.run_training_entry",
        lambda: found.extend(dataset.preprocessed.glob(".*.reading.lock")),
    )
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    assert cli.main(f"train 901 3d_fullres 0 -p {PLANS} -tr {trainer} -device cpu".split()) == 0
    assert len(found) == locks and not list(dataset.preprocessed.glob(".*.lock"))


@pytest.mark.parametrize("what", ["killed", "refused"])
def test_no_loader_speaks_after_the_reason(what, dataset, monkeypatch, capfd):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    write_settings(dataset)
    trainer = make_trainer(MeanTeacherTrainer, dataset)
    trainer.initialize()

    processes = []

    def end(outputs):
        processes.extend(trainer.dataloader_train._processes + trainer.dataloader_val._processes)
        if what == "refused":
            raise UserError("a reason")
        for process in trainer.dataloader_train._processes:
            os.kill(process.pid, signal.SIGKILL)
        while True:  # what is loaded already comes first
            next(trainer.dataloader_train)

    monkeypatch.setattr(trainer, "on_train_epoch_end", end)
    reason = "a reason" if what == "refused" else "a process that loads the data has ended: it was killed"
    said = []
    monkeypatch.setattr(threading, "excepthook", before := said.append)
    with pytest.raises(UserError, match=reason):
        trainer.run_training()
    assert threading.excepthook == before and said == []
    assert len(processes) >= 3 and not any(process.is_alive() for process in processes)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize("given, epochs", [("", 2), (" --set num_epochs=7", 7)])
def test_a_training_continues_from_a_model_with_a_schedule_of_its_own(given, epochs, dataset, monkeypatch, capsys):
    run, trained = save_untrained(MeanTeacherTrainer, dataset)
    trained.settings_class(num_epochs=8)
    content = torch.load(run.checkpoint, weights_only=False)
    content["init_args"]["plans"]["semiseg"]["num_epochs"] = 8
    torch.save(content, run.checkpoint)
    found = []

    def entry():
        new = make_trainer(MeanTeacherTrainer, dataset, plans="again")
        new.initialize()
        found.extend([new, json.loads(os.environ["nnUNet_semiseg_set"])["num_epochs"]])

    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", entry)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    words = f"train 901 3d_fullres all -p {PLANS} -tr MeanTeacherTrainer -device cpu --as again"
    assert cli.main(f"{words} --continue_from {run.model_folder}{given}".split()) == 0
    new, found_epochs = found
    assert found_epochs == epochs and "nnUNet_semiseg_continue_from" not in os.environ
    then = "review -d 901 -c 3d_fullres -f all -p again -tr MeanTeacherTrainer -device cpu"
    assert capsys.readouterr().out.endswith(f"next: nnunet_semiseg {then}\n")
    weights = new.network.state_dict()
    assert weights.keys() == trained.network.state_dict().keys()  # the last layers, too
    assert all(torch.equal(w, weights[name]) for name, w in trained.network.state_dict().items())
    assert new.current_epoch == 0 and new.lr_scheduler.ctr == 1  # a step of its own at the start


@pytest.mark.parametrize("after", ["the plans", "the settings", "a checkpoint"])
def test_a_training_that_continues_from_a_model_can_be_interrupted(after, dataset, monkeypatch, capsys):
    """Before its first checkpoint, `--c` would begin without the weights of the model: the same command runs again."""
    run, _ = save_untrained(MeanTeacherTrainer, dataset)
    begun = []

    def entry():
        trainer = make_trainer(MeanTeacherTrainer, dataset, plans="again")
        trainer.initialize()
        begun.append(os.environ["nnUNet_semiseg_continue_from"])
        if after != "the plans":
            trainer.on_train_start()
        if after == "a checkpoint":
            trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", entry)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    words = f"train 901 3d_fullres all -p {PLANS} -tr MeanTeacherTrainer -device cpu --as again"
    words = f"{words} --continue_from {run.model_folder} --set num_epochs=7".split()
    assert cli.main(words) == 130
    plans = dataset.preprocessed / "again.json"
    before = plans.read_text() if plans.exists() else None
    saved = after == "a checkpoint"
    assert (
        "-p again -device cpu --c" if saved else "interrupted: run the same command again"
    ) in capsys.readouterr().err
    assert cli.main(words) == (1 if saved else 130)
    assert len(begun) == (1 if saved else 2)
    assert (plans.read_text() if plans.exists() else None) == before
    assert (before is None) == (after == "the plans")


@pytest.mark.parametrize(
    "more, message",
    [
        ("--continue_from {model}", "--continue_from: name the new model with --as NAME"),
        ("--continue_from {model} --as x --c", "--continue_from and --c: give one of them"),
        ("--continue_from {model}/nix --as x", "/nix: no such file: give a trained model with --continue_from"),
        ("--continue_from {raw} --as x", "no checkpoint_final.pth of fold all: give a trained model"),
        ("--continue_from {model} --as x -tr nnUNetTrainer", "nnUNetTrainer has no settings, so"),
    ],
)
def test_what_cannot_continue_is_refused(more, message, dataset, monkeypatch, capsys):
    run, _ = save_untrained(MeanTeacherTrainer, dataset)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    words = f"train 901 3d_fullres all -p {PLANS} -device cpu -tr MeanTeacherTrainer " + more.format(
        model=run.model_folder, raw=dataset.raw
    )
    assert cli.main(words.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (dataset.preprocessed / "x.json").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ("{run.checkpoint}", "was trained with fold all, so it has seen validation cases of fold 0"),
        ("{run.model_folder}", "has no checkpoint_final.pth of fold 0: give a trained model of this fold"),
    ],
)
def test_a_model_that_has_seen_the_validation_cases_does_not_continue(given, message, dataset, monkeypatch, capsys):
    run, _ = save_untrained(MeanTeacherTrainer, dataset)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    words = f"train 901 3d_fullres 0 -p {PLANS} -device cpu -tr MeanTeacherTrainer --as x --continue_from "
    assert cli.main((words + given.format(run=run)).split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (dataset.preprocessed / "x.json").exists()
