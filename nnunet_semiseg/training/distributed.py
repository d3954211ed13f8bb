"""One training in several processes (ranks): what they add up, agree on and wait for.

Each rank has its part of every batch, and weights that are the same everywhere, for all take the same step. nnU-Net has
torch's `DistributedDataParallel` for this. It knows of one network and one backward pass, and here are several of both:
so there is one reduction of all gradients, after the last backward pass.
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
"""how long a rank waits for others that are alive, and label or validate whole cases; one that died is noticed"""


class Ranks:
    """The processes of this training; of one process, methods give back what they are given.

    Every method that exchanges something is to be called by all ranks, in the same order.

    Attributes:
        number, of: which of how many processes this is.
    """

    def __init__(self):
        self.number, self.of = 0, 1
        if several_processes():
            self.number, self.of = distributed.get_rank(), distributed.get_world_size()

    # ------------------------------------------------------------------------------------------------- what each has

    def part(self, batch_size: int | None) -> int | None:
        """How many of a batch's samples this rank has."""
        return None if batch_size is None else batch_size // self.of

    def check_even(self, what: str, batch_size: int | None) -> None:
        """Raises UserError where a batch cannot be divided: a mean over ranks would not be one over samples."""
        if batch_size is not None and batch_size % self.of:
            fits = " or ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
            raise UserError(f"{what}={batch_size}: cannot be divided among {self.of} processes: use {fits} of them")

    def seed(self, seed: int | None) -> int | None:
        """A seed for this rank: the first one's is the training's; None stays None where there is one rank alone."""
        if not self.number:
            return seed
        entropy = None if seed is None else (seed, self.number)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this rank, of the machine that it is on; on a CPU the ranks share the cores."""
        if self.of > 1 and device.type == "cuda":
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.number)))
        if self.of > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", self.of))))
        return device

    # ------------------------------------------------------------------------------------------- what they exchange

    def mean_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give each parameter the mean of all ranks' gradients, in one reduction.

        One that has none on any rank keeps none, as the optimizer would else decay it; on some ranks, none is 0.
        """
        if self.of == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        distributed.all_reduce(
            has, distributed.ReduceOp.MAX, group=self._group(has)
        )  # on the CPU: no GPU is waited for
        trained = [p for p, taken in zip(parameters, has.tolist(), strict=True) if taken]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        distributed.all_reduce(flat)
        flat /= self.of
        for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all ranks."""
        return self.sum(x) / self.of

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.of == 1:
            return x
        total = x.detach().clone()
        distributed.all_reduce(total, group=self._group(total))
        return total

    def gather(self, thing: Any) -> list[Any]:
        """What every rank has, a picklable object each."""
        if self.of == 1:
            return [thing]
        things: list[Any] = [None] * self.of
        distributed.all_gather_object(things, thing, group=cpu_group())
        return things

    def copy_first(self, *modules: nn.Module) -> None:
        """Give the first rank's weights and buffers to all: each has drawn its own."""
        if self.of == 1:
            return
        for module in modules:
            for x in (*module.parameters(), *module.buffers()):
                first = x.detach().clone()
                distributed.broadcast(first, 0, group=self._group(first))
                x.detach().copy_(first)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.of > 1:
            distributed.barrier(group=cpu_group())

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """The first rank does it, then all others do: for what is made where it is missing, and then read."""
        if self.number:
            self.wait()
        yield
        if not self.number:
            self.wait()

    def _group(self, x: Tensor) -> Any:
        """The group that can send a tensor from where it lies: NCCL's sends nothing from a CPU."""
        return cpu_group() if x.device.type == "cpu" else None


def several_processes() -> bool:
    """Whether this process has joined others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def cpu_group() -> Any:
    """A group of all ranks for tensors on the CPU; the first call is to be made by all ranks."""
    return _cpu_group(distributed.group.WORLD)


@lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def told(trainer: Any, several: bool) -> Iterator[None]:
    """Let a method of nnU-Net's believe that there are several processes, or one.

    Of several, some of its methods look for a network in torch's wrapper, and ours is in none.
    """
    before, trainer.is_ddp = trainer.is_ddp, several
    try:
        yield
    finally:
        trainer.is_ddp = before


# ------------------------------------------------------------------------------------------------------ the processes


def is_first() -> bool:
    """Whether this is the process that speaks for all; before they have met, too."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether torchrun has started this process, and others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def join(device: str) -> None:
    """Meet the other processes, if torchrun has started any; once they have met, nothing happens."""
    if not is_one_of_several() or distributed.is_initialized():
        return
    _end_with_parent()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)


def wait() -> None:
    """Wait until all processes are here."""
    Ranks().wait()


def part() -> None:
    """Leave the other processes, all of which have ended their work."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def launch(number: int, words: Iterable[str]) -> None:
    """Run `nnunet_semiseg WORDS` in so many processes of this machine, by torchrun. What they print comes through.

    Raises:
        UserError: one of them was killed.
        SystemExit: one of them has failed, and has said why.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells failures at length
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning
    try:
        main(["--standalone", f"--nproc_per_node={number}", "-m", "nnunet_semiseg.cli", *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        with suppress(ProcessLookupError, PermissionError):  # torchrun leaves what a killed process had started
            os.killpg(failure.pid, signal.SIGKILL)
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        raise UserError(
            f"process {rank} of {number} was killed ({signal.Signals(-failure.exitcode).name}), often for want of"
            " memory, and the others were ended: go on with --c"
        ) from None


def _end_with_parent() -> None:
    """A rank whose torchrun was killed would train on, beside the next; its loaders' processes end with it."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
