"""The tools that measure: their tables, and the parts whose numbers can be worked out by hand."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
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
    gpu_check, _ = tool("gpu_check")
    counters = torch._dynamo.utils.counters

    def count(numbers) -> int | str:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(lambda x, n: x + n, backend="eager", dynamic=False)
        before = counters["stats"]["unique_graphs"]
        for n in numbers:  # a graph for each
            compiled(torch.ones(2), n)
        return gpu_check.recompiles(counters, before)

    try:
        limit = torch._dynamo.config.recompile_limit
        assert count(range(3)) == 3
        assert count(range(limit + 2)) == f"{limit}; LIMIT REACHED: uncompiled parts"
    finally:
        torch._dynamo.reset()
        counters.clear()


def test_the_loaders_rate_is_that_of_batches_made_meanwhile(tool, monkeypatch):
    gpu_check, _ = tool("gpu_check")
    clock = SimpleNamespace(now=0.0, made=5)

    class Loader:
        num_cached, num_processes = 2, 1  # five batches are made beforehand: two queues of two, and one in the making

        def __next__(self):
            if clock.made:
                clock.made -= 1
            else:
                clock.now += 0.5

    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: clock.now)
    assert gpu_check.loader_rate(Loader(), seconds=3) == 2  # one in half a second


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
