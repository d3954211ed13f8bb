"""The frozen text half of an open_clip model. Its input is token embeddings instead of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.text.open_clip_models import TEXT_OPTIONS, UNTRAINED, load_clip, named
from nnunet_semiseg.text.static_words import WORDLLAMA, WordTower, load_word_tower
from nnunet_semiseg.text.tokenizer import Tokenizer


class TextTower(nn.Module):
    """A frozen text transformer. The caller may change the token embeddings that go into it (CoOp).

    Weights never need a gradient, and the tower is always in eval mode. Gradients pass through it to the embeddings.
    Everything between the embeddings and the features is open_clip's own ``forward``.

    Args:
        text: the ``.text`` of an open_clip model: ``TextTransformer`` (CLIP, CoCa, SigLIP) or
            ``HFTextEncoder`` (BiomedCLIP). A model has this attribute if open_clip made it with
            ``force_custom_text=True``.
        tokenizer: the result of ``open_clip.get_tokenizer``. It becomes `tokenize`, a `Tokenizer`.
        trained: whether the weights are trained. False: they are random.
    """

    knows_order = True

    def __init__(self, text: nn.Module, tokenizer, trained: bool = True):
        super().__init__()
        self.text = text.requires_grad_(False)
        self.text.output_tokens = False
        self.trained = trained
        self._is_hf = is_hf(text)
        self.tokenize = Tokenizer(tokenizer, ignores_padding(text))
        self.eval()

    @property
    def width(self) -> int:
        """The length of a token embedding."""
        return self._embedding.embedding_dim

    def train(self, mode: bool = True) -> TextTower:
        return super().train(False)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token embeddings, without positions: (N, L) ids to (N, L, width)."""
        return self._embedding(ids.to(self._embedding.weight.device))

    def forward(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """Text features from token embeddings.

        Args:
            embeddings: (N, L, width), from :meth:`embed_tokens`; some of them may be replaced.
            ids: (N, L), from `tokenize`. They say where padding is and at which place to pool.

        Returns:
            (N, d), not normalised; equal to open_clip's ``encode_text(ids, normalize=False)`` if no embedding was
            replaced.
        """
        length, mask = ids.shape[1], {}
        if length < self.tokenize.context_length and not self._is_hf:  # open_clip does not shorten its mask itself
            mask = {"attn_mask": self.text.attn_mask[:length, :length]}
        # the result of a forward hook replaces the output of the module
        hook = self._embedding.register_forward_hook(lambda *_: embeddings)
        try:
            return torch.func.functional_call(self.text, mask, (ids,))
        finally:
            hook.remove()

    @property
    def _embedding(self) -> nn.Embedding:
        return self.text.transformer.get_input_embeddings() if self._is_hf else self.text.token_embedding


def is_hf(text: nn.Module) -> bool:
    """Whether this text half is a Hugging Face transformer (as in BiomedCLIP) and not open_clip's own."""
    return not hasattr(text, "token_embedding")


def ignores_padding(text: nn.Module) -> bool:
    """Whether padding has no effect on the features.

    It has none in a causal tower that pools at the end token, and none in the towers of Hugging Face. CoCa appends a
    class token after the padding. SigLIP uses all tokens and pools at the last place.
    """
    if is_hf(text):
        return True
    return text.attn_mask is not None and text.pool_type in ("argmax", "eos") and text.cls_emb is None


def load_text_tower(
    model: str, pretrained: str | None, cache_dir: str | None = None, options: Mapping[str, str] = TEXT_OPTIONS
) -> TextTower | WordTower:
    """Load the text half of an open_clip model without its image half, or WordLlama's embeddings.

    Args:
        model, pretrained, cache_dir, options: see `load_clip`. `model` may also be `wordllama`. Its embeddings are
            random if `pretrained` is `none`, and trained with any tag.

    Raises:
        UserError: see `load_clip` and `load_word_tower`; or a file of weights is given for WordLlama.
    """
    if model == WORDLLAMA:
        if pretrained and Path(pretrained).is_file():
            raise UserError(
                f"{named(options, 'pretrained')}{pretrained}: {WORDLLAMA} has its own weights: leave this out"
            )
        return load_word_tower(trained=pretrained != UNTRAINED)
    clip, tokenizer = load_clip(model, pretrained, cache_dir, options)
    return TextTower(clip.text, tokenizer, trained=pretrained != UNTRAINED)
