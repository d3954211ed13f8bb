"""Keep only the largest connected component of a class in a pseudo-label."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def keep_largest_components(label: Tensor, heads: Sequence[int], regions: bool) -> Tensor:
    """Remove the smaller components of some classes or regions. Voxels are connected by faces, edges and corners.

    On CUDA it uses `largest_component`, because MONAI's transform would copy to the CPU and wait for it. On other
    devices it uses MONAI's transform, one sample after the other.

    Args:
        label: classes (B, 1, *S), or regions (B, heads or more, *S).
        heads: the numbers of the classes or regions that keep only one component.
        regions: whether the label consists of regions, with one channel for each.
    """
    if not len(heads):
        return label
    if not label.is_cuda:
        from monai.transforms.post.array import KeepLargestConnectedComponent  # takes seconds to import

        keep: Any = KeepLargestConnectedComponent(list(heads), is_onehot=regions)
        return torch.stack([keep(sample.clone()).as_tensor() for sample in label]).to(label)  # MONAI changes its input
    label = label.clone()
    for head in heads:
        own = label[:, head] if regions else label[:, 0]
        mask = own.bool() if regions else own == head
        own.masked_fill_(mask & ~largest_component(mask), 0)
    return label


def largest_component(mask: Tensor) -> Tensor:
    """The largest component of the mask of each sample, (B, *S), bool, in a fixed number of operations.

    Every voxel points to a voxel of its component, at first to itself. In each round a voxel looks at its neighbours (a
    maximum over 3 voxels along each axis). The voxel that it points to takes over the largest pointer that was found.
    Then the chains of pointers are shortened. The method is from Zhang, Azad and Hu, "FastSV: a distributed-memory
    connected component algorithm with fast convergence" (SIAM PP 2020). The number of rounds that are needed grows with
    the logarithm of the number of voxels. Here it is fixed, so that nothing waits for the GPU.
    """
    batch, shape = len(mask), mask.shape
    n = mask.numel()
    exact = torch.float32 if n < 2**24 else torch.float64  # the pooling does not take integers
    pool = F.max_pool2d if mask.ndim == 3 else F.max_pool3d
    inside = mask.flatten()
    points_to = torch.arange(1, n + 1, device=mask.device) * inside  # 0: background
    table = F.pad(points_to, (1, 0))  # at i the pointer of voxel i; 0 points to itself
    for _ in range(ceil(log2(n / batch + 1))):
        near = pool(table[1:].view(batch, 1, *shape[1:]).to(exact), 3, stride=1, padding=1).flatten().long() * inside
        table = table.scatter_reduce(0, table[1:], near, "amax")
        table[1:] = torch.maximum(table[1:], near)
        table = table[table[table]]
    points_to = table[1:]
    size = torch.zeros_like(table).scatter_add_(0, points_to, inside.to(table.dtype))
    own = (size[points_to] * inside).view(batch, -1)
    root = points_to.view(batch, -1).gather(1, own.argmax(1, keepdim=True))
    return (points_to.view(batch, -1) == root).view(shape) & mask
