"""open_clip's tokenizers, with two additions: they say where words are, and when a text is too long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_semiseg.errors import UserError


class Tokenizer:
    """Turns texts into token ids, with places for context tokens. It also knows which ids are words.

    Args:
        tokenizer: the result of `open_clip.get_tokenizer`.
        may_cut: whether the padding after the longest text may be cut off without changing a feature.
    """

    def __init__(self, tokenizer, may_cut: bool):
        self.context_length: int = tokenizer.context_length
        self._tokenizer, self._may_cut = tokenizer, may_cut
        empty, a, b = tokenizer(["", "a", "b"], context_length=self.context_length + 1)
        self.start = int(a[0] == b[0])
        """The place of the first word or context token. It is 1 if there is a start token, else 0."""
        self._word = int(a[self.start])
        self._pad = int(empty[-1])
        # SigLIP pads with its end token, so that the two look the same, but the end token takes one place
        self._unseen_end = int(empty[self.start] == self._pad)
        self._has_end = int(int((a != self._pad).sum()) > self.start + 1)

    def __call__(self, texts: Sequence[str], n_ctx: int = 0) -> Tensor:
        """Turn texts into token ids, with places for context tokens.

        Args:
            texts: N texts.
            n_ctx: the number of placeholders after the start token. Their embeddings will be replaced.

        Returns:
            (N, L) int64. L is the length of the longest text if that does not change the features, otherwise the
            context length.

        Raises:
            UserError: a text with its context tokens is longer than the context (open_clip would cut it silently).
                The message names the text.
        """
        ids = self._tokenizer(list(texts), context_length=self.context_length + 1)
        lengths = self._lengths(ids) + self._unseen_end + n_ctx
        for text, length in zip(texts, lengths, strict=True):
            if length > self.context_length:
                text = text if len(text) <= 80 else f"{text[:77]}..."
                context = f", {n_ctx} of them context tokens" if n_ctx else ""
                raise UserError(
                    f'"{text}" is too long: the text encoder takes {self.context_length} tokens{context}: shorten it'
                )
        # the placeholder must be a word: not padding, which may be masked, nor the end token, at which CLIP pools
        placeholders = ids.new_full((len(ids), n_ctx), self._word)
        ids = torch.cat([ids[:, : self.start], placeholders, ids[:, self.start :]], dim=1)
        return ids[:, : int(lengths.max()) if self._may_cut else self.context_length]

    def words(self, ids: Tensor) -> Tensor:
        """Which ids (N, L) are words or context tokens, and not start, end or padding: a bool tensor."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return (positions >= self.start) & (positions < (self._lengths(ids) - self._has_end)[:, None])

    def _lengths(self, ids: Tensor) -> Tensor:
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return ((ids != self._pad) * positions).amax(1)
