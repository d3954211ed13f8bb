"""`compare` with planted results, each wrong use, and one comparison for real, killed on its way."""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from commands import command, start
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.crossval_split import generate_crossval_split
from tqdm import tqdm
from training import PLANS, write_settings
from watching import no_room_for_files_of

from nnunet_semiseg import cli
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation import compare, jobs, scores, worker
from nnunet_semiseg.evaluation.request import Request, TestSet, check_disjoint, find_devices, find_test_set, make_runs
from nnunet_semiseg.evaluation.work import say_what_failed
from nnunet_semiseg.files import BusyError, DiskError, only_one, write_json
from nnunet_semiseg.runs import RECORD, RESOURCES, Run, TrainedRun, unequal_conditions
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training.log_lines import expected_end

TRAINERS = ("SupervisedTrainer", "MeanTeacherTrainer", "TextSemiSegTrainer")


@pytest.fixture
def planned(ready):
    return ready(preprocess=False, labeled=3, test=4)


def request(dataset, **changes) -> Request:
    asked = {"configuration": "3d_fullres", "fold": "all", "trainers": TRAINERS, "plans": PLANS, "device": "cpu"}
    return Request(dataset=dataset.id, num_processes=0, **{**asked, **changes})


def pretend_trained(run: Run, iterations=6, dice=0.5, **configuration) -> None:
    """The files that a training leaves, with next to nothing in them."""
    run.write_plans()
    plans = json.loads((Path(os.environ["nnUNet_preprocessed"], run.dataset) / f"{run.plans}.json").read_text())
    plans["configurations"][run.configuration].update(configuration)
    run.folder.mkdir(parents=True)
    write_json(plans, run.model_folder / "plans.json")
    shutil.copy(Path(os.environ["nnUNet_raw"], run.dataset, "dataset.json"), run.model_folder)
    write_json({"num_epochs": "3", "num_iterations_per_epoch": str(iterations // 3)}, run.folder / "debug.json")
    log = {"train_losses": [2.0, 1.0, 0.5], "val_losses": [2.0, 1.5, 1.0], "mean_fg_dice": [0, dice, dice]}
    log |= {"ema_fg_dice": [0, dice, dice], "epoch_start_timestamps": [0, 1800, 5400]}
    log |= {"epoch_end_timestamps": [1800, 3600, 7200], "loss/consistency": [0.1, 0.2, 0.3]}
    torch.save({"network_weights": {"w": torch.zeros(5, 2)}, "logging": log, "init_args": {}}, run.checkpoint)


def pretend_validated(run: Run, dataset, cases: list[str]) -> None:
    run.validation.mkdir()
    for case in cases:
        shutil.copy(dataset.raw / "labelsTr" / f"{case}.nii.gz", run.validation)
    write_json({}, run.validation / "summary.json")


@pytest.fixture
def pretend_predicted(monkeypatch, planned):
    """Predictions are the references, shifted by as many voxels as a trainer's name says in this dictionary."""
    shifts = dict.fromkeys(TRAINERS, 0)

    def do_all(jobs, **_):
        for job in jobs:
            content = job.content
            folder = Path(content["output"])
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            shift = next(s for trainer, s in shifts.items() if f"__{trainer}__" in folder.name)
            for file in (planned.raw / "labelsTs").iterdir():
                label = sitk.ReadImage(str(file))
                noisy = content["noise"] * 10
                moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(label), int(shift + noisy), axis=2))
                moved.CopyInformation(label)
                sitk.WriteImage(moved, str(folder / file.name))
            write_json({"settings": content["settings"], "seconds_per_case": 1.5}, folder / RECORD)

    monkeypatch.setattr(compare, "do_all", do_all)
    return shifts


def all_runs(asked: Request) -> list[Run]:
    runs, upper_bound = make_runs(asked)
    return [*runs, *upper_bound]


# ------------------------------------------------------------------------------------------------- known answers


def test_a_planted_shift_is_found_and_a_copy_is_not(planned, pretend_predicted, tmp_path):
    pretend_predicted["TextSemiSegTrainer"] = 1
    asked = request(planned, seeds=2)
    for run in all_runs(asked):
        pretend_trained(run)
    page = compare.compare(asked, tmp_path / "out")
    html, markdown = page.read_text(), (tmp_path / "out" / "report.md").read_text()

    sentence = next(line for line in markdown.splitlines() if line.startswith("Dice: "))
    assert "MeanTeacherTrainer does not differ from SupervisedTrainer in any case." in sentence
    found = r"TextSemiSegTrainer minus SupervisedTrainer: -0\.\d+ \(-0\.\d+ to -0\.\d+; d_z = -\d\.\d+; p = 0.12\)"
    assert re.search(found, sentence) and "Only 4 cases: p cannot be below 0.12" in markdown
    assert "The interval excludes 0, but p is not below 0.05: they disagree." in sentence
    differences = pd.read_csv(tmp_path / "out" / "differences.csv").set_index(["metric", "method"])
    assert differences.loc[("dice", "TextSemiSegTrainer"), "difference"] < 0
    assert "Contours: reference white, SupervisedTrainer blue, MeanTeacherTrainer vermilion" in markdown
    cases = pd.read_csv(tmp_path / "out" / "cases.csv")
    assert len(cases) == 3 * 2 * 4 * 2  # methods, runs, cases, classes
    of = cases.groupby("method")["dice"].mean()
    assert of["SupervisedTrainer"] == of["MeanTeacherTrainer"] == 1 > of["TextSemiSegTrainer"]
    assert (cases[cases["method"] == "TextSemiSegTrainer"]["hd95_voxels"] == 1).all()
    runs = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert list(runs["run"]) == [f"{t}, seed {s}" for t in TRAINERS for s in (0, 1)]
    assert (runs["training_hours"] == 5400 / 3600).all() and (runs["parameters"] == 10).all()
    assert (runs["seconds_per_case"] == 1.5).all() and (runs["iterations"] == 6).all()
    # one file that needs no other
    assert "warning" not in html.partition("</style>")[2] and not re.search(r'(src|href)="(?!data:|#)', html)
    assert html.count("<svg") == 3 and html.count("data:image/png") == 6
    for title in ("Best case", "Median case", "Worst case", "Every run", "Training"):
        assert title in html and title in markdown
    for name in re.findall(r"\]\((.*?)\)", markdown):
        assert (tmp_path / "out" / name).is_file()


def test_a_weight_is_counted_once_though_it_has_several_names(trained):
    _, run, trainer = trained(SupervisedTrainer, dims=2, size=32)
    assert TrainedRun(run).parameters == sum(p.numel() for p in trainer.network.parameters())


def test_unequal_conditions_are_said_in_red(planned, pretend_predicted, tmp_path):
    asked = request(planned)
    for run in all_runs(asked):
        text = run.trainer == "TextSemiSegTrainer"
        pretend_trained(run, iterations=6 if text else 9, **({"batch_size": 7} if text else {}))
    html = compare.compare(asked, tmp_path / "out").read_text()
    warnings = re.findall(r'<p class="warning">(.*?)</p>', html)
    assert warnings == [
        "TextSemiSegTrainer and SupervisedTrainer: 6 and 9 training iterations",
        "TextSemiSegTrainer and SupervisedTrainer: the plans differ in batch_size",
    ]


def change(run: Run, name: str, **changes) -> None:
    file = run.model_folder / name
    write_json(json.loads(file.read_text()) | changes, file)


def test_whatever_is_unequal_is_found(planned, tiny_dataset):
    upper = tiny_dataset(labeled=4, dataset_id=902)
    upper.plan(preprocess=False)
    asked = request(planned, trainers=TRAINERS[:2], upper_bound=902)
    runs, bound = make_runs(asked)
    for run in (*runs, *bound):
        pretend_trained(run)
    assert unequal_conditions(runs, bound) == []
    change(runs[1], "plans.json", transpose_forward=[2, 1, 0], foreground_intensity_properties_per_channel={})
    change(runs[1], "dataset.json", numTraining=60)
    change(runs[1], "plans.json", semiseg={"num_labeled": 1})
    change(bound[0], "plans.json", semiseg={"bfloat16_on_cpu": True}, transpose_forward=[2, 1, 0])
    write_json({"num_epochs": "9", "num_iterations_per_epoch": "9"}, bound[0].folder / "debug.json")
    pair = "MeanTeacherTrainer and SupervisedTrainer"
    other = "SupervisedTrainer (Dataset902_Tiny) and SupervisedTrainer"
    assert unequal_conditions(runs, bound) == [
        f"{pair}: the plans differ in foreground_intensity_properties_per_channel, transpose_forward",
        f"{pair}: dataset.json was another one: numTraining",
        f"{pair}: trained with 1 and all of the labels",
        f"{other}: 81 and 6 training iterations",
        f"{other}: one was trained in bfloat16",
    ]


def test_repetitions_with_other_settings_are_named(planned):
    """A setting changed between the seeds; nnU-Net's own trainer does not look at it. What the fold says counts."""
    asked = request(planned, trainers=[*TRAINERS[:2], "nnUNetTrainer"], seeds=3)
    for run in (runs := all_runs(asked)):
        pretend_trained(run)
        if run.seed == 1:
            settings = json.loads((run.model_folder / "plans.json").read_text())["semiseg"]
            change(run, "plans.json", semiseg={**settings, "ema_decay": 0.5, "save_every": 7})
    write_json(TrainedRun(runs[0]).settings | {"seed": 2, "save_every": 50}, runs[2].settings_file)
    write_json(TrainedRun(runs[3]).settings | {"seed": 2, "ema_decay": 0.9}, runs[5].settings_file)
    assert unequal_conditions(runs) == [
        "SupervisedTrainer, seed 1 and SupervisedTrainer, seed 0: the settings differ: save_every 7 and 50",
        "MeanTeacherTrainer, seed 1 and MeanTeacherTrainer, seed 0: the settings differ: ema_decay 0.5 and None;"
        " save_every 7 and 50",
        "MeanTeacherTrainer, seed 2 and MeanTeacherTrainer, seed 0: the settings differ: ema_decay 0.9 and None",
    ]


def test_a_second_comparison_is_told_who_is_at_it(planned, tmp_path):
    asked, out = request(planned, trainers=TRAINERS[:1], seeds=1), tmp_path / "out"
    out.mkdir()
    with only_one(out / "evaluation.lock", "works"):
        with pytest.raises(BusyError, match=f"process {os.getpid()} on .* works on this report: wait"):
            compare.compare(asked, out, run=True)
    assert not (planned.preprocessed / f"{PLANS}_seed0.json").exists()


def test_a_full_disk_leaves_no_half_report(planned, pretend_predicted, tmp_path):
    asked, out = request(planned, trainers=TRAINERS[:2]), tmp_path / "out"
    for run in all_runs(asked):
        pretend_trained(run)
    compare.compare(asked, out)
    before = (out / "report.html").read_bytes()
    with no_room_for_files_of(len(before) // 2), pytest.raises(DiskError, match="report.html: cannot be written"):
        compare.compare(asked, out)
    assert (out / "report.html").read_bytes() == before and not list(out.rglob("*.tmp"))
    with no_room_for_files_of(500), pytest.raises(DiskError, match="cases.csv: cannot be written"):
        compare.compare(asked, out)


def test_nnunets_own_trainer_leaves_no_label_out_and_has_no_seed(planned):
    runs, _ = make_runs(request(planned, trainers=["nnUNetTrainer", "SupervisedTrainer"], seeds=1))
    for run in runs:
        pretend_trained(run)
        change(run, "plans.json", semiseg={"num_labeled": 2})
    assert unequal_conditions(runs) == [
        "SupervisedTrainer, seed 0 and nnUNetTrainer, run 0: trained with 2 and all of the labels"
    ]


def test_share_of_labels_upper_bound_and_noise(planned, pretend_predicted, tmp_path, tiny_dataset):
    upper = tiny_dataset(labeled=4, dataset_id=902)
    upper.plan(preprocess=False)
    asked = request(
        planned, trainers=TRAINERS[:2], sizes=(1, 2, None), upper_bound=902, noise=(0.1, 0.2), mirroring=False
    )
    pretend_predicted["MeanTeacherTrainer"] = 1
    for run in all_runs(asked):
        pretend_trained(run)
    compare.compare(asked, tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| MeanTeacherTrainer | 2 | 0." in markdown and "| SupervisedTrainer | all | 1.000 |" in markdown
    assert "SupervisedTrainer, all labels (Dataset902_Tiny)" in markdown
    assert "| SupervisedTrainer | 0.2 | 0." in markdown and "without mirroring" in markdown
    assert "share_of_labels.svg" in markdown and "noise.svg" in markdown
    shares = pd.read_csv(tmp_path / "out" / "figures" / "share_of_labels.csv").set_index(["method", "x"])
    assert list(shares.loc["SupervisedTrainer", "mean"]) == [1, 1, 1] and "(figures/noise.csv)" in markdown
    training = pd.read_csv(tmp_path / "out" / "figures" / "training.csv")
    assert list(training) == ["run", "epoch", "curve", "value"] and "pseudo Dice" in set(training["curve"])
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count(">SupervisedTrainer, all labels (Dataset902_Tiny)</text>") >= 2  # its own panel of curves, too
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    cases = pd.read_csv(tmp_path / "out" / "cases.csv", dtype={"num_labeled": str})
    assert set(cases[cases["noise"] > 0]["num_labeled"]) == {"1", "all"}  # the first size, and the upper bound
    assert cases[(cases["noise"] > 0) & (cases["num_labeled"] == "all")]["is_upper_bound"].all()
    # the noise table is that of the first size alone: with it, predictions are shifted by whole voxels
    means = cases[cases["num_labeled"] == "1"].groupby(["method", "noise"])["dice"].mean()
    assert f"| SupervisedTrainer | 0.1 | {means['SupervisedTrainer', 0.1]:.3f} |" in markdown


def test_the_curve_can_be_of_some_trainers_alone(planned, pretend_predicted, tmp_path):
    asked = request(planned, sizes=(1, 2), curve=TRAINERS[:1])
    assert [(r.trainer, r.num_labeled) for r in all_runs(asked)] == [*((t, 1) for t in TRAINERS), (TRAINERS[0], 2)]
    for run in all_runs(asked):
        pretend_trained(run)
    compare.compare(asked, tmp_path / "out")
    share = (tmp_path / "out" / "report.md").read_text().partition("## Share of labels")[2].partition("##")[0]
    rows = re.findall(r"^\| (\w+Trainer) \| (\d)", share, re.MULTILINE)
    assert rows == [(TRAINERS[0], "1"), (TRAINERS[0], "2"), (TRAINERS[1], "1"), (TRAINERS[2], "1")]


def test_what_is_done_is_remembered_until_something_changes(planned, pretend_predicted, tmp_path, monkeypatch):
    asked = request(planned, trainers=TRAINERS[:2])
    for run in all_runs(asked):
        pretend_trained(run)
    compare.compare(asked, tmp_path / "out")
    done, evaluated = [], []
    do_all, evaluate = compare.do_all, scores.evaluate_folder
    monkeypatch.setattr(compare, "do_all", lambda jobs, **rest: (done.extend(jobs), do_all(jobs, **rest)))
    monkeypatch.setattr(scores, "evaluate_folder", lambda *a, **k: evaluated.append(a[0]) or evaluate(*a, **k))
    compare.compare(asked, tmp_path / "out")
    assert not done and not evaluated
    os.utime(all_runs(asked)[0].checkpoint)
    compare.compare(asked, tmp_path / "out")
    assert [job.content["job"] for job in done] == ["predict"] and len(evaluated) == 1
    compare.compare(request(planned, trainers=TRAINERS[:2], tolerance=1.0), tmp_path / "out")
    assert len(evaluated) == 3
    next((tmp_path / "out" / "predictions").glob("*MeanTeacher*/ts_002.nii.gz")).unlink()
    compare.compare(asked, tmp_path / "out")
    assert len(done) == 2 and "MeanTeacher" in done[1].name


def test_a_training_that_was_killed_in_its_validation_goes_on_with_it(planned, tmp_path, monkeypatch):
    shutil.rmtree(planned.raw / "labelsTs")
    shutil.copytree(planned.raw / "labelsTr", planned.preprocessed / "gt_segmentations")
    (case,) = json.loads((planned.preprocessed / "splits_final.json").read_text())[0]["val"]
    asked = request(planned, fold="0", trainers=TRAINERS[:2])
    runs = all_runs(asked)
    for run in runs:
        pretend_trained(run)
    pretend_validated(runs[0], planned, [case])
    refused(asked, "not validated with the last checkpoint: MeanTeacherTrainer .*add --run", tmp_path / "out")
    done = []

    def do_all(jobs, **_):
        done.extend(jobs)
        if jobs:
            pretend_validated(runs[1], planned, [case])

    monkeypatch.setattr(compare, "do_all", do_all)
    compare.compare(asked, tmp_path / "out", run=True)
    assert [job.content["words"][-1] for job in done] == ["--val"] and "MeanTeacher" in done[0].name
    os.utime(runs[0].validation / "summary.json", (0, 0))  # of a checkpoint before this one
    refused(asked, "not validated with the last checkpoint: SupervisedTrainer ", tmp_path / "other")
    os.utime(runs[0].validation / "summary.json")
    (runs[0].validation / f"{case}.nii.gz").unlink()
    with pytest.raises(UserError, match=f"{case}.nii.gz: no such prediction: predict this case"):
        compare.compare(asked, tmp_path / "out")


def test_validation_cases_without_a_test_set_and_nnunets_own_trainer(planned, tmp_path):
    shutil.rmtree(planned.raw / "labelsTs")
    shutil.copytree(planned.raw / "labelsTr", planned.preprocessed / "gt_segmentations")
    asked = request(planned, fold="0", trainers=["nnUNetTrainer", "SupervisedTrainer"])
    (case,) = json.loads((planned.preprocessed / "splits_final.json").read_text())[0]["val"]
    for run in all_runs(asked):
        pretend_trained(run)
        pretend_validated(run, planned, [case])
    compare.compare(asked, tmp_path / "out")
    cases = pd.read_csv(tmp_path / "out" / "cases.csv")
    assert set(cases["case"]) == {case} and set(cases["method"]) == {"nnUNetTrainer", "SupervisedTrainer"}
    assert (cases["dice"] == 1).all()
    assert "1 validation case of the fold" in (tmp_path / "out" / "report.md").read_text()


def test_validation_cases_before_the_first_training_are_those_that_nnunet_will_hold_out(tiny_dataset):
    dataset = tiny_dataset(labeled=6)
    dataset.plan(preprocess=False)
    asked = request(dataset, fold="1")
    held_out = generate_crossval_split([f"tr_{i:03d}" for i in range(6)])[1]["val"]
    assert not (dataset.preprocessed / "splits_final.json").exists()
    assert list(find_test_set(asked).images) == sorted(held_out)
    with pytest.raises(UserError, match=r"^-f 5: Dataset901_Tiny has the folds 0 to 4: give one of them$"):
        find_test_set(request(dataset, fold="5"))


def test_validation_cases_whose_files_dataset_json_lists(tiny_dataset):
    dataset = tiny_dataset(labeled=6)
    dataset.plan(preprocess=False)
    (dataset.raw / "imagesTr").rename(dataset.raw / "elsewhere")
    content = json.loads((dataset.raw / "dataset.json").read_text())
    cases = {
        f"tr_{i:03d}": {"images": [f"elsewhere/tr_{i:03d}_0000.nii.gz"], "label": f"labelsTr/tr_{i:03d}.nii.gz"}
        for i in range(6)
    }
    write_json(content | {"dataset": cases}, dataset.raw / "dataset.json")
    asked = request(dataset, fold="1")
    images = find_test_set(asked).images
    assert images and all(Path(file).is_file() for files in images.values() for file in files)


# ------------------------------------------------------------------------------------------------------ wrong use


def refused(asked: Request, words: str, output: Path, **kwargs) -> None:
    with pytest.raises(UserError, match=words) as error:
        compare.compare(asked, output, **kwargs)
    assert len(str(error.value).splitlines()) == 1 and not output.exists()


def test_wrong_use_is_one_line(planned, tmp_path):
    out = tmp_path / "out"
    refused(request(planned), "not trained: SupervisedTrainer; MeanTeacherTrainer; .*checkpoint_final.*add --run", out)
    refused(request(planned, trainers=["SupervizedTrainer"]), "no such trainer: use SupervisedTrainer", out)
    refused(request(planned, trainers=2 * TRAINERS[:1]), "--trainers: .*name each once", out)
    refused(request(planned, curve=TRAINERS[:1]), "--curve SupervisedTrainer: .* several sizes with --labeled", out)
    refused(request(planned, sizes=(1, 2), curve=["nnUNetTrainer"]), "--curve nnUNetTrainer: name only", out)
    refused(request(planned, seeds=0), "--seeds 0: give at least 1", out)
    refused(request(planned, noise=[0.1, 0.0]), "--noise 0: give numbers above 0", out)
    refused(request(planned, noise=[float("nan")]), "--noise nan: give numbers above 0", out)
    refused(request(planned, noise=[0.1, 0.1]), "--noise: 0.1 0.1: name each once", out)
    refused(request(planned, sizes=[None, None]), "--labeled: all all: name each once", out)
    refused(request(planned, tolerance=-1), "--tolerance -1: give a number of mm above 0", out)
    refused(request(planned, sizes=[0]), "--labeled 0: give numbers of 1 or more, or all", out)
    refused(request(planned, sizes=[1, 9]), "--labeled 9: fold all of .*_Tiny has only 3 labelled cases", out, run=True)
    refused(request(planned, sizes=[1, 3], fold="0"), "--labeled 3: fold 0 of .*_Tiny has only 2", out, run=True)
    same = request(planned, sizes=[1, None], upper_bound=planned.id)
    refused(same, "--upper-bound 901: SupervisedTrainer .* is compared already: give another dataset", out, run=True)
    fixed = json.loads((planned.preprocessed / f"{PLANS}.json").read_text()) | {"semiseg": {"num_labeled": 2}}
    write_json(fixed | {"plans_name": "Fixed"}, planned.preprocessed / "Fixed.json")
    refused(request(planned, sizes=[1, None], plans="Fixed"), "--labeled all: the plans Fixed say num_labeled=2", out)
    for fold in ("first", "00", "\u0663"):  # nnU-Net's folders are fold_0 and fold_3
        refused(request(planned, fold=fold), f"-f {fold}: give the number of a fold, or all", out)
    refused(request(planned, sizes=[2], fold="99"), "-f 99: .*splits_final.json has the folds 0 to 2", out, run=True)
    (tmp_path / "file").touch()
    refused(request(planned), "/file: is a file: name a folder with -o", tmp_path / "file" / "below", run=True)
    refused(request(planned, configuration="3d_lowres"), "no configuration 3d_lowres: use 2d or 3d_fullres", out)
    refused(request(planned, plans="Mine"), "Mine.json: no such file", out)
    unknown = Request(dataset=77, configuration="2d", fold="0", trainers=TRAINERS)
    refused(unknown, "dataset 77: no dataset has this number", out)
    refused(request(planned, device="cuda"), "-device cuda: PyTorch finds no GPU: use -device cpu", out)
    refused(request(planned, gpus=[0]), "--gpus 0: needs -device cuda", out)
    refused(request(planned, slurm=["hours=1"]), "--slurm: only with --executor slurm", out)
    stock = request(planned, trainers=["nnUNetTrainer"], sizes=[2])
    refused(stock, "nnUNetTrainer: this trainer cannot leave labels out: use SupervisedTrainer", out, run=True)


def test_a_gpu_that_is_not_there(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked = request(planned, device="cuda", gpus=[0, 2])
    refused(asked, "--gpus 2: there is no such GPU: use one of the 2 GPUs", tmp_path / "o")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_devices(request(planned, device="cuda", gpus=[0, 1], jobs=2)) == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")  # numbers are of the GPUs that we were given
    assert find_devices(request(planned, device="cuda", gpus=[1])) == ["7"]


def test_the_queue_decides_what_runs_at_the_same_time():
    def devices(**options) -> list[str]:
        return find_devices(Request(dataset=1, configuration="2d", executor="slurm", **options))

    assert devices() == []
    for options, flags in (({"gpus": [0, 1]}, "--gpus"), ({"gpus": [0], "jobs": 2}, "--gpus --jobs")):
        with pytest.raises(UserError, match=f"^{flags}: not with --executor slurm, .*: leave out {flags}.* gpus=1$"):
            devices(**options)


def test_no_test_set_and_no_validation_fold(planned, tmp_path):
    shutil.rmtree(planned.raw / "labelsTs")
    out = tmp_path / "out"
    refused(request(planned), "labelsTs: has no .*, and fold all has no validation cases", out)
    refused(request(planned, fold="0", noise=[0.1]), "--noise: needs a test set", out)
    refused(request(planned, fold="7"), "-f 7: .*splits_final.json has the folds 0 to 2", out)


def test_a_reference_without_an_image_and_predictions_that_do_not_fit(planned, pretend_predicted, tmp_path):
    asked = request(planned, trainers=TRAINERS[:1])
    pretend_trained(all_runs(asked)[0])
    compare.compare(asked, tmp_path / "out")
    (prediction,) = (tmp_path / "out" / "predictions").glob("*/ts_001.nii.gz")
    image = sitk.ReadImage(str(prediction))
    image.SetSpacing((1, 2, 3))
    sitk.WriteImage(image, str(prediction))
    with pytest.raises(UserError, match="ts_001.nii.gz: shape .* and spacing 3x2x1 mm, but .*labelsTs"):
        compare.compare(asked, tmp_path / "out")
    prediction.unlink()  # it is made again
    compare.compare(asked, tmp_path / "out")
    (prediction,) = (tmp_path / "out" / "predictions").glob("*/ts_001.nii.gz")
    reference = planned.raw / "labelsTs" / "ts_001.nii.gz"
    image = sitk.ReadImage(str(reference))
    image.SetOrigin((500.0, 0.0, 0.0))
    sitk.WriteImage(image, str(reference))
    shutil.copy(planned.raw / "labelsTs" / "ts_000.nii.gz", prediction)
    with pytest.raises(UserError, match="ts_001.nii.gz: has another origin or other axes than .*labelsTs"):
        compare.compare(asked, tmp_path / "out")
    image.SetOrigin((0.0, 0.0, 0.0))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(reference))
    with pytest.raises(UserError, match="ts_001.nii.gz: has another origin or other axes than .*labelsTs"):
        compare.compare(asked, tmp_path / "out")
    planned.image("ts_002", folder="imagesTs").unlink()
    with pytest.raises(UserError, match="labelsTs/ts_002.nii.gz: imagesTs has no image ts_002_0000.nii.gz"):
        compare.compare(asked, tmp_path / "out")


def test_the_upper_bound_must_not_have_seen_the_test_set(planned, tiny_dataset, tmp_path):
    upper = tiny_dataset(labeled=4, dataset_id=902)
    upper.plan(preprocess=False)
    shutil.copy(planned.image("ts_001", folder="imagesTs"), upper.raw / "imagesTr")
    asked = request(planned, upper_bound=902)
    refused(asked, "--upper-bound: test case ts_001 is in .*902_Tiny/imagesTr", tmp_path / "o")
    # a fold's validation cases may be held out by the same fold there
    shutil.rmtree(planned.raw / "labelsTs")
    _, bound = make_runs(request(planned, fold="0", upper_bound=902))
    test_set = find_test_set(request(planned, fold="0"))
    check_disjoint(test_set, bound[0])
    splits = json.loads((upper.preprocessed / "splits_final.json").read_text())
    write_json(splits[::-1], upper.preprocessed / "splits_final.json")
    with pytest.raises(UserError, match=f"test case {next(iter(test_set.images))} is in .*902_Tiny"):
        check_disjoint(test_set, bound[0])


def test_the_upper_bound_may_list_its_training_cases_in_dataset_json(tiny_dataset):
    upper = tiny_dataset(labeled=1)
    (upper.raw / "imagesTr").rename(upper.raw / "elsewhere")
    content = json.loads((upper.raw / "dataset.json").read_text())
    listed = {"tr_000": {"images": ["elsewhere/tr_000_0000.nii.gz"], "label": "labelsTr/tr_000.nii.gz"}}
    write_json(content | {"dataset": listed}, upper.raw / "dataset.json")
    test_set = TestSet({"tr_000": []}, upper.raw, False, {}, ".nii.gz", SimpleITKIO)
    with pytest.raises(UserError, match="^--upper-bound: test case tr_000 is in .*dataset.json: remove it there"):
        check_disjoint(test_set, Run(upper.name, "2d", "all", "SupervisedTrainer", PLANS))


def test_a_failed_job_says_its_last_line_and_the_others_are_done(tmp_path):
    todo = [jobs.Job(f"j{i}", f"job {i}", {"job": "train", "words": [], "folder": str(tmp_path)}) for i in range(2)]
    todo[1] = jobs.Job("j1", "job 1", {"job": "nonsense"})
    with pytest.raises(UserError) as error:
        jobs.do_all(todo, ["", ""], tmp_path)
    lines = sorted(str(error.value).splitlines())
    assert len(lines) == 2 and lines[0].startswith("job 0: ") and "exit status 1" in lines[0]
    assert "KeyError: 'nonsense' (exit status 1; all output: " in lines[1] and "j1.txt" in lines[1]


def test_a_bar_shows_when_a_training_will_end_and_where_its_log_is(tmp_path, monkeypatch, capsys):
    ends, bars, log = [], [], tmp_path / "j.txt"
    log.write_text(f"{expected_end([60], 900, datetime(2026, 11, 27))}\n")  # of an earlier start

    class Bar(tqdm):
        def __init__(self, **about):
            super().__init__(**about | {"disable": False})
            bars.append(self)

        def set_postfix_str(self, s="", refresh=True):
            ends.append(s)

    class Training:
        def result(self):
            while len(ends) < 2:
                time.sleep(0.01)
            log.write_text(f"{log.read_text()}{expected_end([60], 9, datetime(2026, 11, 28))}\n")
            while not ends[-1]:
                time.sleep(0.01)

    monkeypatch.setattr(jobs, "tqdm", Bar)
    monkeypatch.setattr(jobs, "SECONDS", 0.05)
    jobs.do_all([jobs.Job("j", "a training", {})], [""], tmp_path, lambda *_: Training())
    assert set(ends) == {"", "expected end: 2026-11-28 00:09"} and bars[0].n == 1
    assert f"a training ... (all output: {log})\n" in capsys.readouterr().out
    jobs.do_all([], [""], tmp_path)
    assert len(bars) == 1


def test_the_memory_of_a_validation_is_not_that_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "run_training_entry", lambda: None)
    monkeypatch.setattr(worker, "using_data", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(sys, "argv", [])
    words = ["Dataset901_Tiny", "2d", "0", "-tr", "nnUNetTrainer", "-p", PLANS]
    worker.train([*words, "--val"], str(tmp_path))
    assert not (tmp_path / RESOURCES).exists()
    worker.train(words, str(tmp_path))
    assert (tmp_path / RESOURCES).is_file()


def test_of_a_job_that_was_killed_the_last_line_is_no_reason(tmp_path):
    (log := tmp_path / "j.txt").write_text("Epoch 3\n")
    line = say_what_failed(-9, log)
    assert line == (
        "was killed by SIGKILL, by someone or because memory ran out: run the same command again to continue"
        f" (all output: {log})"
    )


# -------------------------------------------------------------------------------------------------------- for real


def command_lines() -> list[str]:
    """The command lines of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            found.append(file.read_bytes().decode(errors="replace"))
    return found


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on(tiny_dataset, monkeypatch):
    """Two trainers, with nnU-Net's own commands; the parent is killed while the second run trains."""
    dataset = tiny_dataset(labeled=3, test=2)
    dataset.plan()
    write_settings(dataset)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    words = f"compare -d {dataset.id} -c 3d_fullres -f 0 -p {PLANS} -device cpu --seeds 1 --run --disable_tta"
    words = [*words.split(), "--trainers", "SupervisedTrainer", "MeanTeacherTrainer"]
    runs = all_runs(request(dataset, fold="0", seeds=1, trainers=TRAINERS[:2]))
    parent, _ = start("nnunet_semiseg", *words)
    while not runs[1].is_begun:
        assert parent.is_alive()
        time.sleep(0.1)
    results = str(runs[1].model_folder.parent)  # the test's own; others may train the same beside it
    assert any(results in line for line in command_lines())
    parent.kill()
    parent.join()
    for _ in range(100):
        if not any(results in line for line in command_lines()):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the training outlived the comparison")
    files = [file for file in runs[0].model_folder.rglob("*") if file.is_file()]
    finished = {file: file.stat().st_mtime_ns for file in files}
    assert finished and not runs[1].is_trained

    assert cli.main(words) == 0
    assert all(run.is_trained for run in runs)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    output = runs[0].model_folder.parent / "comparison" / "3d_fullres__fold_0"
    page = (output / "report.html").read_text()
    assert 'class="warning"' not in page.partition("</style>")[2]
    table = pd.read_csv(output / "runs.csv")
    assert (table["peak_memory_mib"] > 100).all() and (table["memory"] == "RAM").all()
    assert (table["iterations"] == 6).all() and (table["seconds_per_case"] > 0).all()
    words = ["-i", dataset.raw / "imagesTs", "-o", output / "stock", "-d", dataset.id, "-c", "3d_fullres", "-f", 0]
    words += ["-tr", runs[1].trainer, "-p", runs[1].plans, "-device", "cpu", "--disable_tta", "-npp", 1, "-nps", 1]
    command("nnUNetv2_predict", *words)
    for file in (output / "stock").glob("*.nii.gz"):
        mine = jobs.predictions_folder(runs[1], 0, output) / file.name
        assert np.array_equal(*(sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in (file, mine)))
