"""Learning rate schedules."""

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class RestartingPolyLR(PolyLRScheduler):
    """nnU-Net's learning rate schedule, which starts again for each of several trainings.

    Args:
        starts: the first epoch of each training, and then the end of the last one.
    """

    def __init__(self, optimizer, initial_lr: float, starts: list[int]):
        self.starts = starts
        super().__init__(optimizer, initial_lr, starts[1])

    def step(self, current_step=None):
        epoch = current_step or 0
        start, end = next((a, b) for a, b in zip(self.starts, self.starts[1:], strict=False) if epoch < b)
        self.max_steps = end - start
        super().step(epoch - start)
