"""The process of tools/gpu_check.py that measures trainers."""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from gpu_check_data import CONFIGURATION, DATASET, make_data
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from step_cost import make, now
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

from nnunet_semiseg.discovery import find_trainer, iter_classes
from nnunet_semiseg.files import read_json
from nnunet_semiseg.settings.plans import parse_assignments, update_settings


def work(args: argparse.Namespace, events: Path, reference: str) -> None:
    """Measure one trainer after the other.

    Args:
        events: a file to which each event is written, one JSON object a line.
        reference: the name of the trainer that comes first.
    """
    lines = open(events, "a", encoding="utf-8", buffering=1)  # a line is written as a whole

    def tell(**event) -> None:
        lines.write(json.dumps(event) + "\n")

    if not args.dry_run:
        if not torch.cuda.is_available():
            raise SystemExit("gpu_check.py: torch finds no GPU: use a machine with one, or --dry-run")
        torch.backends.cudnn.benchmark = True  # as nnUNetv2_train does
    begin = time.time()
    plans_file = make_data(args)
    known = {trainer.__name__: trainer for trainer in iter_classes("trainers")}
    names = args.trainers or [reference, *sorted(known.keys() - {reference})]
    plans = with_settings(read_json(plans_file, "delete the folder"), args)
    tell(about=describe(args, plans, time.time() - begin) | {"trainers": names})
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


def with_settings(plans: dict, args: argparse.Namespace) -> dict:
    """The plans with the settings of all trainers."""
    settings = {
        "num_epochs": 2,
        "text_model": str(args.work / "text_tower"),
        "text_pretrained": "none",
        "vlm": str(args.work / "vlm"),
        "memory": args.memory,
    }
    return update_settings(plans, {**settings, **parse_assignments(args.set)})


def describe(args: argparse.Namespace, plans: dict, seconds: float) -> dict:
    """What is measured, for the head of the table. `seconds` is the time until the data was made."""
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
    return {
        "device": "CPU" if args.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flags": {flag: getattr(args, flag) for flag in flags},
        "patch": " x ".join(map(str, configuration["patch_size"])),
        "batch_size": configuration["batch_size"],
        "seconds": seconds,
    }


def attempt(trainer_class: type, plans: dict, args: argparse.Namespace, rates: dict) -> tuple[dict, bool]:
    """Measure one trainer and free its memory. Returns its row or its error, and whether this process can go on."""
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
    device = "cpu" if args.dry_run else "cuda"
    counters.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        row["before_MiB"] = torch.cuda.memory_allocated() / 2**20  # not 0: the trainer before left something
    with ready_trainer(trainer_class, plans, args, device) as trainer:
        steps = partial(run_steps, trainer, clock=partial(now, device), channels_last=args.channels_last_3d)

        trainer.on_train_epoch_start()
        losses = [loss for _, loss in steps(args.warmup, 0)]

        trainer.current_epoch = trainer.num_epochs - 1
        trainer.on_train_epoch_start()
        last = trainer.num_epochs * trainer.num_iterations_per_epoch - 1
        losses += [loss for _, loss in steps(args.warmup, last)]
        graphs = counters["stats"]["unique_graphs"]
        if device == "cuda":
            row["reserved_in_all_MiB"] = torch.cuda.max_memory_reserved() / 2**20
            torch.cuda.reset_peak_memory_stats()
        timed = list(steps(args.steps, last))
        if device == "cuda":
            row["allocated_MiB"] = torch.cuda.max_memory_allocated() / 2**20
            row["reserved_MiB"] = torch.cuda.max_memory_reserved() / 2**20
        row["step_ms"] = 1000 * median(seconds for seconds, _ in timed)
        row["steps_ms"] = [1000 * seconds for seconds, _ in timed]
        losses += [loss for _, loss in timed]
        row["losses"] = what_is_finite(losses, trainer.network)
        row["terms"] = losses[-1]
        row["scale"] = trainer.grad_scaler.get_scale()  # 65536 at first, halved where a step was skipped
        if args.compile:
            row |= what_was_compiled(graphs)
        kind = loader_kind(trainer)
        if kind not in rates:
            rates[kind] = loader_rate(trainer.dataloader_train, seconds=1 if args.dry_run else 4)
        row["batches_per_s"] = rates[kind]
        row["loading_share"] = 1 / rates[kind] / (row["step_ms"] / 1000)


@contextmanager
def ready_trainer(trainer_class: type, plans: dict, args: argparse.Namespace, device: str) -> Iterator[Any]:
    """A trainer that is ready for its first step. Its loaders are closed at the end."""
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
        yield trainer


def what_is_finite(losses: Sequence[dict[str, float]], network: torch.nn.Module) -> str:
    """Whether the terms of all steps and the weights are finite. If not, which are not."""
    bad = sorted({name for terms in losses for name, value in terms.items() if not abs(value) < float("inf")})
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        bad.append("weights")
    return f"NOT FINITE: {' '.join(bad)}" if bad else "finite"


def what_was_compiled(before: int) -> dict:
    """What torch.compile did. `before` is the number of graphs that it had made before the timed steps."""
    reasons = [reason[:300] for kind in ("graph_break", "unimplemented") for reason in counters[kind]]
    return {
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompiles": recompiles(counters, before),
        "graphs": counters["stats"]["unique_graphs"],
        "graph_break_reasons": reasons,
    }


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
