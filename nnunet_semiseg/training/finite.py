"""Find losses and weights that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nnunet_semiseg.training.loss_term_logger import PREFIX


def what_is_not_finite(log: Mapping[str, Sequence], weights: Iterable[Tensor]) -> str | None:
    """Say what is NaN or infinite at the end of an epoch. None if everything is finite.

    Args:
        log: nnU-Net's log, with one value for each epoch: `train_losses`, and terms that begin with `loss/`.
        weights: the trained weights, at least one.
    """
    loss = log["train_losses"][-1]
    if not math.isfinite(loss):
        bad = [k.removeprefix(PREFIX) for k, v in log.items() if k.startswith(PREFIX) and not math.isfinite(v[-1])]
        return f"the loss is {loss}" + (f" (terms: {', '.join(bad)})" if bad else "")
    if not torch.stack([w.isfinite().all() for w in weights]).all():
        return "the weights are not finite"
    return None
