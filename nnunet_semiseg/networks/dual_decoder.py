"""A shared encoder with two decoders that differ in how they upsample."""

from __future__ import annotations

from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn


class InterpolationUpsampling(nn.Sequential):
    """Linear interpolation and a 1x1 convolution, in place of a transposed convolution.

    The two commute (interpolation weights sum to one), so the convolution runs first, on the smaller grid.

    Shape: (B, C_in, *S) -> (B, C_out, *(S * stride))
    """

    def __init__(self, conv_op: type[nn.Module], in_channels: int, out_channels: int, stride, bias: bool):
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[convert_conv_op_to_dim(conv_op)]
        scale = tuple(float(s) for s in stride)
        super().__init__(
            conv_op(in_channels, out_channels, 1, bias=bias),
            nn.Upsample(scale_factor=scale, mode=mode, align_corners=False),
        )


def interpolating_decoder(network: nn.Module, n_conv_per_stage, deep_supervision: bool) -> UNetDecoder:
    """A second decoder for a PlainConvUNet or ResidualEncoderUNet: its own weights, interpolation upsampling.

    Args:
        network: holds the `encoder` whose skips both decoders read, and the first `decoder`.
        n_conv_per_stage: as in the plans (`n_conv_per_stage_decoder`).

    Returns:
        A decoder with `.encoder` None: registered again, the encoder's weights would be counted, saved and
        initialised a second time.
    """
    encoder = network.encoder
    decoder = UNetDecoder(encoder, network.decoder.num_classes, n_conv_per_stage, deep_supervision)
    decoder.encoder = None
    for i, transposed in enumerate(decoder.transpconvs):
        decoder.transpconvs[i] = InterpolationUpsampling(
            encoder.conv_op,
            transposed.in_channels,
            transposed.out_channels,
            transposed.stride,
            transposed.bias is not None,
        )
    decoder.apply(network.initialize)
    return decoder


class DualDecoderUNet(nn.Module):
    """nnU-Net's network with a second decoder, and text guidance at the bottleneck.

    `forward(x)` is the main decoder's output, as nnU-Net's validation, prediction and deep supervision expect.

    Args:
        network: the plans' network, a PlainConvUNet or ResidualEncoderUNet.
        n_conv_per_stage_decoder: as in the plans.
        deep_supervision: of the second decoder (nnU-Net switches only the first, `.decoder`, afterwards).
        guidance: text guidance, applied once, before both decoders.
    """

    def __init__(self, network: nn.Module, n_conv_per_stage_decoder, deep_supervision: bool, guidance: nn.Module):
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.second_decoder = interpolating_decoder(network, n_conv_per_stage_decoder, deep_supervision)
        self.guidance = guidance

    def forward(self, x: Tensor, text: Tensor | None = None, decoders: tuple[int, ...] = (0,)):
        """
        Args:
            x: (B, C, *S).
            text: (K, d) text features with their graph, in training; None: the stored ones.
            decoders: which decoders to run, in training.

        Returns:
            Without text, logits (B, heads, *S) of the main decoder, or with deep supervision a list of logits
            from fine to coarse. With text, a pair: a list with such an output per decoder asked for, and the
            aligned features F_v (B, d, *s) of the bottleneck before the text was added to it (so that aligning
            them shapes the encoder, instead of finding the text that was just put in).
        """
        *skips, bottleneck = self.encoder(x)
        skips.append(self.guidance(bottleneck, text))
        if text is None:
            return self.decoder(skips)
        both = (self.decoder, self.second_decoder)
        return [both[i](skips) for i in decoders], self.guidance.align(bottleneck)
