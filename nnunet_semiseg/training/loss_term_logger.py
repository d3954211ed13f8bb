"""nnU-Net's logger, which also keeps and plots the terms of a loss."""

from __future__ import annotations

from os.path import join
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

PREFIX = "loss/"


class LossTermLogger(LocalLogger):
    """nnU-Net's logger, which also keeps loss terms.

    A key that begins with `loss/` may first appear in any epoch. The epochs before are filled with NaN.
    """

    @property
    def terms(self) -> list[str]:
        """The keys of the loss terms."""
        return [k for k in self.my_fantastic_logging if k.startswith(PREFIX)]

    def log(self, key, value, epoch: int):
        if key.startswith(PREFIX):
            self.my_fantastic_logging.setdefault(key, [float("nan")] * epoch)
        super().log(key, value, epoch)

    def plot_progress_png(self, output_folder):
        """Draw nnU-Net's `progress.png`, with one more panel for the loss terms."""
        super().plot_progress_png(output_folder)
        if not self.terms:
            return
        figure, ax = plt.subplots(figsize=(30, 18))
        for key in self.terms:
            ax.plot(self.my_fantastic_logging[key], label=key.removeprefix(PREFIX), linewidth=4)
        ax.set(xlabel="epoch", ylabel="loss term, as it enters the sum")
        ax.legend(loc=(0, 1), ncols=4)
        figure.canvas.draw()
        canvas: Any = figure.canvas  # an Agg canvas, which nnU-Net chooses
        panel = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        plt.close(figure)
        with Image.open(join(output_folder, "progress.png")) as above:
            both = Image.new("RGB", (max(above.width, panel.width), above.height + panel.height), "white")
            both.paste(above, (0, 0))
        both.paste(panel, (0, both.height - panel.height))
        both.save(join(output_folder, "progress.png"))
