"""Check that every trainer works on a GPU, and measure its cost as ratios to SupervisedTrainer, in one table.

    python tools/gpu_check.py --out gpu.json [--budget 540] [--work DIR] [--memory fast] [--trainers NAME ...]

It makes its own data, nnU-Net plans of full size, and small untrained text and vision towers. `--work` keeps these for
the next call. The package must be installed. `--dry-run` does the same on a CPU, with tiny plans.

Each trainer takes a few steps at the beginning of its training and a few at the end, because methods switch terms on
later. The timed steps come last, with nnU-Net's mixed precision and gradient scaler. The losses in the table are from
all these steps. All graph breaks that torch.compile found are counted; recompiles are the graphs that it made in the
timed steps. Memory is that of CUDA's allocator in the timed steps. The time of a step does not include loading.
"loading / step" is the share of a step that the loader's workers need for a batch: above 100% the GPU waits. Trainers
with equal loaders share one measurement.

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

# The worker alone imports torch and nnU-Net, which reads its folders from the environment when it is imported.

REFERENCE = "SupervisedTrainer"
DATASET_ID, DATASET, PLANS = 997, "Dataset997_GPUCheck", "GPUCheckPlans"
CONFIGURATION = "3d_fullres"
CASES = 3  # labelled, and as many unlabelled
EVENTS, LOG, MADE = "events.jsonl", "log.txt", "made.json"
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
    parser.add_argument(
        "--trainers", nargs="+", help="trainers to check; default: all. SupervisedTrainer always comes first"
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
    parser.add_argument("--steps", type=int, help="number of timed steps; default: 10")
    parser.add_argument(
        "--warmup",
        type=int,
        help="number of untimed steps, at the beginning and at the end of the training; default: 3",
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
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for data, plans and the log")
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


# ------------------------------------------------------------------------------------------------------- the worker


def work(args: argparse.Namespace) -> None:
    import torch

    from nnunet_semiseg.discovery import find_trainer, iter_classes
    from nnunet_semiseg.files import read_json
    from nnunet_semiseg.settings.plans import parse_assignments, update_settings

    events = open(args.work / EVENTS, "a", encoding="utf-8", buffering=1)  # a line is written as a whole

    def tell(**event) -> None:
        events.write(json.dumps(event) + "\n")

    if not args.dry_run:
        if not torch.cuda.is_available():
            raise SystemExit("gpu_check.py: torch finds no GPU: use a machine with one, or --dry-run")
        torch.backends.cudnn.benchmark = True  # as nnUNetv2_train does
    begin = time.time()
    plans_file = make_data(args)
    known = {trainer.__name__: trainer for trainer in iter_classes("trainers")}
    names = args.trainers or [REFERENCE, *sorted(known.keys() - {REFERENCE})]
    settings = {
        "num_epochs": 2,
        "text_model": str(args.work / "text_tower"),
        "text_pretrained": "none",
        "vlm": str(args.work / "vlm"),
        "memory": args.memory,
    }
    plans = update_settings(read_json(plans_file, "delete the folder"), {**settings, **parse_assignments(args.set)})
    configuration = plans["configurations"][CONFIGURATION]
    flags = (
        "compile",
        "channels_last_3d",
        "fused",
        "memory",
        "set",
        "planner",
        "workers",
        "warmup",
        "steps",
        "dry_run",
    )
    about = {
        "device": "CPU" if args.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flags": {flag: getattr(args, flag) for flag in flags},
        "patch": " x ".join(map(str, configuration["patch_size"])),
        "batch_size": configuration["batch_size"],
        "seconds": time.time() - begin,
        "trainers": names,
    }
    tell(about=about)
    rates: dict[tuple, float] = {}
    for name in names:
        if time.time() > args.worker_until:
            tell(row={"trainer": name, "error": "left out: the budget is used up"})
            continue
        tell(begin=name)
        begin = time.time()
        row, alive = attempt(known.get(name) or find_trainer(name), plans, args, rates)
        tell(row={"trainer": name, **row, "seconds": time.time() - begin})
        if not alive:
            os._exit(3)  # CUDA's context is lost: another process goes on


def attempt(trainer_class: type, plans: dict, args: argparse.Namespace, rates: dict) -> tuple[dict, bool]:
    """Measure one trainer and free its memory. Returns its row or its error, and whether this process can go on."""
    import gc
    import traceback

    import torch

    row: dict = {}
    try:
        measure(trainer_class, plans, args, rates, row)
    except Exception as error:
        traceback.print_exc()
        row["traceback"] = traceback.format_exc()
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")
        traceback.clear_frames(error.__traceback__)  # these hold the trainer
    torch._dynamo.reset()
    gc.collect()
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return row, False
    return row, True


def measure(trainer_class: type, plans: dict, args: argparse.Namespace, rates: dict, row: dict) -> None:
    """Fill the row of a trainer step by step. So an error does not lose what was measured before it."""
    from contextlib import ExitStack
    from functools import partial
    from statistics import median
    from types import SimpleNamespace
    from unittest import mock

    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from step_cost import make, now
    from torch._dynamo.utils import counters

    device = "cpu" if args.dry_run else "cuda"
    counters.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        row["before_MiB"] = torch.cuda.memory_allocated() / 2**20  # not 0: the trainer before left something
    with ExitStack() as stack:
        # nnU-Net never compiles on a CPU, but a dry run may
        stack.enter_context(mock.patch.object(nnUNetTrainer, "_do_i_compile", lambda self: args.compile))
        if args.fused is not None:
            chosen = partial(sgd, torch.optim.SGD, args.fused)
            stack.enter_context(mock.patch.object(torch.optim, "SGD", chosen))
        where = SimpleNamespace(c=CONFIGURATION, f="all", device=device)
        trainer = make(trainer_class, plans, where, os.path.join(os.environ["nnUNet_preprocessed"], DATASET))
        stack.callback(close_loaders, trainer)
        if trainer.grad_scaler is None:  # nnU-Net has none on a CPU
            trainer.grad_scaler = torch.amp.GradScaler(device)
        if args.channels_last_3d:
            to_channels_last(trainer)
        steps = partial(run_steps, trainer, channels_last=args.channels_last_3d)

        trainer.on_train_epoch_start()
        losses = [loss for _, loss in steps(args.warmup, 0, lambda: now(device))]

        trainer.current_epoch = trainer.num_epochs - 1
        trainer.on_train_epoch_start()
        last = trainer.num_epochs * trainer.num_iterations_per_epoch - 1
        losses += [loss for _, loss in steps(args.warmup, last, lambda: now(device))]
        graphs = counters["stats"]["unique_graphs"]
        if device == "cuda":
            row["reserved_in_all_MiB"] = torch.cuda.max_memory_reserved() / 2**20
            torch.cuda.reset_peak_memory_stats()
        timed = list(steps(args.steps, last, lambda: now(device)))
        if device == "cuda":
            row["allocated_MiB"] = torch.cuda.max_memory_allocated() / 2**20
            row["reserved_MiB"] = torch.cuda.max_memory_reserved() / 2**20
        row["step_ms"] = 1000 * median(seconds for seconds, _ in timed)
        row["steps_ms"] = [1000 * seconds for seconds, _ in timed]
        losses += [loss for _, loss in timed]
        bad = sorted({name for terms in losses for name, value in terms.items() if not abs(value) < float("inf")})
        if not all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters()):
            bad.append("weights")
        row["losses"] = f"NOT FINITE: {' '.join(bad)}" if bad else "finite"
        row["terms"] = losses[-1]
        row["scale"] = trainer.grad_scaler.get_scale()  # 65536 at first, halved where a step was skipped
        if args.compile:
            row["graph_breaks"] = sum(counters["graph_break"].values())
            row["recompiles"] = recompiles(counters, graphs)
            row["graphs"] = counters["stats"]["unique_graphs"]
            row["graph_break_reasons"] = [
                reason[:300] for kind in ("graph_break", "unimplemented") for reason in counters[kind]
            ]
        kind = loader_kind(trainer)
        if kind not in rates:
            rates[kind] = loader_rate(trainer.dataloader_train, seconds=1 if args.dry_run else 4)
        row["batches_per_s"] = rates[kind]
        row["loading_share"] = 1 / rates[kind] / (row["step_ms"] / 1000)


def recompiles(counters: dict, before: int) -> int | str:
    """The number of graphs that torch.compile made since `before`.

    Above its limit, torch.compile makes no more graphs of a function and runs it uncompiled. This is not a graph break.
    """
    number = counters["stats"]["unique_graphs"] - before
    limit = any("recompile limit" in reason.lower() for reason in counters["unimplemented"])
    return f"{number}; LIMIT REACHED: uncompiled parts" if limit else number


def sgd(optimizer_class: type, choice: bool, /, *args, **kwargs):
    """Make SGD with one kernel for all weights (`fused`) or without. The choice of the trainer is ignored."""
    return optimizer_class(*args, **{**kwargs, "fused": choice})


def run_steps(trainer, number: int, step: int, clock, channels_last: bool):
    """Run a number of training steps on batches that are already made, and yield the seconds and loss terms of each."""
    import torch
    from torch.utils._pytree import tree_map_only

    batches = [next(trainer.dataloader_train) for _ in range(min(number, 3))]
    if channels_last:
        # the images alone: targets have no such layout in nnU-Net's losses
        for batch in batches:
            images = {key: batch[key] for key in ("data", "views") if key in batch}
            batch.update(
                tree_map_only(torch.Tensor, lambda x: x.contiguous(memory_format=torch.channels_last_3d), images)
            )
    for i in range(number):
        if hasattr(trainer, "step"):
            trainer.step = step
        start = clock()
        terms = trainer.train_step(batches[i % len(batches)])
        end = clock()
        yield end - start, {name: float(value) for name, value in terms.items()}


def to_channels_last(trainer) -> None:
    """Store the weights of 3d convolutions as channels last. Their outputs then have this layout, too."""
    import torch

    modules = [trainer.network, getattr(trainer, "auxiliary", None), getattr(trainer, "teacher", None)]
    for module in modules:
        for p in module.parameters() if module is not None else ():
            if p.ndim == 5:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d)


def loader_kind(trainer) -> tuple:
    """Everything that the speed of a loader depends on. Trainers with the same value share one measurement."""
    methods = (
        "target_maker",
        "extend_loader",
        "get_dataloaders",
        "make_unlabeled_loader",
        "get_training_transforms",
        "configure_rotation_dummyDA_mirroring_and_inital_patch_size",
    )
    return getattr(trainer, "views", ()), *(getattr(type(trainer), name, None) for name in methods)


def loader_rate(loader, seconds: float) -> float:
    """The number of batches in a second. It is measured after the batches that were made in advance are used up."""
    begin = time.perf_counter()
    for _ in range(2 * loader.num_cached + loader.num_processes):
        next(loader)
        if time.perf_counter() - begin > 2 * seconds:
            break
    begin, number, spent = time.perf_counter(), 0, 0.0
    while number < 2 or spent < seconds:
        next(loader)
        number, spent = number + 1, time.perf_counter() - begin
    return number / spent


def close_loaders(trainer) -> None:
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        loader._finish()


# --------------------------------------------------------------------------------------------------------- the data


def make_data(args: argparse.Namespace) -> Path:
    """Make a data set, its plans and towers, unless an earlier call has left them. Returns the file of the plans."""
    from unittest import mock

    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    from nnunet_semiseg.planning import plan_and_preprocess
    from nnunet_semiseg.planning_request import PlanningRequest

    extract = DatasetFingerprintExtractor.run

    def extract_few(self, *positional, **named):
        """Collect fewer intensities than nnU-Net does. 100 million take a minute, and these images are only noise."""
        self.num_foreground_voxels_for_intensitystats = 1_000_000
        return extract(self, *positional, **named)

    plans_file = args.work / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json"
    what = {"size": args.size, "planner": args.planner}
    made = args.work / MADE
    if made.is_file():
        if (before := json.loads(made.read_text(encoding="utf-8"))) != what:
            raise SystemExit(f"--work {args.work}: holds data of {before}, not of {what}: name another folder")
        return plans_file
    if not (args.work / "vlm" / "vlm.json").is_file():
        write_towers(args.work)
    write_dataset(args.work / "nnUNet_raw" / DATASET, args.size)
    processes = 1 if args.dry_run else CASES
    with mock.patch.object(DatasetFingerprintExtractor, "run", extract_few):
        plan_and_preprocess(
            PlanningRequest(
                dataset_ids=[DATASET_ID],
                configurations=[CONFIGURATION],
                planner=args.planner,
                num_processes=[processes],
                num_processes_fingerprint=processes,
                overwrite_plans_name=PLANS,
                show_progress_bar=False,
            )
        )
    made.write_text(json.dumps(what), encoding="utf-8")  # last: where it is, all is there
    return plans_file


def write_dataset(folder: Path, size: list[int]) -> None:
    """Write labelled and unlabelled cases: noise with two ellipsoids, one inside the other."""
    import numpy as np
    import SimpleITK as sitk

    for name in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    grid = np.ogrid[tuple(slice(-1, 1, 1j * n) for n in size)]
    for case in range(2 * CASES):
        centre, radii = rng.uniform(-0.3, 0.3, 3), rng.uniform(0.4, 0.65, 3)
        distance = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True))
        label = (distance < 1).astype(np.uint8) + (distance < 0.3)
        image = 60 + 50 * label + 8 * rng.standard_normal(size, np.float32)
        kind, name = ("Un", f"un_{case:03d}") if case >= CASES else ("Tr", f"tr_{case:03d}")
        sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)), folder / f"images{kind}" / f"{name}_0000.mha")
        if kind == "Tr":
            sitk.WriteImage(sitk.GetImageFromArray(label.astype(np.uint8)), folder / "labelsTr" / f"{name}.mha")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "kidney": 1, "tumour": 2},
        "numTraining": CASES,
        "file_ending": ".mha",
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def write_towers(folder: Path) -> None:
    """Write a text tower and the files that `pretrain_vlm` writes. Both are small and have random weights."""
    from safetensors.torch import save_file

    from nnunet_semiseg.text.open_clip_models import load_clip
    from nnunet_semiseg.vlm.model import AMVLM

    model = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
    for name in ("text_tower", "vlm"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        config = json.dumps({"model_cfg": model, "preprocess_cfg": {}})
        (folder / name / "open_clip_config.json").write_text(config, encoding="utf-8")
    vlm = folder / "vlm"
    settings = {"dim": 64, "hidden": 128}
    save_file(AMVLM(*load_clip(str(vlm), "none"), **settings).state_dict(), vlm / "vlm.safetensors")
    (vlm / "vlm.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")


def main() -> None:
    args = parse()
    if args.worker_until is not None:
        work(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)).absolute()
        for place in ("raw", "preprocessed", "results"):
            (folder / f"nnUNet_{place}").mkdir(parents=True, exist_ok=True)
        (folder / LOG).unlink(missing_ok=True)
        Watch(args, folder).run()


if __name__ == "__main__":
    main()
