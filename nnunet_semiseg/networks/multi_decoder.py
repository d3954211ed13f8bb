"""nnU-Net's network with more decoders on the same encoder, perturbed features, and text at the bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class InterpolationUpsampling(nn.Sequential):
    """Interpolation and a 1x1 convolution, in place of a transposed convolution.

    The two commute (interpolation weights sum to one), so the convolution runs first, on the smaller grid.

    Args:
        conv_op: torch's convolution of the plans, such as `nn.Conv3d`.

    Shape: (B, C_in, *S) -> (B, C_out, *(S * stride))
    """

    def __init__(self, conv_op: Any, in_channels: int, out_channels: int, stride, bias: bool, mode: str):
        if mode == "linear":
            mode = LINEAR[convert_conv_op_to_dim(conv_op)]
        scale = tuple(float(s) for s in stride)
        super().__init__(conv_op(in_channels, out_channels, 1, bias=bias), nn.Upsample(scale_factor=scale, mode=mode))


def extra_decoder(
    network: Any,
    n_conv_per_stage,
    deep_supervision: bool,
    upsampling: Literal["transposed", "linear", "nearest"] = "transposed",
    finest_only: bool = False,
) -> UNetDecoder:
    """One more decoder for a PlainConvUNet or ResidualEncoderUNet, with weights of its own.

    Args:
        network: holds the `encoder` whose skips all decoders read, and the first `decoder`.
        n_conv_per_stage: as in the plans (`n_conv_per_stage_decoder`).
        deep_supervision: whether it gives several outputs; the heads are there in any case, as in nnU-Net.
        finest_only: there is no head but the finest.

    Returns:
        A decoder with `.encoder` None: registered again, the encoder's weights would be counted, saved and
        initialised a second time.
    """
    encoder = network.encoder
    decoder = UNetDecoder(encoder, network.decoder.num_classes, n_conv_per_stage, deep_supervision)
    decoder.encoder = None  # pyright: ignore[reportAttributeAccessIssue]: see above
    if finest_only:
        decoder.seg_layers = decoder.seg_layers[-1:]
    if upsampling != "transposed":
        transposed: Any
        for i, transposed in enumerate(decoder.transpconvs):
            decoder.transpconvs[i] = InterpolationUpsampling(
                encoder.conv_op,
                transposed.in_channels,
                transposed.out_channels,
                transposed.stride,
                transposed.bias is not None,
                upsampling,
            )
    decoder.apply(network.initialize)
    return decoder


class Encoded(NamedTuple):
    """What decoders read.

    Attributes:
        skips: the encoder's features from fine to coarse, (B, C_i, *s_i); the last one is guided by the text.
        aligned: F_v (B, d, *s), the projected bottleneck before the text was added to it (so that aligning it shapes
            the encoder, instead of finding the text that was just put in); None where no text was given.
    """

    skips: list[Tensor]
    aligned: Tensor | None


class MultiDecoderUNet(nn.Module):
    """nnU-Net's network, with further decoders and text, each where it is wanted, and its halves to be run apart.

    `forward(x)` is the main decoder's output, as nnU-Net's validation, prediction and deep supervision expect.

    Args:
        network: the plans' network, a PlainConvUNet or ResidualEncoderUNet.
        others: further decoders (`extra_decoder`). nnU-Net switches the deep supervision of the first alone.
        recompute: do not keep the feature maps of the encoder's first stage, the largest, while decoders run one after
            the other: the backward pass computes them again, for about 4 % more time.

    Attributes:
        guidance: text guidance, applied once, before all decoders; None: no text.
    """

    encoder: Any
    decoder: Any
    guidance: Any

    def __init__(self, network: Any, others: Sequence[UNetDecoder] = (), recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.other_decoders = nn.ModuleList(others)
        self.guidance = None

    def forward(self, x: Tensor):
        """Logits (B, heads, *S) of images (B, C, *S), or with deep supervision a list of logits from fine to coarse."""
        return self.decode(self.encode(x).skips)

    def encode(self, x: Tensor, text: Tensor | None = None) -> Encoded:
        """What the decoders read of images, the text in its last level.

        Args:
            x: (B, C, *S).
            text: (K, d) text features with their graph, in training; None: the stored ones.
        """
        *skips, bottleneck = self.features(x) if self.recompute and torch.is_grad_enabled() else self.encoder(x)
        guided = bottleneck if self.guidance is None else self.guidance(bottleneck, text)
        guidance: Any = self.guidance  # there is one, where there is text
        return Encoded([*skips, guided], None if text is None else guidance.align(bottleneck))

    def features(self, x: Tensor) -> list[Tensor]:
        """What `self.encoder(x)` gives, without the feature maps of its first stage."""
        encoder, features = self.encoder, []
        if (stem := getattr(encoder, "stem", None)) is not None:
            x = checkpoint(stem, x, use_reentrant=False)
        for i, stage in enumerate(encoder.stages):
            x = checkpoint(stage, x, use_reentrant=False) if i == 0 else stage(x)
            features.append(x)
        return features

    def decode(self, skips: list[Tensor], decoder: int = 0):
        """The output of one decoder, 0 is the main one; in the form of `forward`."""
        return (self.decoder if decoder == 0 else self.other_decoders[decoder - 1])(skips)

    def parts(self) -> list[nn.Module]:
        """What `encode` and `decode` run."""
        stem = getattr(self.encoder, "stem", None)
        stages = [*([] if stem is None else [stem]), *self.encoder.stages] if self.recompute else []
        parts = [*stages, self.encoder, self.decoder, *self.other_decoders]
        return parts if self.guidance is None else [*parts, self.guidance]
