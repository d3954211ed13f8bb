"""AMVLM's pre-training model: open_clip's two towers with outputs for each token, heads, and distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.text.encoder import is_hf
from nnunet_semiseg.text.static_words import WordTokenizer, WordTower
from nnunet_semiseg.text.tokenizer import Tokenizer

HEADS = 4  # of the attention before the distributions
LOG_STD_RANGE = (-5.0, 2.0)
PLACE = 64
"""How many numbers say where a patch is."""


@dataclass(frozen=True)
class Encoding:
    """The features of one modality.

    Attributes:
        cls: the features of the whole image or text, (B, d), normalised.
        tokens: the features of words or patches, (B, L, d), normalised.
        valid: (B, L), False where there is no word: at the start and the end token, and at padding.
    """

    cls: Tensor
    tokens: Tensor
    valid: Tensor


class AMVLM(nn.Module):
    """Two towers (image and text network), a head for each of their outputs, a distribution transformer for each tower.

    Args:
        clip: a model of open_clip, with `.visual` (from open_clip or timm) and `.text`, which may be a `WordTower`.
        tokenizer: the result of `open_clip.get_tokenizer`. It is not used with a `WordTower`, which has its own.
        dim: d, the dimension of the joint space.
        hidden: the width of the heads.

    Raises:
        UserError: the image tower gives no feature map.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable, dim: int = 128, hidden: int = 2048):
        super().__init__()
        self.visual, self.text = clip.visual.eval(), clip.text  # the test image below must not change batch statistics
        self.words_alone = isinstance(self.text, WordTower)
        self.tokenize: Tokenizer | WordTokenizer
        if isinstance(self.text, WordTower):
            self.tokenize = self.text.tokenize
        else:
            self.tokenize = Tokenizer(tokenizer, may_cut=False)  # all batches have the same shape
            if is_hf(self.text):
                self.text.output_tokens = True
        self.depth, self.grid = self._choose_patches()
        self.register_buffer("places", build_sincos2d_pos_embed([*self.grid], PLACE), persistent=False)
        with torch.no_grad():
            pooled, patches = self.placed_patches(torch.zeros(1, 3, *self.image_size))
            self.look = nn.Linear(patches.shape[-1], 1)
            image = self.image_features(torch.zeros(1, 3, *self.image_size))
            text = self.text_features(self.tokenize(["a"]))
        heads = {"image_cls": image[0], "image_tokens": image[1], "text_cls": text[0], "text_tokens": text[1]}
        self.heads = nn.ModuleDict({name: projection(x.shape[-1], hidden, dim) for name, x in heads.items()})
        self.distributions = nn.ModuleDict({name: DistributionTransformer(dim) for name in ("image", "text")})

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def _choose_patches(self) -> tuple[int, tuple[int, int]]:
        """Choose the last output of the image tower (1) or the one before it (2). Also returns its rows and columns.

        For a ViT it is the last one. For a convolutional tower it is the one before the last if only that one has
        patches of at most 16 pixels.
        """
        sizes = []
        for depth in (1, 2):
            try:
                with torch.no_grad():
                    output = self.visual.forward_intermediates(torch.zeros(1, 3, *self.image_size), indices=depth)
            except (AssertionError, AttributeError, NotImplementedError):  # open_clip or timm has no such output
                break
            sizes.append(tuple(output["image_intermediates"][0].shape[2:]))
        if not sizes:
            raise UserError("the image network of this model gives no feature map: choose another model with --model")
        small = [16 * size[0] >= self.image_size[0] for size in sizes]
        return (2, sizes[1]) if small == [False, True] else (1, sizes[0])

    def image_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the whole image (B, C + C') and of its patches (B, P, C'), for images from `to_tower`.

        The features of the whole image are the pooled features of the tower, and a mean of the patches with learnt
        weights (`look`). Texts say where something is, but a convolutional tower pools by a plain mean, which loses the
        place.
        """
        pooled, patches = self.placed_patches(images)
        seen = (self.look(patches).softmax(1) * patches).sum(1)
        return torch.cat((pooled, seen), 1), patches

    def placed_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled features of the tower, (B, C), and its patches, (B, P, C').

        Of the C' features of a patch, 64 (`PLACE`) are sines and cosines of its place.
        """
        output = self.visual.forward_intermediates(images, indices=self.depth, normalize_intermediates=True)
        patches = output["image_intermediates"][0].flatten(2).transpose(1, 2)
        return output["image_features"], torch.cat((patches, self.places.expand(len(patches), -1, -1)), 2)

    def text_features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled features (B, C) and the token features (B, L, C') of the text tower, for ids from `tokenize`."""
        if self.words_alone:
            tokens = self.text.embed_tokens(ids)
            return self.text(tokens, ids), tokens
        if is_hf(self.text):
            pooled, tokens = self.text(ids)
            # open_clip leaves out the CLS token if it pools there
            return pooled, F.pad(tokens, (0, 0, ids.shape[1] - tokens.shape[1], 0))
        output = self.text.forward_intermediates(ids, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return output["text_features"], output["text_intermediates"][-1]

    def encode_image(self, images: Tensor) -> Encoding:
        cls, tokens = self.image_features(images)
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoding(self.project("image_cls", cls), self.project("image_tokens", tokens), valid)

    def encode_text(self, ids: Tensor) -> Encoding:
        cls, tokens = self.text_features(ids)
        valid = self.tokenize.words(ids)
        return Encoding(self.project("text_cls", cls), self.project("text_tokens", tokens, valid), valid)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Encoding, Encoding]:
        return self.encode_image(images), self.encode_text(ids)

    def project(self, head: str, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Project features with a head and normalise them: (B, C) to (B, d), or (B, L, C) to (B, L, d).

        Args:
            valid: (B, L), see `Encoding`. Where it is False, the output is 0. The batch norm of the head ignores this.
        """
        if valid is not None:
            features = repeat_words(features, valid)
        found = self.heads[head](features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        found = F.normalize(found.float(), dim=-1)
        return found if valid is None else found * valid[..., None]

    def distribution(self, modality: str, cls: Tensor, tokens: Tensor, valid: Tensor):
        """The distributions of CLS and of the tokens: means and standard deviations, (B, d) and (B, L, d)."""
        sequence = torch.cat((cls[:, None], tokens), 1)
        mean, std = self.distributions[modality](sequence, F.pad(valid, (1, 0), value=True))
        return (mean[:, 0], std[:, 0]), (mean[:, 1:], std[:, 1:])


def repeat_words(features: Tensor, valid: Tensor) -> Tensor:
    """Fill all places of a text without a word with copies of its words, so that a batch norm sees words only.

    Each text has the same weight there, however long it is.

    Args:
        features: (B, L, C); valid: (B, L).
    """
    places = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    words_first = torch.argsort(valid.int(), dim=1, descending=True, stable=True)
    own = words_first.gather(1, places % valid.sum(1, keepdim=True).clamp_min(1))
    return features.gather(1, torch.where(valid, places, own)[..., None].expand_as(features))


def projection(width: int, hidden: int, dim: int) -> nn.Sequential:
    """An MLP from (N, width) to (N, dim) with one hidden layer.

    It ends with a batch norm without weights, as in the public code, so that the mean of all outputs is 0 in every
    dimension. Otherwise all cosines would be similar, and would not have the values that the text masks need.
    """
    return nn.Sequential(
        nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim),
        nn.BatchNorm1d(dim, affine=False),
    )  # fmt: skip


class DistributionTransformer(nn.Module):
    """Self-attention turns each token into a distribution. One MLP gives its mean, another one log sigma.

    The two MLPs read different halves of the output of the attention. The mean is residual: at first it is close to the
    token itself.

    Shape: tokens (B, L, d), valid (B, L) -> means and standard deviations (B, L, d)
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.heads = HEADS if dim % HEADS == 0 else 1
        self.mean, self.log_std = (
            nn.Sequential(nn.Linear(dim // 2, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(2)
        )

    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(tokens)
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        mean_half, std_half = attended.transpose(1, 2).flatten(2).chunk(2, 2)
        log_std = self.log_std(std_half).float().clamp(*LOG_STD_RANGE)
        return tokens.float() + self.mean(mean_half).float(), log_std.exp()


def to_tower(images: Tensor, about: dict, size: tuple[int, int]) -> Tensor:
    """Convert images that nnU-Net has normalised (and augmented) to the input of a tower.

    Each image is z-scored, clipped at 3 standard deviations and scaled to 0 to 1. So no image becomes black, whatever
    its normalisation and augmentation were. A single channel is repeated. Two, or more than three, are averaged first.

    Args:
        images: (B, C, H, W).
        about: the `preprocess_cfg` of the tower: mean and standard deviation of RGB values.
        size: height and width of the input of the tower.

    Returns:
        (B, 3, height, width), normalised with this mean and standard deviation.
    """
    images = images.float()
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True)
    mean, std = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
    images = (((images - mean) / (std + 1e-6)).clamp(-3, 3) + 3) / 6
    images = F.interpolate(images, size=size, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    rgb_mean, rgb_std = (images.new_tensor(about[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - rgb_mean) / rgb_std
