"""A U-Net with two streams: one mixes the features of two samples, the other drops channels (STLU-Net)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_semiseg.networks.feature_perturbation import drop_channels

BLOCK_SIZE = 7
"""The size of the blocks in dropblock, as in its paper. For a smaller feature map the blocks are smaller."""


def similarity_weights(a: Tensor, b: Tensor) -> Tensor:
    """The weight w = clamp(cos(relu(a), relu(b)), 0, 1) of each channel of each sample. The cosine is over all places.

    Source: STLU-Net. We apply a ReLU before the cosine. After an instance norm and a LeakyReLU the cosines are often
    negative, and a weight of 0 exchanges the whole channel. A channel without positive values has w = 0.

    Args:
        a, b: features (B, C, *s).

    Returns:
        The weights (B, C, 1, ..., 1), float32, without gradient.
    """
    with torch.no_grad():
        flat = (x.float().relu().flatten(2) for x in (a, b))
        return F.cosine_similarity(*flat, dim=2).clamp(0, 1).unflatten(1, (-1, *[1] * (a.ndim - 2)))


def mix(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return w a + (1 - w) b and w b + (1 - w) a. Each result keeps the share w of its own features."""
    weight = weight.to(a.dtype)
    return torch.lerp(b, a, weight), torch.lerp(a, b, weight)


def drop_blocks(x: Tensor, p: float) -> Tensor:
    """Set random blocks of features (B, C, *s), in 2d or 3d, to 0, and scale the rest up.

    Source: DropBlock (Ghiasi et al., NeurIPS 2018). About the share p of all values becomes 0.
    """
    from torchvision.ops import drop_block2d, drop_block3d  # slow to import

    size = min(BLOCK_SIZE, *x.shape[2:])
    return (drop_block2d if x.ndim == 4 else drop_block3d)(x, p, size - 1 + size % 2)


def mixing_points(n_stages: int) -> dict[str, int]:
    """For each group of encoder stages, the number of its last stage. The groups are S, I and B.

    S is the first half of the stages before the bottleneck (rounded up), I is the other half, and B is the bottleneck.
    With five stages, as in the paper's V-Net, S and I have two stages each. With two stages there is no I.
    """
    shallow = n_stages // 2
    return {"S": shallow - 1, **({"I": n_stages - 2} if n_stages > 2 else {}), "B": n_stages - 1}


class FeatureMixingUNet(nn.Module):
    """nnU-Net's network. Its encoder can run as two streams that share all weights.

    `forward(x)` is the plain network. Its state_dict is that of the plans' network.

    Args:
        network: a PlainConvUNet or ResidualEncoderUNet.
        mixing: `similarity` (w in `mix` is `similarity_weights`), `weight` (w is given), `dropblock` or `off`.
        dropout: the probability of the channel dropout in the other stream, and of dropblock.
        own_skips: the next stage gets the mixed features, but the decoder gets the features before mixing. Only the
            bottleneck, which has no next stage, gives mixed features to the decoder.
    """

    encoder: Any
    decoder: Any

    def __init__(self, network: Any, mixing: str, dropout: float, own_skips: bool = False):
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder
        self.mixing, self.dropout, self.own_skips = mixing, dropout, own_skips

    def forward(self, x: Tensor):
        """The output of the plain network for images (B, C, *S)."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """The skips of the plain network, from fine to coarse."""
        return self.encoder(x)

    def decode(self, skips: list[Tensor]):
        """The output of the decoder for the skips of one of the streams, or of the plain network."""
        return self.decoder(skips)

    def paired(
        self,
        x: Tensor,
        points: Sequence[int],
        weight: Tensor | None = None,
        mixed_at: Sequence[int] | None = None,
        samples: int | None = None,
    ):
        """The skips of both streams, for labelled samples and their unlabelled partners.

        Args:
            x: (2 B, C, *S): the labelled samples, then their partners.
            points: the stages after which features are mixed and channels are dropped, in ascending order.
            weight: the weight w, if the features do not give it.
            mixed_at: the points at which features are mixed. None: all.
            samples: the number of samples that a stage takes at once, before the streams separate. The feature maps
                inside such a stage are not kept; the backward pass computes them again. None: all samples at once, and
                all maps are kept.

        Returns:
            For the labelled half, the skips of the mixing stream and those of the dropout stream, each from fine to
            coarse. The same for the other half. With `similarity` a list of the weights (B, C, 1, ..., 1) at each
            point, else []. Skips that both streams share are the same tensor.
        """

        def in_parts(module: nn.Module, x: Tensor) -> Tensor:
            if not samples:
                return module(x)
            return torch.cat([checkpoint(module, part, use_reentrant=False) for part in x.split(samples)])

        if (stem := getattr(self.encoder, "stem", None)) is not None:
            x = in_parts(stem, x)
        streams, halves, weights = [x], (([], []), ([], [])), []
        for i, stage in enumerate(self.encoder.stages):
            streams = [in_parts(stage, streams[0])] if len(streams) == 1 else [stage(x) for x in streams]
            own = streams[0] if self.own_skips and i < len(self.encoder.stages) - 1 else None
            if i in points:
                mixed, dropped = streams[0], streams[-1]  # at the first point these are the same tensor
                if self.mixing == "dropblock":
                    mixed = drop_blocks(mixed, self.dropout)
                elif self.mixing != "off" and (mixed_at is None or i in mixed_at):
                    labeled_features, unlabeled_features = mixed.chunk(2)
                    if self.mixing == "similarity":
                        weight = similarity_weights(labeled_features, unlabeled_features)
                        weights.append(weight)
                    w: Any = weight  # not None: it is given, or was just computed
                    mixed = torch.cat(mix(labeled_features, unlabeled_features, w))
                dropped = drop_channels(dropped, self.dropout) if self.dropout else dropped
                streams = [mixed] if mixed is dropped else [mixed, dropped]  # one stream until something differs
            parts = [x.chunk(2) for x in (streams[0] if own is None else own, streams[-1])]
            for half in range(2):
                halves[half][0].append(parts[0][half])
                halves[half][1].append(parts[-1][half])
        return *halves, weights

    def parts(self) -> list[nn.Module]:
        """The modules that the methods `paired` and `decode` run."""
        stem = getattr(self.encoder, "stem", None)
        return [*self.encoder.stages, self.decoder, *([] if stem is None else [stem])]
