"""PAMR: fit masks to the edges in an image, without any learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DILATIONS = (1, 2, 4, 8, 12, 24)


def refine(masks: Tensor, images: Tensor, iterations: int = 10, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Pixel-adaptive mask refinement: replace each pixel by a mean of its similar neighbours, several times.

    Araslanov and Roth, "Single-stage semantic segmentation from image labels" (CVPR 2020), section 3.2. The weight of
    neighbour n is softmax_n of -mean_c |x - x_n| / (0.1 sigma). Here n runs over the 8 neighbours at each dilation, and
    sigma is the standard deviation over them.

    Args:
        masks: (B, K, H, W), probabilities.
        images: (B, C, H, W), of any scale.
        dilations: distances of neighbours, in pixels. Those that are not below height and width are left out.

    Returns:
        (B, K, H, W), within the range of the masks.
    """
    dilations = [d for d in dilations if d < min(images.shape[2:])]
    around = neighbours(images, dilations)
    spread = around.std(2, keepdim=True)
    affinity = -(images[:, :, None] - around).abs() / (1e-8 + 0.1 * spread)
    weights = affinity.mean(1, keepdim=True).softmax(2)
    for _ in range(iterations):
        masks = (neighbours(masks, dilations) * weights).sum(2)
    return masks


def neighbours(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """For each pixel, its 8 neighbours at each of D distances: (B, C, H, W) to (B, C, 8 D, H, W).

    The border is repeated.
    """
    found = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        windows = F.unfold(padded, 3, dilation=d).unflatten(1, (x.shape[1], 9)).unflatten(3, x.shape[2:])
        found += [windows[:, :, :4], windows[:, :, 5:]]
    return torch.cat(found, 2)
