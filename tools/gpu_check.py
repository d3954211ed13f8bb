"""Check that every trainer works on a GPU, and measure its cost as ratios to SupervisedTrainer, in one table.

    python tools/gpu_check.py --out gpu.json [--budget 540] [--work DIR] [--memory fast] [--trainers NAME ...]

It makes its own data, nnU-Net plans of full size, and small untrained text and vision towers. `--work` keeps these for
the next call. The package must be installed. `--dry-run` does the same on a CPU, with tiny plans.

Each trainer takes a few steps at the beginning of its training and a few at the end, because methods switch terms on
later. The timed steps come last, with nnU-Net's mixed precision and gradient scaler. The column "losses" says whether
the loss terms of all these steps, and the weights, are finite. All graph breaks that torch.compile found are counted;
recompiles are the graphs that it made in the timed steps. Memory is that of CUDA's allocator in the timed steps. The
time of a step does not include loading. "loading / step" is the share of a step that the loader's workers need for a
batch: above 100% the GPU waits. Trainers with equal loaders share one measurement.

A worker process does the measuring. If it dies or hangs, another one continues with the next trainer.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REFERENCE = "SupervisedTrainer"
EVENTS, LOG = "events.jsonl", "log.txt"
COLUMNS = {
    "losses": "losses",
    "graph_breaks": "graph breaks",
    "recompiles": "recompiles",
    "allocated_MiB": "allocated, MiB",
    "allocated_ratio": "ratio",
    "reserved_MiB": "reserved, MiB",
    "reserved_ratio": "ratio",
    "step_ms": "step, ms",
    "step_ratio": "ratio",
    "batches_per_s": "batches / s",
    "loading_share": "loading / step",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_what(parser)
    add_how_long(parser)
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for data, plans and the log; default: a temporary one"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file for the results, .json or .csv; it is written again after every trainer",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run on the CPU, with small defaults: tiny plans and few steps"
    )
    parser.add_argument("--worker-until", type=float, help=argparse.SUPPRESS)  # the time at which the budget ends
    args = parser.parse_args()
    tiny = args.dry_run
    defaults = {
        "compile": not tiny,
        "planner": "SemiSegPlannerSmall" if tiny else "ExperimentPlanner",
        "size": [24, 24, 24] if tiny else [112, 192, 192],
        "steps": 2 if tiny else 10,
        "warmup": 1 if tiny else 3,
        "workers": 1 if tiny else min(12, os.cpu_count() or 1),
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out and args.out.suffix not in (".json", ".csv"):
        parser.error(f"--out {args.out}: must end in .json or .csv")
    return args


def add_what(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which trainers are checked, and how these train."""
    parser.add_argument(
        "--trainers",
        nargs="+",
        help="trainers to check; default: all. SupervisedTrainer is always checked, because the others are compared"
        " with it",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="use torch.compile; default: on a GPU only"
    )
    parser.add_argument(
        "--channels-last-3d", action="store_true", help="keep tensors in torch's memory format channels_last_3d"
    )
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, help="use torch's fused SGD; default: as the trainers do"
    )
    parser.add_argument(
        "--memory",
        choices=["stock", "fast", "small"],
        default="stock",
        help="value of the setting `memory` for all trainers; default: %(default)s",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of all trainers, such as unlabeled_batch_size=4",
    )
    parser.add_argument("--planner", help="planner, which makes the plans; default: nnU-Net's ExperimentPlanner")
    parser.add_argument(
        "--size",
        nargs=3,
        type=int,
        metavar=("Z", "Y", "X"),
        help="size of the volumes, in voxels of 1 mm; default: 112 192 192",
    )


def add_how_long(parser: argparse.ArgumentParser) -> None:
    """Add the options for numbers of steps and workers, and for limits of time."""
    parser.add_argument("--steps", type=int, help="number of timed steps; default: 10")
    parser.add_argument(
        "--warmup",
        type=int,
        help="number of untimed steps at the beginning of the training, and again at its end; default: 3",
    )
    parser.add_argument(
        "--workers", type=int, help="number of workers of the loader; default: one for each core, at most 12"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=540,
        help="after this many seconds no further trainer is started; default: %(default)g",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=200,
        help="after this many seconds a trainer is stopped and counts as failed; default: %(default)g",
    )


# ------------------------------------------------------------------------------------------- the process that watches


class Watch:
    """Starts workers, prints and writes their rows, and ends a worker that takes too long over a trainer."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.start = args, work, time.time()
        self.until = self.start + args.budget
        self.about: dict = {}
        self.rows: list[dict] = []
        self.pending: list[str] | None = args.trainers and [REFERENCE, *(t for t in args.trainers if t != REFERENCE)]
        self.running: str | None = None  # a trainer that has begun and has no row yet
        self.begun = 0.0
        self.read = 0  # bytes of the events

    def run(self) -> None:
        events = self.work / EVENTS
        events.unlink(missing_ok=True)
        while self.pending is None or self.pending:
            before = self.pending
            code = self.work_on(events)
            if self.running:
                self.take({"trainer": self.running, "error": f"the process ended ({code}): see {LOG}"})
            if self.pending is None or self.pending == before:
                lines = (self.work / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                print("\n".join(lines[-15:]), file=sys.stderr)
                raise SystemExit(f"the worker ended ({code}) before its first trainer: its last lines, above, say why")

    def work_on(self, events: Path) -> str:
        """Run one worker until it ends or takes too long. Returns how it ended."""
        folders = {f"nnUNet_{p}": str(self.work / f"nnUNet_{p}") for p in ("raw", "preprocessed", "results")}
        env = {**os.environ, **folders, "nnUNet_n_proc_DA": str(self.args.workers)}
        if self.args.dry_run:
            env.setdefault("OMP_NUM_THREADS", "1")
        options = ["--work", str(self.work), "--worker-until", str(self.until)]
        if self.pending is not None:
            options += ["--trainers", *self.pending]
        with open(self.work / LOG, "a", encoding="utf-8") as log:
            # later options win; in a session of its own it can be ended with all its loaders
            command = [sys.executable, __file__, *sys.argv[1:], *options]
            worker = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            try:
                while True:
                    ended = worker.poll() is not None
                    self.read_events(events)
                    if ended:
                        return f"exit status {worker.returncode}"
                    since = self.begun if self.running else self.until  # the data has the whole budget
                    if time.time() - since > self.args.limit:
                        return f"given up after --limit {self.args.limit:.0f} seconds"
                    time.sleep(0.2)
            finally:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                    worker.wait()

    def read_events(self, events: Path) -> None:
        if not events.is_file():
            return
        with open(events, "rb") as file:
            file.seek(self.read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.read += len(whole + newline)
        for line in whole.splitlines():
            event = json.loads(line)
            if "begin" in event:
                self.running, self.begun = event["begin"], time.time()
            elif "row" in event:
                self.take(event["row"])
            else:
                self.print_head(event["about"])

    def print_head(self, about: dict) -> None:
        first = not self.about
        self.about = about
        if self.pending is None:
            self.pending = list(about["trainers"])
        if first:
            flags = ", ".join(f"{k} {v}" for k, v in about["flags"].items())
            print(f"{about['device']}, torch {about['torch']}; {flags}")
            print(
                f"patch {about['patch']}, batch {about['batch_size']}; {about['seconds']:.0f} s until the data was made"
            )
            print(
                "\n| trainer | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|", flush=True
            )

    def take(self, row: dict) -> None:
        """Add the ratios to a trainer's row, print it and write it."""
        self.running = None
        self.pending = [name for name in self.pending or [] if name != row["trainer"]]
        self.rows.append(row)
        reference = next((r for r in self.rows if r["trainer"] == REFERENCE), {})
        for key, ratio in {"allocated_MiB": "allocated", "reserved_MiB": "reserved", "step_ms": "step"}.items():
            if row.get(key) and reference.get(key):
                row[f"{ratio}_ratio"] = row[key] / reference[key]
        if "error" in row:
            print(f"| {row['trainer']} | {row['error']} |" + " |" * (len(COLUMNS) - 1), flush=True)
        else:
            print(f"| {row['trainer']} | " + " | ".join(cell(key, row.get(key)) for key in COLUMNS) + " |", flush=True)
        if self.args.out:
            write(self.args.out, self.about, self.rows)


def cell(key: str, value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0%}" if key == "loading_share" else f"{value:.2f}" if "MiB" not in key else f"{value:.0f}"
    return str(value)


def write(file: Path, about: dict, rows: list[dict]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    if file.suffix == ".json":
        temporary.write_text(json.dumps({**about, "rows": rows}, indent=2), encoding="utf-8")
    else:
        same = {"device": about.get("device"), "torch": about.get("torch"), **about.get("flags", {})}
        names = ["trainer", *COLUMNS, "error", *same]
        with open(temporary, "w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**row, **same} for row in rows)
    os.replace(temporary, file)


def main() -> None:
    args = parse()
    if args.worker_until is not None:
        # the worker alone imports torch and nnU-Net, which reads its folders from the environment when it is imported
        from gpu_check_worker import work

        work(args, args.work / EVENTS, REFERENCE)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)).absolute()
        for place in ("raw", "preprocessed", "results"):
            (folder / f"nnUNet_{place}").mkdir(parents=True, exist_ok=True)
        (folder / LOG).unlink(missing_ok=True)
        Watch(args, folder).run()


if __name__ == "__main__":
    main()
