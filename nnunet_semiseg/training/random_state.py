"""Save and restore the state of all random generators, so that a resumed training continues exactly."""

from __future__ import annotations

import random

import numpy as np
import torch


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


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on all GPUs, too."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
