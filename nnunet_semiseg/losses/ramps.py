"""Ramps of loss weights."""

from math import exp


def gaussian_ramp(progress: float) -> float:
    """The Gaussian ramp exp(-5 (1 - t)^2): it grows from 0.0067 at t = 0 to 1 at t = 1, and stays 1 after that.

    Source: Laine and Aila, Temporal Ensembling (ICLR 2017). Many semi-supervised methods use this ramp.
    """
    return exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)
