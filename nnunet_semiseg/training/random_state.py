"""Save and restore the state of all random generators, so that a resumed training continues exactly."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from nnunet_semiseg.training.distributed import Ranks


def get_random_state() -> dict:
    """The states of the random generators of Python, NumPy, torch and every GPU; for `set_random_state`."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    """Restore the states that `get_random_state` returned. States of GPUs that this computer lacks are ignored."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)


class RandomStates:
    """The states of the random generators of all ranks, on their way into a checkpoint and out of it.

    Attributes:
        gathered: the part of a checkpoint that holds them.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.gathered = ranks, dict[str, Any]()
        self._loaded: dict | None = None

    def gather(self) -> None:
        """Take the present states of all ranks. All ranks must call it."""
        first, *others = self.ranks.gather(get_random_state())
        self.gathered = {"random_state": first, "random_state_of_others": others}

    def load(self, gathered: dict) -> int:
        """Take the state of this rank from a checkpoint, for `restore`.

        Returns the number of processes that the checkpoint was made in. Further ranks have no state in it.
        """
        states = [gathered["random_state"], *gathered.get("random_state_of_others", [])]
        self._loaded = states[self.ranks.number] if self.ranks.number < len(states) else None
        return len(states)

    def restore(self) -> None:
        """Set the generators to what was loaded, if anything was. A second call changes nothing."""
        if self._loaded is not None:
            set_random_state(self._loaded)
            self._loaded = None


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on all GPUs, too."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
