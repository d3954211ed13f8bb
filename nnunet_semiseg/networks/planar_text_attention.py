"""TMR, the text-enhanced multiplanar representation of Text-SemiSeg, and plain copying of the text for comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextCrossAttention(nn.Module):
    """A transformer block: pixels attend to each other, then to the text, then an MLP follows.

    Each step normalises first.

    In the second step the queries are the pixels; keys and values are the K text tokens. So its softmax is over K keys.

    Shape: tokens (B, N, d), text (K, d) -> (B, N, d)
    """

    def __init__(self, width: int, mlp_ratio: int = 4):
        super().__init__()
        heads = math.gcd(8, width)
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_cross = nn.LayerNorm(width)
        self.norm_text = nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width)
        )

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        x = self.norm_self(tokens)
        tokens = tokens + self.self_attention(x, x, x, need_weights=False)[0]
        text = self.norm_text(text).expand(tokens.shape[0], -1, -1)  # len() would fix the batch size in an ONNX file
        tokens = tokens + self.cross_attention(self.norm_cross(tokens), text, text, need_weights=False)[0]
        return tokens + self.mlp(tokens)


class PlaneBranch(nn.Module):
    """Project the pixels of a plane to width d, add a learned position grid, run the block, and project back.

    Shape: plane (B, C, h, w), text (K, d) -> (B, C, h, w)
    """

    def __init__(self, channels: int, width: int, grid: int = 8):
        super().__init__()
        self.project_in = nn.Linear(channels, width)
        self.positions = nn.Parameter(torch.empty(1, width, grid, grid))
        self.block = TextCrossAttention(width)
        self.project_out = nn.Linear(width, channels)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, plane: Tensor, text: Tensor) -> Tensor:
        size = plane.shape[2:]
        positions = F.interpolate(self.positions, size=size, mode="bilinear", align_corners=False)
        tokens = self.project_in(plane.flatten(2).transpose(1, 2)) + positions.flatten(2).transpose(1, 2)
        tokens = self.project_out(self.block(tokens, text))
        return tokens.transpose(1, 2).unflatten(2, size)


class MultiplanarTextAttention(nn.Module):
    """TMR: text-enhanced planes are repeated along their axes, weighted, summed and added to the features once.

    Source: Text-SemiSeg (MICCAI 2025, arXiv 2507.12382), section "text-enhanced multiplanar representation". We follow
    the paper. The published code differs: one token covers a whole plane, so that the softmax has a single key and the
    text never changes the output; and the residual is added twice. Each plane has its own block, because the axes of a
    medical volume differ in meaning and spacing. In 2d the image itself is the plane. Attention does not know the order
    of its keys, but the decoders' heads have an order. So we add a learned embedding for each class.

    Shape: features (B, C, *S) with 2 or 3 spatial axes, text (K, d) -> (B, C, *S)
    """

    def __init__(self, channels: int, text_shape: tuple[int, int], ndim: int):
        super().__init__()
        width = text_shape[1]
        self.axes = (None,) if ndim == 2 else (2, 3, 4)
        self.class_embedding = nn.Parameter(torch.randn(text_shape) / math.sqrt(width))  # of the same size as the text
        self.branches = nn.ModuleList(PlaneBranch(channels, width) for _ in self.axes)
        self.weights = nn.Parameter(torch.full((len(self.axes),), 1 / len(self.axes)))

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        enhanced, text = features, text + self.class_embedding
        for axis, branch, weight in zip(self.axes, self.branches, self.weights, strict=True):
            if axis is None:
                enhanced = enhanced + weight * branch(features, text)
            else:  # broadcasting repeats the plane along the axis over which it was averaged
                enhanced = enhanced + weight * branch(features.mean(axis), text).unsqueeze(axis)
        return enhanced


class TextCopy(nn.Module):
    """Add the same projected text to every voxel. This shows, by comparison, what the attention of TMR is worth.

    Shape: features (B, C, *S), text (K, d) -> (B, C, *S)
    """

    def __init__(self, channels: int, text_shape: tuple[int, int]):
        super().__init__()
        self.project = nn.Linear(math.prod(text_shape), channels)

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        return features + self.project(text.flatten()).view(1, -1, *(1,) * (features.ndim - 2))
