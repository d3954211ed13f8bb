"""Measure what a training step of each trainer costs, as a ratio to the first trainer on the same plans.

    python tools/step_cost.py -d 501 -c 3d_fullres --trainers SupervisedTrainer TextSemiSegTrainer
        [-device cuda] [-n 10] [--set KEY=VALUE ...]

The trainers take turns, so that a change in the machine's speed affects all of them equally. Medians are printed. A
trainer is timed at the beginning and at the end of its training, because methods switch terms on later. Loading is
the time that one process needs to make a batch. Forward includes the losses; update includes clipping, the optimiser
and the EMA. Peak memory is that of all tensors in a step, with weights and optimiser. On a GPU, CUDA's allocator
measures it, with the weights and optimisers of all trainers that are compared. On the CPU, a separate step counts the
tensors that every operation makes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from statistics import median
from time import perf_counter
from unittest import mock
from weakref import WeakSet, finalize

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_semiseg.discovery import find_trainer
from nnunet_semiseg.files import dataset_folder
from nnunet_semiseg.settings.plans import parse_assignments, update_settings


def make(trainer_class: type, plans: dict, args, folder: str):
    """Make a trainer that is ready for its first step."""
    plans = {**plans, "continue_training": False}
    dataset_json = load_json(os.path.join(folder, "dataset.json"))
    fold = int(args.f) if args.f.isdigit() else args.f
    trainer = trainer_class(plans, args.c, fold, dataset_json, torch.device(args.device))
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def now(device: str) -> float:
    """The time in seconds, after the GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def timed_step(trainer, device: str) -> dict[str, float]:
    """Run a step. Returns the seconds for load, forward, backward and update, and the peak memory in MiB (GPU only).

    A step has several backward passes. The time between two of them counts as forward, and the time after the last one
    as update.
    """
    backward, spent, ends = torch.autograd.backward, [], []

    def timed_backward(*args, **kwargs):
        start = now(device)
        backward(*args, **kwargs)
        ends.append(now(device))
        spent.append(ends[-1] - start)

    start = now(device)
    batch = next(trainer.dataloader_train)
    loaded = now(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Tensor.backward calls this function, too
    with mock.patch.object(torch.autograd, "backward", timed_backward):
        trainer.train_step(batch)
    end = now(device)
    seconds = {
        "load": loaded - start,
        "forward": ends[-1] - loaded - sum(spent),
        "backward": sum(spent),
        "update": end - ends[-1],
    }
    return {**seconds, "MiB": torch.cuda.max_memory_allocated() / 2**20} if device == "cuda" else seconds


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that still exist: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, nbytes: int) -> None:
        self.now -= nbytes


def peak_on_cpu(trainer) -> float:
    """The peak memory of a step in MiB, with the weights and the optimiser's state."""
    batch = next(trainer.dataloader_train)
    modules = [trainer.network, getattr(trainer, "auxiliary", None), getattr(trainer, "teacher", None)]
    kept = [p for module in modules if module is not None for p in (*module.parameters(), *module.buffers())]
    kept += [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    with LiveMemory() as memory:
        trainer.train_step(batch)
    return (memory.peak + sum(x.nbytes for x in kept)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="number or name of the dataset")
    parser.add_argument("-c", default="3d_fullres", help="nnU-Net's configuration; default: %(default)s")
    parser.add_argument("-p", default="nnUNetPlans", help="name of the plans; default: %(default)s")
    parser.add_argument("-f", default="all", help="number of the fold, or all; default: %(default)s")
    parser.add_argument(
        "-device", default="cuda", choices=["cuda", "cpu"], help="where to compute; default: %(default)s"
    )
    parser.add_argument("-n", type=int, default=10, help="number of timed steps; default: %(default)s")
    parser.add_argument(
        "-threads", type=int, default=1, help="number of torch's threads on the CPU; default: %(default)s"
    )
    parser.add_argument(
        "--trainers", nargs="+", required=True, help="trainers to measure; the first one is the reference of all ratios"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="settings of all trainers, as KEY=VALUE")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    os.environ["nnUNet_n_proc_DA"] = "0"  # loading in this process, to time it
    folder = str(dataset_folder("nnUNet_preprocessed", args.d))
    rows: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as results, mock.patch.dict(os.environ, nnUNet_results=results):
        plans = update_settings(load_json(os.path.join(folder, f"{args.p}.json")), parse_assignments(args.set))
        trainers = {name: make(find_trainer(name), plans, args, folder) for name in args.trainers}
        for i in range(args.n + 2):
            for name, trainer in trainers.items():
                total = trainer.num_epochs * trainer.num_iterations_per_epoch
                for phase, step in {"begin": 0, "end": total - 1}.items():
                    if hasattr(trainer, "progress"):
                        trainer.step = step
                    elif phase == "end":
                        continue
                    row = timed_step(trainer, args.device)
                    if i >= 2:  # the first are for warming up
                        rows.setdefault((name, phase), []).append(row)
        if args.device == "cpu":
            for (name, phase), measured in rows.items():
                trainer = trainers[name]
                if phase == "end":
                    trainer.step = trainer.num_epochs * trainer.num_iterations_per_epoch - 1
                measured[0]["MiB"] = peak_on_cpu(trainer)

    reference = None
    print("| trainer | at its | step, s | ratio | forward | backward | update | loading / step | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (name, phase), measured in rows.items():
        part = {k: median(m[k] for m in measured if k in m) for k in measured[0]}
        step = median(m["forward"] + m["backward"] + m["update"] for m in measured)
        reference = reference or step
        shares = " | ".join(f"{part[k] / step:.0%}" for k in ("forward", "backward", "update", "load"))
        print(f"| {name} | {phase} | {step:.3f} | {step / reference:.2f} | {shares} | {part['MiB']:.0f} |")


if __name__ == "__main__":
    main()
