"""nnU-Net's network with more decoders on the same encoder, and with text that guides the bottleneck."""

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
    """Upsampling by interpolation and a 1x1 convolution, instead of a transposed convolution.

    The order of the two does not matter, because the weights of an interpolation have the sum 1. So the convolution
    runs first, on the smaller grid.

    Args:
        conv_op: the class of the convolution in the plans, such as `nn.Conv3d`.
        mode: `linear` or `nearest`.

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
    """Make one more decoder for a PlainConvUNet or ResidualEncoderUNet, with its own weights.

    Args:
        network: the network with the `encoder`, whose skips all decoders read, and the first `decoder`.
        n_conv_per_stage: the value of `n_conv_per_stage_decoder` in the plans.
        deep_supervision: whether the decoder returns the logits of all resolutions. If not, only the finest.
        upsampling: `transposed` is that of nnU-Net; for the others see `InterpolationUpsampling`.
        finest_only: whether the decoder has an output layer for the finest resolution only. If not, it has one for each
            resolution, as in nnU-Net, even without deep supervision.

    Returns:
        A decoder whose `.encoder` is None. If it were set, the encoder's weights would be counted, saved and
        initialised twice.
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
    """What the encoder gives to the decoders.

    Attributes:
        skips: the features of the encoder from fine to coarse, (B, C_i, *s_i). The text guides the last of them.
        aligned: F_v (B, d, *s), a projection of the bottleneck before the text is added. So the alignment trains the
            encoder, and does not just find the text that was added. None without text.
    """

    skips: list[Tensor]
    aligned: Tensor | None


class MultiDecoderUNet(nn.Module):
    """nnU-Net's network, with more decoders and with text if wanted. Encoder and decoders can run separately.

    `forward(x)` is the main decoder's output, as nnU-Net's validation, prediction and deep supervision expect.

    Args:
        network: the plans' network, a PlainConvUNet or ResidualEncoderUNet.
        others: more decoders (`extra_decoder`). nnU-Net switches the deep supervision of the first decoder only.
        recompute: do not keep the feature maps of the encoder's first stage, the largest ones, while decoders run one
            after the other. The backward pass computes them again, which takes about 4 % more time.

    Attributes:
        guidance: the text guidance. It is applied once, before all decoders. None: no text.
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
        """Logits (B, heads, *S) of images (B, C, *S); with deep supervision a list of logits from fine to coarse."""
        return self.decode(self.encode(x).skips)

    def encode(self, x: Tensor, text: Tensor | None = None) -> Encoded:
        """Make the input of the decoders, whose coarsest features are guided by the text.

        Args:
            x: (B, C, *S).
            text: the text features (K, d) with their graph, in training. None: the stored ones.
        """
        *skips, bottleneck = self.features(x) if self.recompute and torch.is_grad_enabled() else self.encoder(x)
        guided = bottleneck if self.guidance is None else self.guidance(bottleneck, text)
        guidance: Any = self.guidance  # not None, as there is text
        return Encoded([*skips, guided], None if text is None else guidance.align(bottleneck))

    def features(self, x: Tensor) -> list[Tensor]:
        """The result of `self.encoder(x)`, without keeping the feature maps of its first stage."""
        encoder, features = self.encoder, []
        if (stem := getattr(encoder, "stem", None)) is not None:
            x = checkpoint(stem, x, use_reentrant=False)
        for i, stage in enumerate(encoder.stages):
            x = checkpoint(stage, x, use_reentrant=False) if i == 0 else stage(x)
            features.append(x)
        return features

    def decode(self, skips: list[Tensor], decoder: int = 0):
        """The output of the decoder with this number, in the form of `forward`. Number 0 is the main decoder."""
        return (self.decoder if decoder == 0 else self.other_decoders[decoder - 1])(skips)

    def parts(self) -> list[nn.Module]:
        """The modules that the methods `encode` and `decode` run."""
        stem = getattr(self.encoder, "stem", None)
        stages = [*([] if stem is None else [stem]), *self.encoder.stages] if self.recompute else []
        parts = [*stages, self.encoder, self.decoder, *self.other_decoders]
        return parts if self.guidance is None else [*parts, self.guidance]
