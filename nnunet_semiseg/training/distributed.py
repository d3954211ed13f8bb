"""One training in several processes (ranks): they average gradients, exchange values, and wait for each other.

Each rank has a part of every batch. All ranks have the same weights, because all take the same step. nnU-Net uses
torch's `DistributedDataParallel` for this. That class expects one network and one backward pass. Here there are often
several of both. So all gradients are averaged at once, after the last backward pass.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from nnunet_semiseg.errors import UserError

PATIENCE = timedelta(days=7)
"""How long a rank waits for other ranks that are busy with whole cases. The death of a rank is noticed at once."""


class Ranks:
    """The processes of this training. If there is only one, nothing is exchanged, and `gather` returns a list of one.

    All ranks must call the methods that exchange data, in the same order.

    Attributes:
        number, of: the number of this process, from 0, and how many processes there are.
    """

    def __init__(self):
        self.number, self.of = 0, 1
        if several_processes():
            self.number, self.of = distributed.get_rank(), distributed.get_world_size()

    # ------------------------------------------------------------------------------------------------- what each has

    def part(self, batch_size: int | None) -> int | None:
        """The number of samples of a batch that this rank gets. None stays None."""
        return None if batch_size is None else batch_size // self.of

    def check_even(self, what: str, batch_size: int | None) -> None:
        """Raise UserError if a batch cannot be divided evenly.

        The mean over ranks would then not be the mean over samples.
        """
        if batch_size is not None and batch_size % self.of:
            fits = " or ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
            raise UserError(
                f"{what}={batch_size}: cannot be divided evenly by {self.of} processes: use {fits} processes"
            )

    def seed(self, seed: int | None) -> int | None:
        """The seed of this rank. The first rank has the seed of the training, which may be None.

        The seed of any other rank is made from that seed and the number of the rank. If the training has no seed, the
        seed of each other rank is drawn at random.
        """
        if not self.number:
            return seed
        entropy = None if seed is None else (seed, self.number)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank: its own GPU, or the CPU.

        Ranks on a CPU share its cores, so this also sets how many of them torch uses in this process.
        """
        if self.of > 1 and device.type == "cuda":
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.number)))
        if self.of > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", self.of))))
        return device

    # ------------------------------------------------------------------------------------------- what they exchange

    def mean_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each parameter's gradient by its mean over all ranks, in one exchange.

        If no rank has a gradient for a parameter, it gets none; otherwise the optimizer would apply weight decay to it.
        If only some ranks have one, the gradient of the others counts as 0.
        """
        if self.of == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        distributed.all_reduce(
            has, distributed.ReduceOp.MAX, group=self._group(has)
        )  # on the CPU, so that no GPU is waited for
        trained = [p for p, taken in zip(parameters, has.tolist(), strict=True) if taken]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        distributed.all_reduce(flat)
        flat /= self.of
        for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over all ranks."""
        return self.sum(x) / self.of

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.of == 1:
            return x
        total = x.detach().clone()
        distributed.all_reduce(total, group=self._group(total))
        return total

    def gather(self, thing: Any) -> list[Any]:
        """A list of the objects from all ranks. They must be picklable."""
        if self.of == 1:
            return [thing]
        things: list[Any] = [None] * self.of
        distributed.all_gather_object(things, thing, group=cpu_group())
        return things

    def copy_first(self, *modules: nn.Module) -> None:
        """Copy the weights and buffers of the first rank to all ranks, because each rank has random initial ones."""
        if self.of == 1:
            return
        for module in modules:
            for x in (*module.parameters(), *module.buffers()):
                first = x.detach().clone()
                distributed.broadcast(first, 0, group=self._group(first))
                x.detach().copy_(first)

    def wait(self) -> None:
        """Wait until all ranks have come to this call."""
        if self.of > 1:
            distributed.barrier(group=cpu_group())

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Let the first rank run the `with` block, then the others. The first makes a file, and the others read it."""
        if self.number:
            self.wait()
        yield
        if not self.number:
            self.wait()

    def _group(self, x: Tensor) -> Any:
        """The group of processes through which this tensor can be sent. NCCL cannot send tensors on a CPU."""
        return cpu_group() if x.device.type == "cpu" else None


def several_processes() -> bool:
    """Whether this process has joined other processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def cpu_group() -> Any:
    """A group of all ranks for tensors on the CPU. The first call makes it, and all ranks must take part in that."""
    return _cpu_group(distributed.group.WORLD)


@lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def told(trainer: Any, several: bool) -> Iterator[None]:
    """Let a method of nnU-Net run as if there were several processes, or only one.

    With several processes, some methods of nnU-Net expect the network in torch's wrapper. Our network is not in a
    wrapper.
    """
    before, trainer.is_ddp = trainer.is_ddp, several
    try:
        yield
    finally:
        trainer.is_ddp = before


# ------------------------------------------------------------------------------------------------------ the processes


def is_first() -> bool:
    """Whether this process is the one that prints and writes for all.

    It can be called before the processes have joined.
    """
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether torchrun started this process and others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def join(device: str) -> None:
    """Join the other processes, if torchrun started any. A second call does nothing."""
    if not is_one_of_several() or distributed.is_initialized():
        return
    _end_with_parent()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)


def wait() -> None:
    """Wait until all processes have come to this call."""
    Ranks().wait()


def part() -> None:
    """Leave the group of processes. It must be called when all have finished their work."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def launch(number: int, words: Iterable[str]) -> None:
    """Run `nnunet_semiseg WORDS` in this number of processes, by torchrun. Their output is shown.

    Raises:
        UserError: a process was killed.
        SystemExit: a process failed and has printed the reason; or this process was told to end.
        KeyboardInterrupt: Ctrl-C.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it prints long reports of failures
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would do so with a warning
    try:
        main(["--standalone", "--max_restarts=0", f"--nproc_per_node={number}", "-m", "nnunet_semiseg.cli", *words])
    except SignalException as told_to_end:  # torchrun has ended all processes
        if told_to_end.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + told_to_end.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        with suppress(ProcessLookupError, PermissionError):  # torchrun does not end the children of a killed process
            os.killpg(failure.pid, signal.SIGKILL)
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        raise UserError(
            f"process {rank} of {number} was killed ({signal.Signals(-failure.exitcode).name}), often because memory"
            " ran out; the others were ended: continue with --c"
        ) from None


def _end_with_parent() -> None:
    """End this rank, with its loader processes, when torchrun is killed. Otherwise it would continue to train."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
