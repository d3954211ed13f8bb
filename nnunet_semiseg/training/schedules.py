from math import exp

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


def gaussian_ramp(progress: float) -> float:
    """exp(-5 (1 - t)^2): from 0.0067 at t = 0 to 1 at t = 1, and 1 beyond.

    Source: Laine and Aila, Temporal Ensembling (ICLR 2017), the ramp of nearly every semi-supervised method.
    """
    return exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)


class RestartingPolyLR(PolyLRScheduler):
    """nnU-Net's schedule, anew in each of several trainings.

    Args:
        starts: the first epoch of each training, and the end of the last.
    """

    def __init__(self, optimizer, initial_lr: float, starts: list[int]):
        self.starts = starts
        super().__init__(optimizer, initial_lr, starts[1])

    def step(self, current_step=None):
        epoch = current_step or 0
        start, end = next((a, b) for a, b in zip(self.starts, self.starts[1:], strict=False) if epoch < b)
        self.max_steps = end - start
        super().step(epoch - start)
