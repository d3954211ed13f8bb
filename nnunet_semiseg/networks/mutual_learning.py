"""Two modalities, each with an encoder and a decoder, with attention between them at the bottleneck (Semi-CML)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

HEAD_WIDTH = 32
"""The smallest number of channels of an attention head, if the bottleneck has so many."""


class CrossModalFusion(nn.Module):
    """The bottleneck voxels of each modality attend to those of the other. A convolution then joins both.

    F_i' = F_i + Attention(query LN(F_i), key and value LN(F_j)); fused = ReLU(norm(conv_1([F_a', F_b']))). Here
    F_a and F_b are the bottlenecks of the modalities, and LN is a layer norm.

    Args:
        norm: the module that normalises the C channels after the convolution.

    Shape: two (B, C, *s) -> (B, C, *s)
    """

    def __init__(self, channels: int, conv_op: type[nn.Module], norm: nn.Module):
        super().__init__()
        heads = next(h for h in range(max(1, channels // HEAD_WIDTH), 0, -1) if channels % h == 0)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(channels, heads, batch_first=True) for _ in range(2))
        self.fuse = nn.Sequential(conv_op(2 * channels, channels, 1), norm, nn.ReLU())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        tokens = [x.flatten(2).transpose(1, 2) for x in (a, b)]
        normed = [norm(t) for norm, t in zip(self.norms, tokens, strict=True)]
        attended = []
        for i, attention in enumerate(self.attentions):
            other = normed[1 - i]
            attended.append(tokens[i] + attention(normed[i], other, other, need_weights=False)[0])
        return self.fuse(torch.cat([t.transpose(1, 2).unflatten(2, a.shape[2:]) for t in attended], 1))


class Decoders(nn.ModuleList):
    """Decoders as one module, so that nnU-Net can switch their deep supervision together."""

    @property
    def deep_supervision(self) -> bool:
        first: Any = self[0]
        return first.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        decoder: Any
        for decoder in self:
            decoder.deep_supervision = enabled


class MutualLearningUNet(nn.Module):
    """Two networks in one module. `forward(x)` is the mean of the probabilities of both decoders, as logits.

    Args:
        networks: two networks of nnU-Net, one for each modality. They may differ only in the number of input channels.
        modalities: a module that turns an image into two modalities.
        regions: whether the heads have sigmoids instead of a softmax.
        fused: whether both decoders read one common bottleneck. If False, each reads its own, and the networks are
            separate.
    """

    encoder: Any
    decoder: Any

    def __init__(self, networks: Sequence[Any], modalities: nn.Module, regions: bool, fused: bool = True):
        super().__init__()
        self.modalities, self.regions = modalities, regions
        self.encoder = nn.ModuleList(network.encoder for network in networks)
        self.decoder = Decoders(network.decoder for network in networks)
        for decoder in self.decoder:
            decoder.encoder = None  # else its weights would be counted and saved twice
        encoder, self.fusion = self.encoder[0], None
        if fused:
            channels = encoder.output_channels[-1]
            norm = encoder.norm_op(channels, **encoder.norm_op_kwargs)
            self.fusion = CrossModalFusion(channels, encoder.conv_op, norm)

    def forward(self, x: Tensor, branches: bool = False, passes: int | None = None, dropout: float = 0.0):
        """The mean of both decoders, or more outputs if asked for.

        Args:
            x: (B, C, *S).
            branches: return the outputs of both decoders instead of their mean.
            passes: the number of Monte-Carlo dropout passes, or None (see below). It needs branches and, if it is above
                0, no deep supervision. Dropout acts on the features that decoders read; the encoders run once.
            dropout: the probability of this dropout.

        Returns:
            Without branches: logits (B, heads, *S); with deep supervision a list of logits, from fine to coarse.
            With branches: a list of two of these, one for each decoder.
            With passes: three results. The first is the list of both decoders; if a sample lacks a modality, the
                decoder of this modality has the output of the mean. The second is the logits of the mean. The third is
                the logits of the mean over passes and decoders (B, heads, *S), or None for 0 passes.
        """
        images = self.modalities(x)
        features = [encoder(image) for encoder, image in zip(self.encoder, images, strict=True)]
        skips = features
        if self.fusion is not None:
            fused = self.fusion(features[0][-1], features[1][-1])
            skips = [[*f[:-1], fused] for f in features]
        outputs = self.decode(skips)
        if branches and passes is None:
            return outputs
        weights = presence(images)
        if self.decoder.deep_supervision:
            mean = [average_logits(pair, self.regions, weights) for pair in zip(*outputs, strict=True)]
        else:
            mean = average_logits(outputs, self.regions, weights)
        if not branches:
            return mean
        outputs = [
            tree_map(partial(where_present, weight), output, mean)
            for weight, output in zip(weights, outputs, strict=True)
        ]
        sampled = []
        for _ in range(passes or 0):
            logits = self.decode([[F.dropout(f, dropout) for f in s] for s in skips])
            sampled.append(average_logits(logits, self.regions, weights))
        return outputs, mean, average_logits(sampled, self.regions) if sampled else None

    def decode(self, skips: Sequence[Sequence[Tensor]]) -> list:
        return [decoder(s) for decoder, s in zip(self.decoder, skips, strict=True)]


def presence(images: Sequence[Tensor]) -> Tensor:
    """The weights (2, B) with which the two modalities of each sample are averaged. The sum of both weights is 1.

    A modality that is 0 everywhere has weight 0. If both are 0 everywhere, both have weight 0.5.
    """
    present = torch.stack([(image != 0).flatten(1).any(1) for image in images]).float()
    present = torch.where(present.sum(0) > 0, present, 1.0)
    return present / present.sum(0)


def where_present(weight: Tensor, logits: Tensor, others: Tensor) -> Tensor:
    """Take the logits of the samples whose weight is above 0, and the logits `others` of the other samples.

    Args:
        weight: (B,).
        logits, others: (B, heads, *S).
    """
    return torch.where(weight.view(-1, *[1] * (logits.ndim - 1)) > 0, logits, others.to(logits.dtype))


def average_logits(logits: Sequence[Tensor], regions: bool, weights: Tensor | None = None) -> Tensor:
    """The logits that belong to the weighted mean of probabilities, in float32.

    Args:
        logits: k tensors (B, heads, *S).
        regions: probabilities by sigmoid instead of softmax.
        weights: (k, B), with the sum 1 for each sample. None: equal weights.
    """
    stacked = torch.stack([x.float() for x in logits])
    if weights is None:
        weights = stacked.new_full(stacked.shape[:2], 1 / len(stacked))
    log_weights = weights.log().view(*weights.shape, *[1] * (stacked.ndim - 2))  # -inf for a missing modality

    def log_mean(log_p: Tensor) -> Tensor:
        return (log_p + log_weights).logsumexp(0)

    if regions:
        return log_mean(F.logsigmoid(stacked)) - log_mean(F.logsigmoid(-stacked))
    return log_mean(stacked.log_softmax(2))
