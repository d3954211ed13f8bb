"""MC-Net+."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.losses.pseudo_labels import probabilities
from nnunet_semiseg.losses.ramps import gaussian_ramp
from nnunet_semiseg.networks.multi_decoder import MultiDecoderUNet, extra_decoder
from nnunet_semiseg.settings.base import OptionalTextSettings, require
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.text_guided import TextGuidedTrainer

UPSAMPLING = ("linear", "nearest")
"""of the second and the third decoder; the plans' own has transposed convolutions"""


@dataclass(frozen=True, kw_only=True)
class MCNetSettings(OptionalTextSettings):
    """Settings of `MCNetTrainer`; the ramp is as long as the training."""

    supervised_weight: float = 0.5
    """lambda, of the sum of the decoders' supervised losses"""
    mutual_weight: float = 1.0
    """beta, of the mutual consistency, at the end of the ramp"""
    sharpening: float = 0.1
    """the temperature T"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("supervised_weight", "mutual_weight"):
            require(self, name, minimum=0)
        require(self, "sharpening", minimum=1e-3, maximum=1)


class MCNetTrainer(TextGuidedTrainer[MCNetSettings]):
    """Wu et al., "Mutual consistency learning for semi-supervised medical image segmentation" (MC-Net+).

    Medical Image Analysis 2022, arXiv 2109.09960. A shared encoder and three decoders that differ in how they
    upsample: transposed convolutions, linear and nearest interpolation.

    - sharpening: p* = p^(1/T) / (p^(1/T) + (1 - p)^(1/T)), T = 0.1; for several classes p^(1/T) over its sum over
      them, which is the softmax of logits / T;
    - L_mc = sum over decoders i != j of MSE(p_i, p*_j), over labelled and unlabelled samples;
    - L = lambda sum_i L_seg(i) + beta L_mc, lambda = 0.5, beta a Gaussian ramp to 1 over the training.

    Where the source is silent, or its code differs: p* gets no gradient, as it stands for a label; L_seg is nnU-Net's
    (their code: Dice alone); the ramp is as long as the training (their code: 40 % of it). The decoder with transposed
    convolutions is deployed.
    """

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        convolutions = arch_kwargs["n_conv_per_stage_decoder"]
        others = [extra_decoder(network, convolutions, deep_supervision, kind) for kind in UPSAMPLING]
        return MultiDecoderUNet(network, others, recompute=settings.memory == "stock")

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        network, settings = self.bare_network, self.settings
        weight = settings.mutual_weight * gaussian_ramp(self.progress)
        streams = batch.streams("strong")
        encoded = self.each(partial(network.encode, text=text), *(images for images, _, _ in streams))
        for _, target, share in streams:
            with self.shared(next(encoded)) as (skips, aligned):
                passes = [partial(network.decode, skips, i) for i in range(1 + len(UPSAMPLING))]
                for i, output, logits in self.in_turn(passes):
                    with self.shared(output) as output:
                        if target is not None:
                            yield {f"supervised_{i + 1}": settings.supervised_weight * self.loss(output, target)}
                        own, others = self.finest(output), [x for j, x in enumerate(logits) if j != i]
                        mutual = share * weight * self.mutual_loss(own, others)
                        terms = {"mutual": mutual} | self.cog(aligned, own, text, share)
                        del own, others, mutual
                        yield terms
                del logits, terms  # else they would outlive this stream

    def mutual_loss(self, logits: Tensor, others: Sequence[Tensor]) -> Tensor:
        """sum_j MSE(p, p*_j) of a decoder's logits (B, heads, *S) with the others', which get no gradient."""
        p = probabilities(logits, self.label_manager)
        sharpened = (probabilities(x.detach().float() / self.settings.sharpening, self.label_manager) for x in others)
        return sum(F.mse_loss(p, x) for x in sharpened)  # pyright: ignore[reportReturnType]: sum's 0 is not left
