"""Perturbations of a network's features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_semiseg.losses.segmentation import on_grid


def drop_channels(x: Tensor, p: float) -> Tensor:
    """Set whole channels of (B, C, *s) to 0 with probability p, and divide the others by 1 - p."""
    return (F.dropout2d if x.ndim == 4 else F.dropout3d)(x, p)


def feature_noise(x: Tensor, bound: float = 0.3) -> Tensor:
    """Return x + x N. The noise N is uniform in -bound to bound and the same for all samples (F-Noise in CCT).

    Shape: x (B, C, *s) -> (B, C, *s)
    """
    noise = torch.empty_like(x[:1]).uniform_(-bound, bound)
    return x + x * noise


def feature_drop(x: Tensor, low: float = 0.6, high: float = 0.9) -> Tensor:
    """Set x (B, C, *s) to 0 where its attention is above a random threshold between low and high (F-Drop in CCT).

    The attention is the mean over channels, scaled to 0 to 1 for each sample. So the most active places are dropped.
    """
    attention = x.detach().mean(1, keepdim=True)
    axes = tuple(range(1, x.ndim))
    least, most = attention.amin(axes, keepdim=True), attention.amax(axes, keepdim=True)
    attention = (attention - least) / (most - least).clamp_min(1e-6)
    threshold = torch.empty((), device=x.device).uniform_(low, high)
    return x * (attention < threshold)


def mask_object(x: Tensor, foreground: Tensor) -> Tensor:
    """Set x to 0 in the foreground (Obj-Msk in CCT).

    Args:
        x: (B, C, *s).
        foreground: (B, 1, *S), bool, on the grid of the image.
    """
    return x * ~on_grid(foreground, x)


def mask_context(x: Tensor, foreground: Tensor) -> Tensor:
    """Set x to 0 outside the foreground (Con-Msk in CCT). For the arguments see `mask_object`."""
    return x * on_grid(foreground, x)


def guided_cutout(x: Tensor, foreground: Tensor, share: float = 0.4) -> Tensor:
    """Set x to 0 in a random box inside the bounding box of the foreground (G-Cutout in CCT).

    The sides of the box are a given share of the sides of the bounding box. Without foreground nothing is set to 0.

    Args:
        x, foreground: see `mask_object`.
    """
    foreground = on_grid(foreground, x)
    box = torch.ones_like(foreground)
    for axis in range(2, x.ndim):
        others = tuple(a for a in range(1, x.ndim) if a != axis)
        line = foreground.any(others[0], keepdim=True)
        for other in others[1:]:
            line = line.any(other, keepdim=True)
        # the centres of voxels; with corners the first voxel of an object would never be inside the box
        places = torch.arange(x.shape[axis], device=x.device).view(-1, *[1] * (x.ndim - 1 - axis)) + 0.5
        first = torch.where(line, places, x.shape[axis]).amin(axis, keepdim=True) - 0.5
        length = torch.where(line, places, -1).amax(axis, keepdim=True) + 0.5 - first
        start = first + torch.rand(first.shape, device=x.device) * (1 - share) * length
        box = box & (places >= start) & (places < start + share * length)
    return x * ~box
