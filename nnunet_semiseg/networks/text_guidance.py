"""The parts that a segmentation network needs so that class prompts can guide it."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.networks.planar_text_attention import MultiplanarTextAttention, TextCopy


class TextGuidance(nn.Module):
    """The module by which text changes the bottleneck, and the projection that `category_alignment_loss` trains.

    `features` (K, d) is a buffer, so that a trained model predicts without a text encoder.

    Args:
        encoder: the plans' encoder. Its last feature map, with C channels, is the bottleneck.
        text_shape: (K, d): a text feature for each class, including the background.
        tmr: the setting of this name. `multiplanar`: `MultiplanarTextAttention`; `copy`: `TextCopy`; `off`: no change.
    """

    def __init__(self, encoder: Any, text_shape: tuple[int, int], tmr: str):
        super().__init__()
        channels, ndim = encoder.output_channels[-1], convert_conv_op_to_dim(encoder.conv_op)
        self.register_buffer("features", torch.zeros(text_shape))
        self.project = encoder.conv_op(channels, text_shape[1], 1)
        if tmr == "multiplanar":
            self.interaction = MultiplanarTextAttention(channels, text_shape, ndim)
        else:
            self.interaction = TextCopy(channels, text_shape) if tmr == "copy" else None

    def forward(self, bottleneck: Tensor, text: Tensor | None = None) -> Tensor:
        """The bottleneck (B, C, *s), changed by the text (K, d). By default the stored text features are used."""
        if self.interaction is None:
            return bottleneck
        return self.interaction(bottleneck, self.features if text is None else text)

    def align(self, bottleneck: Tensor) -> Tensor:
        """F_v: the bottleneck (B, C, *s), projected to (B, d, *s) and normalised to length 1 over d, in float32."""
        return F.normalize(self.project(bottleneck).float(), dim=1)
