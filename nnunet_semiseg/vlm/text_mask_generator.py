"""Masks from texts: where in an image a pre-trained AMVLM finds what a text says."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.vlm.losses import info_nce, one_way
from nnunet_semiseg.vlm.model import AMVLM, to_tower
from nnunet_semiseg.vlm.pamr import refine

RAW_SHARE = 0.3
"""The share of the raw mask in the final mask. The rest is the mask after PAMR (`refine`)."""
AREA = 0.4
"""The prior of TCL (see `contrast_between_images`) for the share of an image that its own text is about."""
PRIORS = 0.1
"""The weight of the priors for the area and for the variation of masks."""
LARGEST_SCALE = 100.0
"""The largest factor of similarities, as in CLIP."""


class UpBlock(nn.Module):
    """Double the size of features (B, d, h, w): by interpolation, plus a gated convolution.

    The convolution is 0 at first, so that random weights do not blur the first masks.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.convolve, self.gate = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.convolve.weight)
        nn.init.zeros_(self.convolve.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        return x + self.gate(x).sigmoid() * F.leaky_relu(self.convolve(x), 0.01)


class TextMaskGenerator(nn.Module):
    """Makes text masks: upsamples the patch features of a frozen AMVLM by 4, and compares them with texts.

    The mask is 0.3 raw + 0.7 PAMR(raw), where raw is the result of `raw_masks`: probabilities in 0 to 1. Only the
    up-blocks and the temperature of their loss are trained and saved in a checkpoint.

    Args:
        relative: see `raw_masks`.
        temperature: the first temperature of the loss.
    """

    def __init__(self, vlm: AMVLM, relative: bool = False, temperature: float = 0.07):
        super().__init__()
        self._vlm = (vlm,)  # in a tuple, because nn.Module would register it otherwise
        self.grid, self.relative = vlm.grid, relative
        dim = vlm.heads["text_cls"][-1].num_features
        self.up = nn.Sequential(UpBlock(dim), UpBlock(dim))
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    @property
    def scale(self) -> Tensor:
        """The factor of similarities, 1 / temperature, (1,)."""
        return self.log_scale.exp().clamp_max(LARGEST_SCALE)

    @property
    def tower(self) -> AMVLM:
        return self._vlm[0]

    def _apply(self, function, *args, **kwargs):
        self.tower._apply(function, *args, **kwargs)
        return super()._apply(function, *args, **kwargs)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """The features (N, d) of N texts, normalised."""
        device = next(self.parameters()).device
        batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        return torch.cat([self.tower.encode_text(self.tower.tokenize(b).to(device)).cls for b in batches])

    def features(self, images: Tensor) -> Tensor:
        """The features (B, d, 4 h, 4 w) of images (B, C, H, W) that nnU-Net has normalised.

        h and w are rows and columns of the patches of the tower. The features of a place have length 1.
        """
        tower = self.tower
        with torch.no_grad():
            taken = to_tower(images, tower.visual.preprocess_cfg, tower.image_size)
            patches = tower.encode_image(taken).tokens.transpose(1, 2).unflatten(2, self.grid)
        with torch.autocast(patches.device.type, enabled=False):  # the cosines differ too little for 16 bits
            return F.normalize(self.up(patches.float()), dim=1)

    def loss_between_images(self, features: Tensor, texts: Tensor, own: Tensor) -> Tensor:
        """`contrast_between_images`, with two priors of TCL: one for areas, one for little variation of own masks."""
        with torch.autocast(features.device.type, enabled=False):
            raw = raw_masks(torch.einsum("bdhw,nd->bnhw", features, texts), self.relative)
            priors = area_prior(raw, own) + variation(raw[torch.arange(len(own), device=own.device), own])
            return contrast_between_images(raw, features, texts, own, self.scale) + PRIORS * priors

    def loss_between_classes(self, features: Tensor, raw: Tensor, texts: Tensor, background: Tensor) -> Tensor:
        """`contrast_between_classes`, with a prior for little variation.

        There is no prior for areas, because an image may lack a class.
        """
        with torch.autocast(features.device.type, enabled=False):
            return contrast_between_classes(raw, features, texts, background, self.scale) + PRIORS * variation(raw)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find where each image shows what its texts say.

        Args:
            images: (B, C, H, W).
            texts: (B, K, d), normalised: for each image its own texts.

        Returns:
            Raw masks (B, K, 4 h, 4 w) with a gradient to the up-blocks; masks (B, K, H, W), detached; the features.
        """
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            raw = raw_masks(torch.einsum("bdhw,bkd->bkhw", features, texts), self.relative)
        with torch.no_grad():
            grey = images.float().mean(1, keepdim=True)
            # PAMR at the size of the features, because its dilations are made for that
            refined = refine(raw, F.interpolate(grey, size=raw.shape[2:], mode="bilinear", antialias=True))
            masks = RAW_SHARE * raw + (1 - RAW_SHARE) * refined
            masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear").clamp(0, 1)
        return raw, masks, features


def raw_masks(cosine: Tensor, relative: bool) -> Tensor:
    """Turn cosines into masks: sigmoid(10 (cos - 0.25)) as in the paper, or sigmoid(z) with z-scores within an image.

    The paper's formula expects cosines around 0.25. The cosines of other towers are elsewhere, and their masks are
    nearly flat. Relative masks have low and high values for all towers, but also if the image shows nothing of the
    text.

    Args:
        cosine: (B, K, h, w), in -1 to 1.

    Returns:
        Probabilities, (B, K, h, w).
    """
    if not relative:
        return (10 * (cosine - 0.25)).sigmoid()
    spread, mean = torch.std_mean(cosine, (2, 3), keepdim=True)
    return ((cosine - mean) / spread.clamp_min(1e-6)).sigmoid()


def contrast_between_images(raw: Tensor, features: Tensor, texts: Tensor, own: Tensor, scale: Tensor | float) -> Tensor:
    """TCL's extended InfoNCE. It compares image i, pooled under the mask of text j, with text j, for all i and j.

    It has both directions: each image must find its own text among all texts, and each text its own image among all
    images. Another image with the same text is no negative there. (Cha et al., "Learning to generate text-grounded mask
    for open-world semantic segmentation from only image-text pairs", CVPR 2023.)

    Args:
        raw: masks of all texts in all images, (B, N, h, w).
        features: (B, d, h, w), normalised.
        texts: (N, d), normalised and all different.
        own: (B,), the number of each image's text.
        scale: the factor of similarities, 1 / temperature.
    """
    similarity = scale * torch.einsum("bnd,nd->bn", collect(raw, features), texts)
    of_own = similarity[:, own].T  # text of image i, image k
    same = (own[:, None] == own) & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    to_image = of_own.masked_fill(same, -torch.inf)
    return (F.cross_entropy(similarity, own) + one_way(to_image, 1.0)) / 2


def contrast_between_classes(
    raw: Tensor, features: Tensor, texts: Tensor, background: Tensor, scale: Tensor | float
) -> Tensor:
    """InfoNCE, in both directions, between the features under the mask of each class and the texts.

    The background is the place without any mask.

    Args:
        raw: masks (B, K, h, w); features: (B, d, h, w); texts: (K, d) and background: (d,), normalised.
        scale: 1 / temperature.
    """
    masks = torch.cat((1 - raw.amax(1, keepdim=True), raw), 1)
    all_texts = torch.cat((background[None], texts))
    return torch.stack([info_nce(scale * (p @ all_texts.T), 1.0) for p in collect(masks, features)]).mean()


def area_prior(raw: Tensor, own: Tensor, prior: float = AREA) -> Tensor:
    """The area loss of TCL: |mean area of masks of own texts - prior| + mean area of masks of other texts.

    Args:
        raw: masks (B, N, h, w); own: (B,), the number of each image's text.
    """
    areas = raw.mean((2, 3))
    is_own = F.one_hot(own, areas.shape[1]).bool()
    own_area = areas.masked_fill(~is_own, 0).sum() / len(own)
    others = areas.masked_fill(is_own, 0).sum() / max(areas.numel() - len(own), 1)
    return (own_area - prior).abs() + others


def variation(masks: Tensor) -> Tensor:
    """The total variation of masks (..., h, w): the mean difference between neighbours, down and across."""
    return masks.diff(dim=-2).abs().mean() + masks.diff(dim=-1).abs().mean()


def collect(masks: Tensor, features: Tensor) -> Tensor:
    """The mean feature under each mask, normalised: masks (B, K, h, w) and features (B, d, h, w) give (B, K, d)."""
    pooled = torch.einsum("bkhw,bdhw->bkd", masks, features) / masks.sum((2, 3))[..., None].clamp_min(1e-6)
    return F.normalize(pooled, dim=2)
