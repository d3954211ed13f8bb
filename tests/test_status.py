"""What `nnunet_semiseg status` finds at each step, and the command that it names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from training import PLANS, make_trainer

from nnunet_semiseg import cli, devices
from nnunet_semiseg.data.known_reviews import remember
from nnunet_semiseg.files import only_one
from nnunet_semiseg.status import status
from nnunet_semiseg.trainers.supervised import SupervisedTrainer


def begin(dataset, trainer: str):
    """What a training of eight epochs has written in its third one."""
    folder = dataset.results / f"{trainer}__{PLANS}__3d_fullres" / "fold_0"
    folder.mkdir(parents=True)
    (folder / "training_log_1.txt").write_text("Epoch 0\nEpoch 1\nEpoch 2\nEpoch time: 7 s\n")
    (folder / "debug.json").write_text(json.dumps({"num_epochs": "8"}))
    (folder / "checkpoint_latest.pth").touch()
    return folder


def test_a_raw_dataset(tiny_dataset, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    dataset = tiny_dataset(labeled=2, unlabeled=3, size=6)
    assert cli.main(["status", "-d", "901"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [dataset.name, "cases: 2 labelled, 3 unlabelled, 0 test", "plans:"]
    planning = "next: nnunet_semiseg plan_and_preprocess -d 901 -c 3d_fullres -pl SemiSegPlannerSmall"
    assert lines[3:] == ["  none", "trainings:", "  none", "reports:", "  none", planning]
    for file in (dataset.raw / "imagesUn").iterdir():
        file.unlink()
    assert status(901)[-1] == f"next: put the images without labels into {dataset.raw / 'imagesUn'}"


def test_from_plans_to_a_review(ready, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    dataset = ready(labeled=2, unlabeled=2)
    where, model = f"{PLANS}, 3d_fullres", f"-d 901 -c 3d_fullres -f 0 -p {PLANS}"
    lines = status(901)
    assert f"  {where}: preprocessed and up to date" in lines and f"  {PLANS}, 2d: not preprocessed" in lines
    assert lines[-1] == f"next: nnunet_semiseg train 901 3d_fullres 0 -tr SemiSegTrainer -p {PLANS} -device cpu"

    stopped = begin(dataset, "MeanTeacherTrainer")
    lines = status(dataset.name)
    assert f"  MeanTeacherTrainer, {where}, fold 0: interrupted, epoch 3 of 8" in lines
    assert lines[-1] == f"next: nnunet_semiseg train 901 3d_fullres 0 -tr MeanTeacherTrainer -p {PLANS} -device cpu --c"
    left = stopped / "training.lock"  # by a process that was killed; the disk may be read-only
    left.touch()
    os.utime(left, (0, 0))
    assert status(dataset.name) == lines and left.exists()
    left.unlink()
    with only_one(stopped / "training.lock", "trains this model"):
        lines = status(901)
    assert f"  MeanTeacherTrainer, {where}, fold 0: running, epoch 3 of 8" in lines
    assert lines[-1] == "next: wait until the training has ended"

    false_start = begin(dataset, "CPSTrainer")
    assert "-tr CPSTrainer" in status(901)[-1]
    (stopped / "checkpoint_final.pth").touch()
    (false_start / "checkpoint_latest.pth").unlink()  # with it, this training would be continued first
    lines = status(901)
    assert f"  CPSTrainer, {where}, fold 0: interrupted, epoch 3 of 8, no checkpoint" in lines
    assert f"  MeanTeacherTrainer, {where}, fold 0: done" in lines
    assert lines[-1] == f"next: nnunet_semiseg compare {model} --run -device cpu"
    for place, command in {
        "comparison/3d_fullres__fold_0/report.html": f"review {model} -device cpu",
        "review/M__3d_fullres__fold_0/review.html": "accept -d 901 -i FOLDER",
    }.items():
        file = dataset.results / place
        file.parent.mkdir(parents=True)
        file.touch()
        lines = status(901)
        assert f"  {file}" in lines and lines[-1] == f"next: nnunet_semiseg {command}"


def test_after_an_acceptance_the_reviewed_model_trains_on_and_is_reviewed_again(ready, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    dataset = ready(labeled=2, unlabeled=2)

    def happens(time: int, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"state": "done"}', encoding="utf-8")  # of accept's journal; the other files are not read
        os.utime(file, (time, time))
        return status(901)[-1].removeprefix("next: nnunet_semiseg ").removesuffix(" -device cpu")

    def model(trainer: str, plans: str = PLANS) -> Path:
        return dataset.results / f"{trainer}__{plans}__3d_fullres"

    def page(model: Path) -> Path:
        return dataset.results / "review" / f"{model.name}__fold_0" / "review.html"

    first, final = model("UAMTTrainer"), Path("fold_0", "checkpoint_final.pth")
    for trainer in ("CPSTrainer", "UAMTTrainer"):
        happens(1, model(trainer) / final)
    report = dataset.results / "comparison" / "x" / "report.html"
    happens(2, report)
    assert happens(3, page(first)) == "accept -d 901 -i FOLDER"
    begun = f"train 901 3d_fullres 0 -tr UAMTTrainer -p {PLANS} --as round2 --continue_from {first}"
    assert happens(4, dataset.raw / ".accepted" / "0001" / "journal.json") == begun
    other = dataset.raw.parent / "mine" / "review.html"  # of review -o
    happens(3, other)
    remember(dataset.results, other.parent, f"{model('CPSTrainer').name}__fold_0")
    assert status(901)[-1].split(" -device")[0].endswith(begun)  # of two at the same time, that with the later name
    happens(4, other)
    assert f"  {other}" in status(901) and "-tr CPSTrainer" in status(901)[-1]
    shutil.rmtree(other.parent)
    taken = dataset.preprocessed / "round2.json"  # plans of a round that was taken back
    taken.write_bytes((dataset.preprocessed / f"{PLANS}.json").read_bytes())
    assert status(901)[-1].split(" -device")[0].endswith(begun.replace("round2", "round3"))
    taken.unlink()
    second = model("UAMTTrainer", "round2")
    happens(5, second / final)
    assert (
        happens(6, model("nnUNetTrainer", "round2_from_UAMTTrainer") / final)
        == "review -d 901 -c 3d_fullres -f 0 -p round2"
    )
    report.unlink()  # without a comparison, too: it would not be fair to a model that did not train on
    assert happens(7, page(second)) == "accept -d 901 -i FOLDER"


def test_without_unlabelled_cases_only_labels_can_be_trained_on(ready, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    dataset = ready(labeled=2, unlabeled=2)
    final = begin(dataset, "CPSTrainer") / "checkpoint_final.pth"
    final.touch()
    os.utime(final, (1, 1))
    folder = tmp_path / "drawn"
    folder.mkdir()
    for case in ("un_000", "un_001"):
        shutil.copy(dataset.raw / "labelsTr" / "tr_000.nii.gz", folder / f"{case}.nii.gz")
    assert cli.main(["accept", "-d", "901", "-i", str(folder), "--no_pbar"]) == 0
    said = capsys.readouterr().out
    put = f"put further images without labels into {dataset.raw / 'imagesUn'}"
    assert "no unlabelled case is left: only SupervisedTrainer and nnUNetTrainer can train now; for the other" in said
    assert put in said
    begun = f"train 901 3d_fullres 0 -tr SupervisedTrainer -p {PLANS} --as round2 --continue_from {final.parents[1]}"
    assert said.splitlines()[-1] == f"next: nnunet_semiseg {begun} -device cpu"
    assert f"  {PLANS}, 3d_fullres: preprocessed and up to date" in status(901)
    trainer = make_trainer(SupervisedTrainer, dataset, fold=0)  # it can train
    trainer.initialize()
    assert trainer.do_split()[0] == ["tr_001", "un_000", "un_001"]
    second = dataset.results / "SupervisedTrainer__round2__3d_fullres" / "fold_0" / final.name
    second.parent.mkdir(parents=True)
    second.touch()
    assert status(901)[-1] == f"next: {put}"


def test_what_is_not_up_to_date_is_said_with_the_command_that_helps(ready):
    dataset = ready(labeled=2, unlabeled=2)
    dataset.image("un_001").unlink()
    lines = status(901)
    (line,) = [line for line in lines if line.startswith(f"  {PLANS}, 3d_fullres: ")]
    assert "un_001" in line
    assert lines[-1] == f"next: nnunet_semiseg preprocess_unlabeled -d 901 -c 3d_fullres -plans_name {PLANS}"
    (dataset.raw / "labelsTr" / "tr_000.nii.gz").touch()
    lines = status(901)
    (line,) = [line for line in lines if line.startswith(f"  {PLANS}, 3d_fullres: ")]
    assert "tr_000.nii.gz: its time has changed" in line and line.endswith(f"run {lines[-1].removeprefix('next: ')}")
    assert "nnunet_semiseg preprocess_unlabeled" in lines[-1]
    (dataset.raw / "labelsTr" / "tr_000.nii.gz").unlink()
    assert status(901)[-1].startswith("next: nnunet_semiseg plan_and_preprocess -d 901 -c 3d_fullres -pl SemiSegPl")


def test_it_is_quick(ready):
    """It looks at preprocessed data and at a training without importing torch."""
    begin(ready(labeled=2, unlabeled=2), "MeanTeacherTrainer")
    code = "import sys; sys.modules['torch'] = None; from nnunet_semiseg import cli; sys.exit(cli.main())"
    run = subprocess.run([sys.executable, "-c", code, "status", "-d", "901"], capture_output=True, encoding="utf-8")
    assert (run.returncode, run.stderr) == (0, "")
    assert "preprocessed and up to date" in run.stdout and "interrupted, epoch 3 of 8" in run.stdout


def test_the_device_of_a_proposed_command(monkeypatch, tmp_path):
    for gpus, option in {0: " -device cpu", 2: ""}.items():
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert devices.device_option() == option
    assert devices.device_option("cpu") == " -device cpu" and devices.device_option("cuda") == ""
    assert devices.device_option("mps") == " -device mps"
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(devices, "GPU_FILES", [tmp_path / "nvidia"])
    assert devices.device_option() == " -device cpu" and "torch" not in sys.modules
    monkeypatch.setattr("sys.platform", "darwin")
    assert devices.device_option() == " -device cpu"  # a Mac has no GPU for cuda
    (tmp_path / "nvidia").touch()
    assert devices.device_option() == ""
