"""The pre-training of AMVLM: its settings, what a step computes, and how well images and texts find each other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.settings.base import Count, Share, Weight, check_types
from nnunet_semiseg.vlm import losses
from nnunet_semiseg.vlm.model import AMVLM

RECALLS = (1, 5)


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """Settings of `pretrain_vlm`.

    By default the loss is L_itc + 0.5 L_CSS + 0.1 L_local + 0.1 L_ICL, as in AMVLM (below, each weight says
    what its loss is), plus our loss with `mask_weight`.
    """

    num_epochs: Count = 30
    """The length of the pre-training, in epochs."""
    batch_size: Annotated[int, Bounds(2)] = 32
    """The number of pairs of image and text in a batch of one process. Each pair is compared with all others."""
    accumulation: Count = 1
    """The number of batches whose gradients are added up for one step."""
    learning_rate: Annotated[float, Bounds(1e-12)] = 1e-4
    """The greatest learning rate. It first rises and then falls (OneCycleLR of torch)."""
    weight_decay: Annotated[float, Bounds(0)] = 0.05
    """The weight decay of the optimizer."""
    warmup: Share = 0.05
    """The share of the pre-training over which the learning rate rises."""
    temperature: Annotated[float, Bounds(1e-12)] = 0.07
    """The temperature of the contrastive losses: similarities are divided by it."""
    momentum: Share = 0.995
    """The decay of the moving average of the model's weights. The loss L_itc compares the features of the model with
    those of this average (the momentum model)."""
    dim: Annotated[int, Bounds(2)] = 128
    """The number of values in the joint embedding of images and texts. It must be even."""
    hidden: Count = 2048
    """The width of the hidden layers before the joint embedding of images and texts."""
    itc_weight: Weight = 1.0
    """The weight of the loss that compares whole images with whole texts (L_itc in the paper). 0 switches it off."""
    css_weight: Weight = 0.5
    """The weight of the loss that makes image regions and words similar (L_CSS in the paper). 0 switches it off."""
    local_weight: Weight = 0.1
    """The weight of the loss that compares image regions with whole texts, and words with whole images (L_local in the
    paper). 0 switches it off."""
    icl_weight: Weight = 0.1
    """The weight of the loss L_ICL in the paper, where images, texts and their parts are normal distributions. It pulls
    an image and its text together, and each part towards its whole. 0 switches it off."""
    mask_weight: Weight = 1.0
    """The weight of the loss that learns from labels where the objects in a text are. With 0 the pre-training reads no
    label."""
    mask_held_out: Annotated[float, Bounds(0, 0.9)] = 0.25
    """The share of the labelled cases whose labels the pre-training does not read. `AMVLMTrainer` measures its text
    masks on these cases."""
    fold: Annotated[int, Bounds(0)] | None = None
    """The fold whose training labels may be used. It must be the fold of the later training. By default all labels are
    used, for trainings with fold `all`."""
    num_labeled: Count | None = None
    """How many of the training cases keep their labels; by default all. Give the same value as for the later
    training."""
    text_model: str | None = None
    """`wordllama` replaces the text half of the model by frozen word embeddings, which need no download."""
    held_out: Annotated[float, Bounds(0, 0.9)] = 0.1
    """The share of the cases that are kept for a test: whether the model finds the text of an image, and the
    reverse."""
    crop: Share = 0.9
    """The smallest share of height and width that the random crop of an image keeps. With 1 there is no crop."""
    mirror: bool = True
    """Whether half of the images are flipped from left to right. The words left and right are then exchanged in their
    texts. No image is flipped if nnU-Net has transposed the axes, or if slices of volumes have no axis from left to
    right (`slice_axis=2`)."""
    slice_axis: Annotated[int, Bounds(0, 2)] = 0
    """The axis along which volumes are cut into slices, in the order of axes after the transposition by nnU-Net."""
    missing_texts: Literal["error", "skip"] = "error"
    """What happens if a case has no text. `error` refuses to train, `skip` leaves the case out."""
    cache_dir: str | None = None
    """The folder in which open_clip keeps its downloads. By default open_clip chooses it."""
    num_workers: Annotated[int, Bounds(0)] = 4
    """The number of processes that load images."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """The seed of the initial weights, of the crops and of the order of the cases."""

    def __post_init__(self):
        check_types(self)
        if self.dim % 2:
            raise UserError(
                f"setting dim={self.dim}: must be even: one half is for means, the other for standard deviations"
            )
        if not (self.itc_weight or self.css_weight or self.local_weight or self.icl_weight):
            raise UserError("settings itc_weight, css_weight, local_weight, icl_weight: one must be above 0")


class PretrainingTask(nn.Module):
    """What one step computes: the model, its momentum copy, and the weighted terms of the loss.

    The momentum copy gives the keys of L_itc. All other terms use the model itself, which gets all gradients. The parts
    of a term are combined as in the public code: L_local is the sum of both directions, and L_ICL is the mean of the
    part between the distributions and the part within a modality.
    """

    def __init__(self, model: AMVLM, settings: PretrainingSettings):
        super().__init__()
        self.model, self.settings = model, settings
        self.momentum = deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PretrainingTask:
        super().train(mode)
        self.momentum.eval()
        self.momentum.heads.train(mode)  # keys are centred by their own batch, like the features they are compared with
        return self

    def forward(self, images: Tensor, ids: Tensor, areas: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the terms of the loss, by name.

        Args:
            images, ids: as `Pairs` returns them.
            areas: the labelled share of each patch (B, rows, columns). None if no label is used.
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
        """The term L_CSS for the tokens of one modality and their counterparts in the other modality."""
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
            own.copy_(online)  # buffers of batch norms; the copy itself is in eval mode


def gather(x: Tensor) -> Tensor:
    """Collect the tensors of all processes, with gradients."""
    if not distributed.is_initialized():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


@torch.no_grad()
def retrieval(image: Tensor, text: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """How often the partner is among the first k results, when images look for texts and texts for images.

    Args:
        image, text: the CLS features (N, d) of N pairs, normalised.
        texts: the N texts. If another pair has the same text as the query, it counts as right, too.
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
