"""The tools that measure: their tables, and the parts whose numbers can be worked out by hand."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from training import PLANS, make_trainer

from nnunet_semiseg.discovery import find_trainer

TOOLS = Path(__file__).parents[1] / "tools"
TWO = ["SupervisedTrainer", "MeanTeacherTrainer"]


@pytest.fixture
def tool(monkeypatch):
    """Imports a script of tools/; `run` calls its main with these arguments."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def load(name: str):
        module = __import__(name)

        def run(*args) -> None:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
            module.main()

        return module, run

    return load


def table(printed: str) -> list[list[str]]:
    """The rows of a Markdown table below its heading, without what is printed around it."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    return rows[2:]


def test_every_option_of_every_tool_has_a_help_text():
    for file in TOOLS.glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
                assert "help" in [k.arg for k in call.keywords], f"{file.name}, line {call.lineno}: give it help="


# ---------------------------------------------------------------------------------------------------- step_cost.py


def test_all_backward_passes_of_a_step_are_counted(tool, monkeypatch):
    step_cost, _ = tool("step_cost")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(step_cost, "perf_counter", lambda: clock.now)

    def take(seconds: float) -> None:
        clock.now += seconds

    class Slow(torch.autograd.Function):
        """x, whose gradient takes 8 seconds."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            take(8)
            return gradient

    def train_step(batch):
        x = torch.ones(3, requires_grad=True)
        take(1)
        Slow.apply(x).sum().backward()
        take(2)
        torch.autograd.backward([Slow.apply(x)], [torch.ones(3)])  # as the end of `shared`
        take(4)

    def load():
        take(32)
        yield {}

    before = torch.autograd.backward
    seconds = step_cost.timed_step(SimpleNamespace(train_step=train_step, dataloader_train=load()), "cpu")
    assert seconds == {"load": 32, "forward": 3, "backward": 16, "update": 4}
    assert torch.autograd.backward is before


def test_live_memory_counts_what_is_alive(tool):
    step_cost, _ = tool("step_cost")
    with step_cost.LiveMemory() as memory:
        x = torch.ones(1000)
        y = x + 1
        del y
        z = x.view(10, 100)  # no memory of its own
        assert (memory.now, memory.peak) == (4000, 8000)
        del x
        assert memory.now == 4000
        del z
        assert memory.now == 0


@pytest.mark.slow
def test_step_cost_prints_a_row_for_each_trainer_and_phase(tool, ready, capsys):
    dataset = ready(labeled=2, unlabeled=2)
    _, run = tool("step_cost")
    run("-d", dataset.id, "-p", PLANS, "-device", "cpu", "-n", 1, "--trainers", *TWO)
    rows = table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[TWO[0], "begin"], [TWO[1], "begin"], [TWO[1], "end"]]
    assert rows[0][3] == "1.00"
    for _, _, step, ratio, *shares, _, peak in rows:
        assert float(step) > 0 and float(ratio) > 0
        assert sum(int(share.strip("%")) for share in shares) == pytest.approx(100, abs=2)
        assert all(int(share.strip("%")) > 0 for share in shares[:2])  # forward and backward
        assert float(peak) > 1
    # two streams, a teacher beside the student; the last row's tensors are those of the second's
    assert float(rows[1][-1]) > float(rows[0][-1])


# -------------------------------------------------------------------------------------------------- peak_memory.py


@pytest.mark.slow
def test_peak_memory_prints_weights_and_peaks(tool, ready, capsys):
    dataset = ready(labeled=2, unlabeled=2)
    _, run = tool("peak_memory")
    run("-d", dataset.id, "-p", PLANS, "--trainers", *TWO)
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == TWO
    configuration = dataset.plans(PLANS)["configurations"]["3d_fullres"]
    assert rows[0][1:3] == [" x ".join(map(str, configuration["patch_size"])), str(configuration["batch_size"])]
    assert rows[0][5] == "1.00"

    trainer = make_trainer(find_trainer(TWO[0]), dataset)
    trainer.initialize()
    weights = sum(p.nbytes for p in trainer.network.parameters()) / 2**20
    assert float(rows[0][3]) == pytest.approx(weights, abs=0.51)
    assert float(rows[1][3]) == pytest.approx(2 * weights, abs=0.51)  # the teacher's, too
    for row in rows:
        # weights, gradients and momentum at the least
        assert float(row[4]) > 3 * weights
    assert float(rows[1][4]) / float(rows[0][4]) == pytest.approx(float(rows[1][5]), abs=0.02)
    assert float(rows[1][4]) > float(rows[0][4])


# ---------------------------------------------------------------------------------------------------- gpu_check.py

WORKER = """
import json, os, sys, time
from pathlib import Path

work, trainers = Path(sys.argv[sys.argv.index("--work") + 1]), sys.argv[sys.argv.index("--trainers") + 1 :]
values = {"SupervisedTrainer": (200.0, 1000.0), "Fine": (466.0, 1150.0)}
with open(work / "events.jsonl", "a", buffering=1) as events:
    tell = lambda **event: events.write(json.dumps(event) + "\\n")
    about = {"device": "none", "torch": "0", "flags": {}, "patch": "1", "batch_size": 1, "seconds": 0.0}
    tell(about={**about, "trainers": trainers})
    for name in trainers:
        tell(begin=name)
        if name == "Dies":
            os._exit(9)
        if name == "Hangs":
            time.sleep(600)
        step, MiB = values[name]
        row = {"losses": "finite", "step_ms": step, "allocated_MiB": MiB, "batches_per_s": 5.0, "loading_share": 0.2}
        tell(row={"trainer": name, **row})
"""


def test_a_trainer_that_ends_the_worker_or_hangs_does_not_stop_the_others(tool, tmp_path, monkeypatch, capsys):
    gpu_check, _ = tool("gpu_check")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(gpu_check, "__file__", str(worker))
    names = ["Dies", "SupervisedTrainer", "Hangs", "Fine"]
    out = tmp_path / "out.csv"
    args = {"trainers": names, "budget": 60, "limit": 3, "workers": 1, "dry_run": True, "out": out}
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    gpu_check.Watch(argparse.Namespace(**args), tmp_path).run()

    rows = {row[0]: row[1:] for row in table(capsys.readouterr().out)}
    assert list(rows) == ["SupervisedTrainer", "Dies", "Hangs", "Fine"]
    assert "exit status 9" in rows["Dies"][0] and "--limit 3" in rows["Hangs"][0]
    # 466 / 200 and 1150 / 1000
    assert rows["Fine"] == ["finite", "-", "-", "1150", "1.15", "-", "-", "466.00", "2.33", "5.00", "20%"]
    with open(out, encoding="utf-8", newline="") as file:
        written = {row["trainer"]: row for row in csv.DictReader(file)}
    assert float(written["Fine"]["step_ratio"]) == 2.33 and written["Fine"]["device"] == "none"
    assert "exit status 9" in written["Dies"]["error"]


def test_a_worker_that_fails_before_its_first_trainer_is_not_started_again(tool, tmp_path, monkeypatch, capsys):
    gpu_check, _ = tool("gpu_check")
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit('no GPU here')")
    monkeypatch.setattr(gpu_check, "__file__", str(worker))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    args = argparse.Namespace(trainers=None, budget=60, limit=30, workers=1, dry_run=True, out=None)
    with pytest.raises(SystemExit, match="before its first trainer"):
        gpu_check.Watch(args, tmp_path).run()
    assert "no GPU here" in capsys.readouterr().err


def test_functions_that_torch_gives_up_compiling_are_seen(tool):
    worker, _ = tool("gpu_check_worker")
    counters = torch._dynamo.utils.counters

    def count(numbers) -> int | str:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(lambda x, n: x + n, backend="eager", dynamic=False)
        before = counters["stats"]["unique_graphs"]
        for n in numbers:  # a graph for each
            compiled(torch.ones(2), n)
        return worker.recompiles(counters, before)

    try:
        limit = torch._dynamo.config.recompile_limit
        assert count(range(3)) == 3
        assert count(range(limit + 2)) == f"{limit}; LIMIT REACHED: uncompiled parts"
    finally:
        torch._dynamo.reset()
        counters.clear()


def test_the_loaders_rate_is_that_of_batches_made_meanwhile(tool, monkeypatch):
    worker, _ = tool("gpu_check_worker")
    clock = SimpleNamespace(now=0.0, made=5)

    class Loader:
        num_cached, num_processes = 2, 1  # five batches are made beforehand: two queues of two, and one in the making

        def __next__(self):
            if clock.made:
                clock.made -= 1
            else:
                clock.now += 0.5

    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock.now)
    assert worker.loader_rate(Loader(), seconds=3) == 2  # one in half a second


@pytest.mark.slow
def test_gpu_check_measures_two_trainers_in_a_dry_run(tool, tmp_path, capsys):
    _, run = tool("gpu_check")
    work, out = tmp_path / "work", tmp_path / "out.json"
    common = "--dry-run", "--fused", "--channels-last-3d", "--memory", "small", "--work", work, "--out", out
    run(*common, "--trainers", TWO[1])  # the reference comes on its own
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == TWO
    for _, losses, breaks, recompiles, *memory, step, ratio, rate, share in rows:
        assert losses == "finite"
        assert [breaks, recompiles, *memory] == ["-"] * 6  # without a GPU and torch.compile
        assert float(step) > 0 and float(ratio) > 0 and float(rate) > 0 and share.endswith("%")
    assert rows[0][9] == "1.00"

    content = json.loads(out.read_text())
    assert content["device"] == "CPU" and content["torch"] == torch.__version__
    flags = content["flags"]
    assert (flags["fused"], flags["channels_last_3d"], flags["memory"]) == (True, True, "small")
    reference, teacher = content["rows"]
    assert len(reference["steps_ms"]) == 2
    assert teacher["step_ratio"] == pytest.approx(teacher["step_ms"] / reference["step_ms"])
    assert teacher["loading_share"] == pytest.approx(1000 / teacher["batches_per_s"] / teacher["step_ms"])
    assert set(teacher["terms"]) == {"loss", "supervised", "consistency"}

    # the data is there; without time there are rows, too
    made = (work / "made.json").stat().st_mtime_ns
    run(*common, "--trainers", *TWO, "--budget", 0)
    rows = table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[name, "left out: the budget is used up"] for name in TWO]
    assert (work / "made.json").stat().st_mtime_ns == made


# ---------------------------------------------------------------------------------------------------- yardstick.py


def a_set(folder: Path, ending: str) -> dict:
    """Six training cases and two test cases, whose files hold their own names."""
    protocol = {"train": ["f", "b", "x", "a", "e", "d", "c"], "dev_test": ["x", "y"]}  # x is in both, as in la_small
    for kind, last in (("images", f"_0000{ending}"), ("labels", ending)):
        (folder / kind).mkdir(parents=True)
        for case in "abcdefxy":
            (folder / kind / f"{case}{last}").write_text(f"{kind} of {case}")
    (folder / "protocol.json").write_text(json.dumps(protocol))
    (folder / "texts.json").write_text(json.dumps({case: f"text of {case}" for case in "abxy"}))
    return protocol


@pytest.mark.parametrize("labels, labelled, unlabelled", [("2", "bf", "acde"), ("all", "abcdef", "")])
def test_the_yardstick_never_copies_a_hidden_label(tool, tmp_path, labels, labelled, unlabelled):
    sets, _ = tool("yardstick_sets")
    a_set(tmp_path / "hippocampus", ".nii.gz")
    raw = tmp_path / "raw"
    (raw / "labelsTr").mkdir(parents=True)
    (raw / "labelsTr" / "a.nii.gz").write_text("of a beginning with more labels")
    sets.make_raw(tmp_path, raw, "hippocampus", labels)

    content = {str(file.relative_to(raw)): file.read_text() for file in raw.rglob("*.nii.gz")}
    assert content == {
        **{f"imagesTr/{case}_0000.nii.gz": f"images of {case}" for case in labelled},
        **{f"labelsTr/{case}.nii.gz": f"labels of {case}" for case in labelled},
        **{f"imagesUn/{case}_0000.nii.gz": f"images of {case}" for case in unlabelled},
        **{f"imagesTs/{case}_0000.nii.gz": f"images of {case}" for case in "xy"},
        **{f"labelsTs/{case}.nii.gz": f"labels of {case}" for case in "xy"},
    }
    dataset = json.loads((raw / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "anterior": 1, "posterior": 2}
    assert dataset["numTraining"] == len(labelled)
    assert json.loads((raw / "texts.json").read_text()) == {"a": "text of a", "b": "text of b"}


@pytest.mark.parametrize(
    "name, source, unlabelled",
    [("acdc_10", "acdc_small", "cdefghijkl"), ("la_foreign", "la_small", "cdefghijkABCDEFGHI")],
)
def test_the_yardsticks_variants_have_other_unlabelled_images(tool, tmp_path, name, source, unlabelled):
    sets, _ = tool("yardstick_sets")
    for each, cases in {"acdc_small": "ABCDEFGHIJKLMNOP", source: "abcdefghijklmnopqrst"}.items():
        for kind, last in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            (tmp_path / each / kind).mkdir(parents=True)
            for case in f"{cases}x":
                (tmp_path / each / kind / f"{case}{last}").touch()
        (tmp_path / each / "protocol.json").write_text(json.dumps({"train": list(cases), "dev_test": ["x"]}))
    sets.make_raw(tmp_path, tmp_path / "raw", name, "2")
    assert {file.name[0] for file in (tmp_path / "raw" / "imagesUn").iterdir()} == set(unlabelled)


def test_the_yardsticks_variants_share_the_baselines(tool, tmp_path):
    results, _ = tool("yardstick_results")
    values = {"step_ms": 1.0, "seconds": 1, "dice": 0.5, "hd95_mm": 1.0, "dice_of_classes": "", "dice_of_cases": ""}
    made = {"settings": "", "date": "", "commit": "", **values}
    plain, other = (
        results.Result("la_small", "4", trainer, "default", 0, 2000, **made)
        for trainer in ("SupervisedTrainer", "BCPTrainer")
    )
    for row in (plain, other):
        results.append(tmp_path / "runs.csv", row)
    found = results.known_results(tmp_path / "runs.csv")
    assert [(r.set, r.trainer) for r in found] == [
        ("la_small", "SupervisedTrainer"), ("la_small", "BCPTrainer"), ("la_foreign", "SupervisedTrainer")
    ]  # fmt: skip
    assert results.read_results(tmp_path / "runs.csv") == [plain, other]


def test_the_yardstick_names_a_label_that_is_not_there(tool, tmp_path):
    sets, _ = tool("yardstick_sets")
    a_set(tmp_path / "hippocampus", ".nii.gz")
    (tmp_path / "hippocampus" / "labels" / "d.nii.gz").unlink()
    with pytest.raises(SystemExit, match="has no d.nii.gz"):
        sets.make_raw(tmp_path, tmp_path / "raw", "hippocampus", "all")
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    "name, spacing, widths, last_stride",
    # 24 x 40 x 24 becomes 6 x 10 x 6 by two strides; a third would leave an edge below 4
    [
        ("hippocampus", [1.5] * 3, [16, 32, 64], [2, 2, 2]),
        ("acdc_small", [3.0] * 2, [16, 32, 64, 128, 128, 128], [2, 2]),
    ],
)
def test_the_yardsticks_network_has_the_stages_that_fit(tool, name, spacing, widths, last_stride):
    sets, _ = tool("yardstick_sets")
    about = sets.SETS[name]
    configuration = {"spacing": spacing, "patch_size": [1], "batch_size": 99, "architecture": {"arch_kwargs": {}}}
    sets.fit_plans({"configurations": {about.configuration: configuration}}, about)
    network = configuration["architecture"]["arch_kwargs"]
    assert network["n_stages"] == len(widths) and network["features_per_stage"] == widths
    assert list(network["strides"][-1]) == last_stride and len(network["n_conv_per_stage_decoder"]) == len(widths) - 1
    assert (configuration["patch_size"], configuration["batch_size"]) == (about.patch, about.batch)


@pytest.mark.parametrize(
    "iterations, ratio, longer",
    [(2000, 2.29, 5000), (2000, 2.24, 4000), (2000, 1.1, 2000), (2000, 0.4, 2000), (300, 2.29, 700)],
)
def test_equal_time_is_rounded_to_the_next_half(tool, iterations, ratio, longer):
    results, _ = tool("yardstick_results")
    assert results.equal_time(iterations, ratio) == longer


def test_an_epoch_that_was_trained_again_counts_once(tool, tmp_path):
    results, _ = tool("yardstick_results")
    times = [(0, 10.0), (1, 70.0), (1, 20.0), (2, 30.0)]  # interrupted after the first attempt at epoch 1
    (tmp_path / "times").write_text("".join(json.dumps({"epoch": e, "s": s}) + "\n" for e, s in times))
    assert results.timing(tmp_path / "times", 300) == {"step_ms": 200.0, "seconds": 60}


def test_scores_are_means_over_classes_and_cases(tool):
    results, _ = tool("yardstick_results")
    dices = [("q", "anterior", 0.5), ("q", "posterior", 0.7), ("p", "anterior", 0.9), ("p", "posterior", 0.0)]
    rows = [{"case": case, "label": label, "dice": dice, "hd95_mm": 10 * dice} for case, label, dice in dices]
    assert results.scores_of(rows) == {
        "dice": 0.525,
        "hd95_mm": 5.25,
        "dice_of_classes": "anterior 0.7000; posterior 0.3500",
        "dice_of_cases": "0.4500 0.6000",  # p, then q
    }


def result(yardstick, trainer: str, cases: str, *, seed=0, step=100.0, variant="default", **other):
    """A run of the hippocampus; `posterior` is 0.2 lower than the mean."""
    dice = sum(map(float, cases.split())) / 2
    values = {"set": "hippocampus", "labels": "4", "trainer": trainer, "variant": variant, "seed": seed}
    values |= {"iterations": 2000, "settings": "", "date": "2026-11-27", "commit": "0123456", "step_ms": step}
    values |= {"seconds": 200, "dice": dice, "hd95_mm": 9.0, "dice_of_cases": cases}
    values |= {"dice_of_classes": f"anterior {dice + 0.2:.4f}; posterior {dice - 0.2:.4f}"}
    return yardstick.Result(**values | other)


def test_the_yardsticks_table(tool, tmp_path, capsys):
    yardstick, run = tool("yardstick")
    read = tool("yardstick_results")[0].read_results
    bcp = result(yardstick, "BCPTrainer", "0.6 0.8", step=250.0)
    results = [
        bcp,
        result(yardstick, "SupervisedTrainer", "0.6 0.6", seed=1),
        result(yardstick, "SupervisedTrainer", "0.5 0.7"),
        result(yardstick, "SupervisedTrainer", "0.8 0.8", labels="all"),
        result(yardstick, "SupervisedTrainer", "0.62 0.68", iterations=5000),
        result(yardstick, "BCPTrainer", "0.5 0.6", variant="loud", settings="bcp_loud=true", step=450.0),
        # of other tables
        result(yardstick, "BCPTrainer", "0.9 0.9", labels="8"),
        result(yardstick, "SupervisedTrainer", "0.9 0.9", set="la_small"),
        result(yardstick, "SupervisedTrainer", "0.9 0.9", labels="all", iterations=5000),
    ]
    file = tmp_path / "runs.csv"
    for one in results:
        yardstick.append(file, one)
    assert read(file) == results

    run("--csv", file, "--sets", "hippocampus")
    printed = capsys.readouterr().out
    assert printed.count("labelled, ") == 2  # with 4 and 8 labels; none for 5,000 iterations of labelled only alone
    rows = table(printed[: printed.index("8 labelled")])
    assert [row[:6] for row in rows[:2]] == [
        ["labelled only", "0.600 0.600", "0.600", "0.400 posterior", "9.00", "-"],
        ["all labels", "0.800", "0.800", "0.600 posterior", "9.00", "-"],
    ]
    # cases of labelled only 0.55 and 0.65, so that they differ by 0.05 and 0.15; of two cases, a resample's mean is one
    # of these in a quarter each. The step is 2.5 times as long: against 0.65 after 5,000 iterations, -0.02 and 0.12.
    at_equal_iterations = ["50%", "+0.100 (+0.050 to +0.150)"]
    at_equal_time = ["2.50", "5,000, 0.650", "33%", "+0.050 (-0.020 to +0.120)"]
    assert rows[2] == ["BCPTrainer", "0.700", "0.700", "0.500 posterior", "9.00", *at_equal_iterations, *at_equal_time]
    loud = ["BCPTrainer, loud", "0.550", "0.550", "0.350 posterior", "9.00", "-25%", "-0.050 (-0.050 to -0.050)"]
    assert rows[3] == [*loud, "4.50", "9,000", "-", "-"]

    longer = yardstick.equal_time_runs(results, [bcp.run, results[1].run])
    assert longer == [results[4].run]


def test_a_finished_run_is_left_alone_and_its_name_is_taken(tool, tmp_path, capsys):
    yardstick, _ = tool("yardstick")
    read = tool("yardstick_results")[0].read_results
    (tmp_path / "locks").mkdir()
    done = result(yardstick, "BCPTrainer", "0.6 0.8", variant="loud", settings="bcp_loud=true")
    yardstick.append(tmp_path / "runs.csv", done)
    args = argparse.Namespace(work=tmp_path, csv=tmp_path / "runs.csv", set=["bcp_loud=true"])
    yardstick.do(args, done.run, "7654321")
    assert "not repeated: done with commit 0123456, and the code is now at 7654321" in capsys.readouterr().out
    args.set = ["bcp_loud=false"]
    with pytest.raises(RuntimeError, match="choose another --name"):
        yardstick.do(args, done.run, "0123456")
    assert read(args.csv) == [done]


# ----------------------------------------------------------------------------------------------- review_check.py


def test_an_estimate_is_held_against_the_truth(tool):
    review_check, _ = tool("review_check")
    cases = [f"c{i:02d}" for i in range(20)]
    truth = {case: i / 20 for i, case in enumerate(cases)}
    backwards = [19 - i for i in range(20)]
    halves = [(i + 5) % 20 for i in range(20)]  # of the ten worst it finds c00 to c04
    table = pd.DataFrame({"case": cases, "right": range(20), "wrong": backwards, "half": halves})
    rows = review_check.agreement_with_truth(table, truth, ["right", "wrong", "half"])
    # 1 - 6 sum(d^2) / (n (n^2 - 1)), d = 5 for fifteen cases and 15 for five
    assert rows == [["right", "1.00", "1.0"], ["wrong", "-1.00", "0.0"], ["half", f"{1 - 6 * 1500 / 7980:.2f}", "0.5"]]


def test_each_round_of_the_loop_is_a_model_of_its_own(tool):
    review_check, _ = tool("review_check")
    run = review_check.Run("acdc_small", "6", "SupervisedTrainer", "default", 0, 2000)
    plans = [review_check.round_of(run, i).plans for i in range(3)]
    assert plans == ["default_2000_seed0", "default_2000_seed0_round1", "default_2000_seed0_round2"]
    assert review_check.round_of(run, 2).dataset == "Dataset706_acdc_small_6"


def test_the_loop_copies_a_model_without_the_locks_of_a_running_training(tool, tmp_path):
    review_check, _ = tool("review_check")
    run = review_check.Run("acdc_small", "6", "SupervisedTrainer", "default", 0, 2000)
    work, root = tmp_path / "work", tmp_path / "root"
    for place in (*(work / name / run.dataset for name in ("raw", "preprocessed")), review_check.model_of(work, run)):
        place.mkdir(parents=True)
        (place / "file").touch()
    (work / "preprocessed" / run.dataset / ".cases.reading.lock").touch()
    review_check.copy_of_model(work, root, run)
    assert [f.name for f in (root / "preprocessed" / run.dataset).iterdir()] == ["file"]
    assert (review_check.model_of(root, run) / "file").exists()


# ------------------------------------------------------------------------------------- simulated_masks.py and words.py


def test_simulated_masks_by_hand(tool):
    """A square of 3 x 3: eroded to its middle, which is shifted by 2; or dilated by a pixel at each side."""
    simulated, _ = tool("simulated_masks")
    label = np.zeros((9, 9), np.uint8)
    label[3:6, 3:6] = 2
    rng = np.random.default_rng(0)
    mask = simulated.worse(label, simulated.Kind((-1,), (2, 2), 0), rng)
    ((y, x),) = np.argwhere(mask == 2)
    assert mask.sum() == 2 and y in (2, 6) and x in (2, 6)
    mask = simulated.worse(label, simulated.Kind((1,), (0, 0), 0), rng)
    assert (mask == 2).sum() == 9 + 4 * 3 and mask[2, 4] == mask[4, 6] == 2 and mask[2, 2] == 0
    assert simulated.on_grid_of(label, (3, 3)).tolist() == [[0, 0, 0], [0, 2, 0], [0, 0, 0]]


def test_a_swapped_mask_is_that_of_the_next_case(tool, tmp_path):
    simulated, _ = tool("simulated_masks")
    files = {}
    for value, case in enumerate("abc", 1):
        image = sitk.GetImageFromArray(np.full((2, 3, 4), value, np.uint8))
        image.SetSpacing((1, 2, value))
        sitk.WriteImage(image, str(tmp_path / f"{case}.nii.gz"))
        files[case] = tmp_path / f"{case}.nii.gz"
    simulated.simulate(files, tmp_path / "out", simulated.Kind((0,), (0, 0), 1.0))
    masks = {case: sitk.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz")) for case in files}
    assert {case: sitk.GetArrayFromImage(mask).max() for case, mask in masks.items()} == {"a": 2, "b": 3, "c": 1}
    assert masks["a"].GetSpacing() == (1, 2, 1)


def test_simulated_masks_are_for_the_labels_that_the_yardstick_takes(tool, tmp_path, monkeypatch):
    """`few` of acdc_small is 6."""
    simulated, run = tool("simulated_masks")
    for name in ("raw", "preprocessed", "results", "def_n_proc"):
        monkeypatch.setenv(f"nnUNet_{name}", "")

    def prepare(data, work, *asked):
        assert asked == ("acdc_small", "6")
        raise InterruptedError

    monkeypatch.setattr(simulated, "prepare", prepare)
    with pytest.raises(InterruptedError):
        run("--data", tmp_path, "--work", tmp_path, "--set", "acdc_small", "--kind", "bad")


def test_shuffled_texts_are_those_of_others(tool):
    sets, _ = tool("yardstick_sets")
    texts = {str(i): f"text {i}" for i in range(20)}
    shuffled = sets.shuffle(texts)
    assert sorted(shuffled.values()) == sorted(texts.values()) and shuffled == sets.shuffle(texts)
    assert not any(shuffled[case] == texts[case] for case in texts)


# ------------------------------------------------------------------------------------------------- many_cases.py


def test_linked_cases_differ_in_what_names_them_alone(tool, tmp_path, monkeypatch):
    many_cases, _ = tool("many_cases")
    monkeypatch.setattr(many_cases, "set_folders", lambda work: [work / "raw", work / "preprocessed"])
    images, folder = tmp_path / "raw" / "imagesUn", tmp_path / "preprocessed" / f"{many_cases.PLANS}_3d__unlabeled"
    for file in (images / "un0000000_0000.nii.gz", folder / "un0000000.b2nd", folder / "un0000000_seg.b2nd"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    about = {"spacing": 1, "semiseg": {"images": [["un0000000_0000.nii.gz", 21, 3, 4, "digest"]]}}
    (folder / "un0000000.pkl").write_bytes(pickle.dumps(about))
    for count in (2, 3):  # the second case is there already
        many_cases.link_cases(tmp_path, count)
    assert len(list(images.iterdir())) == 3 and len(list(folder.iterdir())) == 9
    assert (images / "un0000002_0000.nii.gz").read_text() == "un0000000_0000.nii.gz"
    assert (folder / "un0000002_seg.b2nd").read_text() == "un0000000_seg.b2nd"
    about["semiseg"]["images"][0][0] = "un0000002_0000.nii.gz"
    assert pickle.loads((folder / "un0000002.pkl").read_bytes()) == about
