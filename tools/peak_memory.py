"""Compute the peak memory of a training step of each trainer at full size, without a GPU and without that memory.

    python tools/peak_memory.py -d 501 --trainers SupervisedTrainer TextSemiSegTrainer

Fake tensors have shapes but no values. Everything that exists at the same time is counted: weights, gradients, the
optimizer's state, feature maps, losses and the batch, under autocast to a 16-bit type as on a GPU. The additional
memory of cuDNN, the allocator and the driver is not counted. The data set must be preprocessed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from unittest import mock

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from step_cost import LiveMemory
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from nnunet_semiseg.files import dataset_folder
from nnunet_semiseg.settings.plans import parse_assignments, update_settings


def make(name: str, args, folder: str):
    plans = update_settings(load_json(os.path.join(folder, f"{args.p}.json")), parse_assignments(args.set))
    plans["continue_training"] = False
    trainer = recursive_find_trainer_class_by_name(name)(
        plans, args.c, "all", load_json(os.path.join(folder, "dataset.json")), torch.device("cpu")
    )
    trainer.initialize()
    return trainer


def batch_of(trainer) -> dict:
    """Make a batch of zeros with the shapes of the batches of the loaders.

    Targets that a method adds are made from it.
    """
    patch, n = trainer.configuration_manager.patch_size, trainer.batch_size
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    label = trainer.label_manager
    heads = len(label.foreground_regions) if label.has_regions else 1
    grids = [[round(s * e) for s, e in zip(scale, patch, strict=True)] for scale in scales]
    image = torch.zeros(n, trainer.num_input_channels, *patch)
    batch = {"data": image, "target": [torch.zeros(n, heads, *grid, dtype=torch.int16) for grid in grids], "keys": []}
    if hasattr(trainer, "views"):
        unlabeled = {"data": image, "target": batch["target"], "keys": [""] * n}
        batch["views"] = {view: torch.zeros_like(image) for view in trainer.views}
        batch["extra"] = trainer.target_maker()(batch, unlabeled)
        batch["cases"] = trainer.unlabeled_cases[:n]
    return batch


def fake(module: nn.Module, mode: FakeTensorMode) -> int:
    """Replace the tensors of a module by fake ones. Returns the number of bytes of the real ones."""
    towers = [part.tower for part in module.modules() if hasattr(part, "tower")]  # which are no children
    parts = [*module.modules(), *(part for tower in towers for part in tower.modules())]
    for part in parts:
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad)
        part._buffers |= {name: mode.from_tensor(b) for name, b in part._buffers.items() if b is not None}
    tensors = [x for part in parts for x in (*part._parameters.values(), *part._buffers.values()) if x is not None]
    return sum(x.nbytes for x in {id(x): x for x in tensors}.values())


class Mixed(TorchDispatchMode):
    """Computes with real tensors if no input of an operation is fake: sizes and random decisions need their values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return function(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            return function(*args, **(kwargs or {}))


FLOAT32 = {
    torch.softmax, torch.log_softmax, torch.nn.functional.softmax, torch.nn.functional.log_softmax,
    torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss, torch.nn.functional.mse_loss,
    torch.nn.functional.binary_cross_entropy_with_logits, torch.nn.functional.cosine_similarity,
    torch.nn.functional.kl_div, torch.sum, torch.exp, torch.log, torch.pow, torch.norm, torch.cumsum, torch.prod,
    torch.Tensor.softmax, torch.Tensor.log_softmax, torch.Tensor.sum, torch.Tensor.exp, torch.Tensor.log,
    torch.Tensor.pow, torch.Tensor.norm, torch.Tensor.cumsum, torch.Tensor.prod,
}  # fmt: skip
"""The functions that autocast computes in float32 on CUDA, but not on a CPU."""


class AsOnCuda(TorchFunctionMode):
    """Makes autocast on a CPU compute in float32 what it computes in float32 on CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FLOAT32:
            args, kwargs = tree_map_only(torch.Tensor, raised, (args, kwargs))
        return function(*args, **(kwargs or {}))


def raised(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def peak(trainer) -> tuple[float, float]:
    """The memory of the weights, and of all tensors at the peak of a step, both in MiB.

    The trainer is set to the end of its training, when all terms of the loss are used, and runs two steps. The second
    one is measured, because then the optimizer has its state.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, batch_of(trainer))
    modules = [trainer.network, getattr(trainer, "auxiliary", None), getattr(trainer, "teacher", None)]
    weights = sum(fake(module, mode) for module in modules if module is not None)
    inputs = sum(x.nbytes for x in {id(x): x for x in tree_leaves(batch) if isinstance(x, torch.Tensor)}.values())
    trainer.optimizer, _ = trainer.configure_optimizers()
    trainer.trainable = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    trainer.network.train()
    trainer.current_epoch, trainer.step = trainer.num_epochs - 1, trainer.num_epochs * trainer.num_iterations_per_epoch
    with mode, Mixed(), LiveMemory() as memory, mock.patch.object(torch.Tensor, "numpy", lambda x: x):
        for _ in range(2):
            trainer.step -= 1
            memory.peak = memory.now
            with torch.autocast("cpu", torch.bfloat16), AsOnCuda():
                trainer.train_step(batch)
    return weights / 2**20, (weights + inputs + memory.peak) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="number or name of the dataset")
    parser.add_argument("-c", default="3d_fullres", help="nnU-Net's configuration; default: %(default)s")
    parser.add_argument("-p", default="nnUNetPlans", help="name of the plans; default: %(default)s")
    parser.add_argument("--trainers", nargs="+", required=True, help="trainers to measure")
    parser.add_argument("--set", nargs="+", action="extend", default=[], help="settings of all trainers, as KEY=VALUE")
    args = parser.parse_args()

    folder = str(dataset_folder("nnUNet_preprocessed", args.d))
    print("| trainer | patch | batch | weights, MiB | peak, MiB | ratio |\n|---|---|---|---|---|---|")
    reference = None
    with tempfile.TemporaryDirectory() as results, mock.patch.dict(os.environ, nnUNet_results=results):
        for name in args.trainers:
            trainer = make(name, args, folder)
            weights, most = peak(trainer)
            reference = reference or most
            patch = " x ".join(map(str, trainer.configuration_manager.patch_size))
            cells = name, patch, trainer.batch_size, f"{weights:.0f}", f"{most:.0f}", f"{most / reference:.2f}"
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
