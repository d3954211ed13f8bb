"""Slices of volumes as 2d images, for networks that read 2d images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def draw_slices(images: Tensor, number: int) -> tuple[Callable, Callable, list[int]]:
    """Draw slices of samples (B, C, *S) along the first axis of S, the same ones of all. A 2d image is one slice.

    Args:
        number: how many slices are drawn, all of them if there are fewer.

    Returns:
        A function that takes these slices from a tensor, as 2d images; a function that puts 2d images back into a
        copy of a tensor; and for each 2d image the number of its sample.
    """
    if images.ndim == 4:
        return lambda x: x, lambda x, slices: slices, list(range(len(images)))
    drawn = torch.randperm(images.shape[2])[:number]

    def put_back(x: Tensor, slices: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, drawn] = slices.unflatten(0, (len(x), -1)).transpose(1, 2)
        return x

    samples = [i for i in range(len(images)) for _ in drawn]
    return lambda x: x[:, :, drawn].transpose(1, 2).flatten(0, 1), put_back, samples
