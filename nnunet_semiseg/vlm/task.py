"""AMVLM's pre-training: its settings, what a step computes, and how well images and texts find each other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.settings.base import require
from nnunet_semiseg.vlm import losses
from nnunet_semiseg.vlm.model import AMVLM

RECALLS = (1, 5)


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """Of `pretrain_vlm`; the weights are those of L = L_itc + 0.5 L_CSS + 0.1 L_local + 0.1 L_ICL."""

    num_epochs: int = 30
    batch_size: int = 32
    """of a process: what is contrasted with each other, by L_itc and between distributions over all processes"""
    accumulation: int = 1
    """batches a step"""
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    """share of the training over which the learning rate rises; then it falls (torch's OneCycleLR)"""
    temperature: float = 0.07
    momentum: float = 0.995
    dim: int = 128
    hidden: int = 2048
    itc_weight: float = 1.0
    css_weight: float = 0.5
    local_weight: float = 0.1
    icl_weight: float = 0.1
    mask_weight: float = 1.0
    """of what the labels say: where in a labelled image its text is; 0: labels are not looked at"""
    fold: int | None = None
    """look at the labels of this fold's training cases alone; None: of all, for trainings with fold all"""
    num_labeled: int | None = None
    """and only at the first so many of these, as with the trainers' setting of this name"""
    text_model: str | None = None
    """`wordllama`: its trained and frozen embeddings of words in place of the model's text half"""
    held_out: float = 0.1
    """share of the cases that retrieval is measured on"""
    crop: float = 0.9
    """least share of height and width that the random crop of a training image keeps; 1: no crop"""
    slice_axis: int = 0
    """of 3d volumes, after nnU-Net's transposition"""
    missing_texts: Literal["error", "skip"] = "error"
    cache_dir: str | None = None
    num_workers: int = 4
    seed: int = 0

    def __post_init__(self):
        for name in ("num_epochs", "accumulation", "hidden"):
            require(self, name, minimum=1)
        for name in ("batch_size", "dim"):
            require(self, name, minimum=2)
        if self.dim % 2:
            raise UserError(f"setting dim={self.dim}: must be even: half is for means, half for spreads")
        require(self, "seed", maximum=2**32 - 1)
        if not (self.itc_weight or self.css_weight or self.local_weight or self.icl_weight):
            raise UserError("settings itc_weight, css_weight, local_weight, icl_weight: one must be above 0")
        for name in ("learning_rate", "temperature"):
            require(self, name, minimum=1e-12)
        terms = ("itc_weight", "css_weight", "local_weight", "icl_weight", "mask_weight")
        for name in (*terms, "weight_decay", "num_workers", "seed", "fold"):
            require(self, name, minimum=0)
        require(self, "num_labeled", minimum=1)
        for name in ("warmup", "momentum", "crop"):
            require(self, name, minimum=0, maximum=1)
        require(self, "held_out", minimum=0, maximum=0.9)
        require(self, "slice_axis", minimum=0, maximum=2)


class PretrainingTask(nn.Module):
    """What one step computes: the model, its momentum copy, and the weighted terms of the loss.

    The momentum copy gives the keys of L_itc; all other terms are of the online model, which every gradient reaches.
    How the parts of a term are added is the public code's: L_local is the sum of both directions, L_ICL the mean of
    what is between the distributions and what is within a modality.
    """

    def __init__(self, model: AMVLM, settings: PretrainingSettings):
        super().__init__()
        self.model, self.settings = model, settings
        self.momentum = deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PretrainingTask:
        super().train(mode)
        self.momentum.eval()
        self.momentum.heads.train(mode)  # keys are centred by their own batch, as what they are compared with is
        return self

    def forward(self, images: Tensor, ids: Tensor, areas: Tensor | None = None) -> dict[str, Tensor]:
        """The terms by name.

        Args:
            images, ids: as `Pairs` has them.
            areas: the labelled share of each patch (B, rows, columns); None, where no label is seen.
        """
        s, t = self.settings, self.settings.temperature
        image, text = self.model(images, ids)
        with torch.no_grad():
            image_key, text_key = self.momentum(images, ids)
        image_cls, text_cls = gather(image.cls), gather(text.cls)
        terms = {}
        if s.itc_weight:
            to_text, to_image = image_cls @ gather(text_key.cls).T, text_cls @ gather(image_key.cls).T
            terms["itc"] = s.itc_weight * (losses.one_way(to_text, t) + losses.one_way(to_image, t)) / 2
        if s.local_weight:
            local = losses.local_contrast(image.tokens, image.valid, text.cls, t)
            local = local + losses.local_contrast(text.tokens, text.valid, image.cls, t)
            terms["local"] = s.local_weight * local
        if s.css_weight or s.icl_weight:
            image_of, text_of = (
                self.model.distribution(name, encoding.cls, encoding.tokens, encoding.valid)
                for name, encoding in (("image", image), ("text", text))
            )
        if s.css_weight:
            css = self.supervision("image", image, text, image_of[1])
            css = css + self.supervision("text", text, image, text_of[1])
            terms["css"] = s.css_weight * css / 2
        if s.icl_weight:
            icl = losses.distribution_contrast(*(tuple(map(gather, of[0])) for of in (image_of, text_of)), t)
            for encoding, of in ((image, image_of), (text, text_of)):
                icl = icl + losses.intra_modal_contrast(encoding.cls, losses.sample_token(of[1]), encoding.valid, t) / 2
            terms["icl"] = s.icl_weight * icl / 2
        if areas is not None and s.mask_weight:
            terms["mask"] = s.mask_weight * losses.mask_supervision(image.tokens, text.cls, areas.flatten(1))
        return terms

    def supervision(self, name: str, own, other, distribution) -> Tensor:
        """L_CSS of one modality's tokens and what they find in the other."""
        t = self.settings.temperature
        found = losses.counterparts(own.tokens, other.tokens, other.valid, t)
        found_of = self.model.distribution(name, other.cls, found, own.valid)[1]
        attention = torch.einsum("bld,bd->bl", own.tokens, own.cls) / t
        attention = attention.masked_fill(~own.valid, -torch.inf).softmax(1)
        weights = losses.token_weights(attention, own.valid)
        return losses.similarity_supervision(own.tokens, found, distribution, found_of, weights, own.valid, t)

    @torch.no_grad()
    def update_momentum(self) -> None:
        average = get_ema_multi_avg_fn(self.settings.momentum)
        average(list(self.momentum.parameters()), list(self.model.parameters()), None)
        for own, online in zip(self.momentum.visual.buffers(), self.model.visual.buffers(), strict=True):
            own.copy_(online)  # of batch norms, which it has in eval mode


def gather(x: Tensor) -> Tensor:
    """Of all processes, with gradients."""
    if not distributed.is_initialized():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


@torch.no_grad()
def retrieval(image: Tensor, text: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Share of queries whose partner is among the first k, image to text and text to image.

    Args:
        image, text: CLS (N, d), normalised, of N pairs.
        texts: a pair with the same text as the query's is as right as its own, and no rival.
    """
    similarity = image @ text.T
    number = torch.from_numpy(np.unique(texts, return_inverse=True)[1]).to(image.device)
    same = number[:, None] == number
    result = {}
    for name, s in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        rivals = ((s > best) & ~same).sum(1)
        result |= {f"{name}_recall@{k}": float((rivals < k).float().mean()) for k in RECALLS}
    return result
