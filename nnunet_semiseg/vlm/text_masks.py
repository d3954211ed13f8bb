"""Masks from texts: where in an image a pre-trained AMVLM finds what a text says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json
from nnunet_semiseg.schema import check
from nnunet_semiseg.text.open_clip_models import UNTRAINED, load_clip
from nnunet_semiseg.vlm.losses import one_way
from nnunet_semiseg.vlm.model import AMVLM, to_tower
from nnunet_semiseg.vlm.pamr import refine

ABOUT, WEIGHTS, STATE = "vlm.json", "vlm.safetensors", "training_state.safetensors"
RAW_SHARE = 0.3
"""of the mask before PAMR, in the final one"""


def load_vlm(folder: str | Path) -> AMVLM:
    """A pre-trained model from the folder of `pretrain_vlm`, frozen and in eval mode; no internet is needed.

    Raises:
        UserError: no such folder, not of `pretrain_vlm`, or of one that is not finished.
    """
    folder = Path(folder)
    fix = "name the folder that nnunet_semiseg pretrain_vlm made"
    settings = read_about(folder, fix)["settings"]
    begun = (folder / STATE).is_file()
    if begun or not (folder / WEIGHTS).is_file():
        done, epochs = read_state(folder)["epoch"] if begun else 0, settings.get("num_epochs", 0)
        if done < epochs:
            raise UserError(
                f"{folder}: the pre-training is not finished, {done} of {epochs} epochs are done: run the same"
                " nnunet_semiseg pretrain_vlm command again, it goes on"
            )
    try:
        clip, tokenizer = load_clip(str(folder), UNTRAINED)
    except UserError as error:
        raise UserError(f"{folder}: its towers cannot be built: {fix} [{error}]") from None
    vlm = AMVLM(clip, tokenizer, settings["dim"], settings["hidden"])
    try:
        vlm.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({' '.join(str(error).split())[:200]}): {fix}") from None
    return vlm.requires_grad_(False).eval()


def read_state(folder: Path) -> dict:
    """What a pre-training's state says beside its tensors: `epoch`, how many are done, and more.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / STATE
    try:
        with safe_open(str(file), "pt") as opened:
            return json.loads(opened.metadata()["state"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): remove {folder} to begin anew") from None


def read_about(folder: Path, fix: str) -> dict:
    """The checked `vlm.json` of a pre-training. Raises UserError where it is missing, damaged or another file."""
    about = read_json(folder / ABOUT, fix)
    check(about, {"settings": dict}, folder / ABOUT, fix)
    sizes = {"dim": int, "hidden": int, "slice_axis?": int, "num_epochs?": int}
    check(about["settings"], sizes, folder / ABOUT, fix, '"settings" ')
    if min(about["settings"]["dim"], about["settings"]["hidden"]) < 1:
        raise UserError(f"{folder / ABOUT}: dim and hidden must be 1 or more: {fix}")
    return about


class UpBlock(nn.Module):
    """(B, d, h, w) to twice the size: what is interpolated, and a gated convolution of it on top.

    The convolution begins at 0, so that the first masks are the towers' own, not blurred by random weights.
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
    """Patch features of a frozen AMVLM, lifted to 4 times their grid, and their cosine with texts.

    The mask is 0.3 raw + 0.7 PAMR(raw), with `raw_masks`: probabilities in 0 to 1, with no further sigmoid. The
    up-blocks are all that is trained and all that a checkpoint carries.

    Args:
        relative: see `raw_masks`.
    """

    def __init__(self, vlm: AMVLM, relative: bool = False):
        super().__init__()
        self._vlm = (vlm,)  # in a tuple, or nn.Module would register it
        self.grid, self.relative = vlm.grid, relative
        dim = vlm.heads["text_cls"][-1].out_features
        self.up = nn.Sequential(UpBlock(dim), UpBlock(dim))

    @property
    def tower(self) -> AMVLM:
        return self._vlm[0]

    def _apply(self, function, *args, **kwargs):
        self.tower._apply(function, *args, **kwargs)
        return super()._apply(function, *args, **kwargs)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """(N, d), normalised."""
        device = next(self.parameters()).device
        batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        return torch.cat([self.tower.encode_text(self.tower.tokenize(b).to(device)).cls for b in batches])

    def features(self, images: Tensor) -> Tensor:
        """(B, d, 4 h, 4 w), normalised, of images (B, C, H, W) as nnU-Net has normalised them."""
        tower = self.tower
        with torch.no_grad():
            taken = to_tower(images, tower.visual.preprocess_cfg, tower.image_size)
            patches = tower.encode_image(taken).tokens.transpose(1, 2).unflatten(2, self.grid)
        return F.normalize(self.up(patches).float(), dim=1)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each image shows what each of its texts says.

        Args:
            images: (B, C, H, W).
            texts: (B, K, d), normalised: of each image its own.

        Returns:
            Raw masks (B, K, 4 h, 4 w) with a gradient to the up-blocks; masks (B, K, H, W), detached; the features.
        """
        features = self.features(images)
        cosine = torch.einsum("bdhw,bkd->bkhw", features, texts)
        raw = raw_masks(cosine, self.relative)
        with torch.no_grad():
            grey = images.float().mean(1, keepdim=True)
            # PAMR at the features' size: its dilations are meant for that
            refined = refine(raw, F.interpolate(grey, size=raw.shape[2:], mode="bilinear", antialias=True))
            masks = RAW_SHARE * raw + (1 - RAW_SHARE) * refined
            masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear").clamp(0, 1)
        return raw, masks, features


def raw_masks(cosine: Tensor, relative: bool) -> Tensor:
    """sigmoid(10 (cos - 0.25)), the paper's; or sigmoid(z), the cosine against the mean and spread of its image.

    The paper's takes cosines around 0.25 for granted. Other towers' are elsewhere, and their masks nearly flat:
    relative ones span 0 to 1 whatever the towers, and also where the text is about nothing in the image.

    Args:
        cosine: (B, K, h, w), in -1 to 1.

    Returns:
        Probabilities, (B, K, h, w).
    """
    if not relative:
        return (10 * (cosine - 0.25)).sigmoid()
    spread, mean = torch.std_mean(cosine, (2, 3), keepdim=True)
    return ((cosine - mean) / spread.clamp_min(1e-6)).sigmoid()


def contrast_between_images(raw: Tensor, features: Tensor, texts: Tensor, temperature: float) -> Tensor:
    """InfoNCE of what each image's mask collects, against its own text and the other images' texts.

    Another image with the same text is no rival.

    Args:
        raw: masks (B, 1, h, w); features: (B, d, h, w); texts: (B, 1, d), normalised.
    """
    pooled, texts = collect(raw, features)[:, 0], texts[:, 0]
    same = (texts @ texts.T > 1 - 1e-5) & ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    return one_way((pooled @ texts.T).masked_fill(same, -torch.inf), temperature)


def contrast_between_classes(
    raw: Tensor, features: Tensor, texts: Tensor, background: Tensor, temperature: float
) -> Tensor:
    """InfoNCE of what each class's mask collects, against the classes' texts; what no mask takes is background.

    Args:
        raw: masks (B, K, h, w); features: (B, d, h, w); texts: (K, d) and background: (d,), normalised.
    """
    masks = torch.cat((1 - raw.amax(1, keepdim=True), raw), 1)
    all_texts = torch.cat((background[None], texts))
    return torch.stack([one_way(p @ all_texts.T, temperature) for p in collect(masks, features)]).mean()


def collect(masks: Tensor, features: Tensor) -> Tensor:
    """The mean feature under each mask, normalised: (B, K, h, w) and (B, d, h, w) to (B, K, d)."""
    pooled = torch.einsum("bkhw,bdhw->bkd", masks, features) / masks.sum((2, 3))[..., None].clamp_min(1e-6)
    return F.normalize(pooled, dim=2)
