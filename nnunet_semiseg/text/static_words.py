"""WordLlama: trained embeddings of words. They come with a small package, so that nothing has to be downloaded.

The feature of a text is the mean of its tokens' embeddings (256 numbers each). It shows which words a text has and
which words are similar, but not their order: "left of the upper one" and "upper of the left one" have the same feature.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nnunet_semiseg.errors import UserError

WORDLLAMA = "wordllama"
"""The value of the setting `text_model` that chooses WordLlama."""
FILES = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
"""Files of the package WordLlama: the embeddings and the vocabulary."""
SIZE = 32000, 256
PAD = 0
"""The token id that fills the end of short texts. It is that of <unk> in the vocabulary of WordLlama. No text contains
it, because words without a token are written as bytes."""


class WordTower(nn.Module):
    """A frozen table of token embeddings with the interface of `TextTower`.

    Context tokens are averaged together with the tokens of the text. So they can only shift the feature of a class, and
    their place does not matter. The table is not part of the state: a checkpoint holds only the name of the model.

    Args:
        table: the embeddings (V, d) of the vocabulary.
        tokenizer: a tokenizer of the package `tokenizers`.
        trained: whether the embeddings are trained. False: they are random.
    """

    knows_order = False

    def __init__(self, table: Tensor, tokenizer, trained: bool = True):
        super().__init__()
        self.register_buffer("table", table.float(), persistent=False)
        self.tokenize, self.trained = WordTokenizer(tokenizer), trained

    @property
    def width(self) -> int:
        """The length of a token embedding, and of a text feature."""
        return self.table.shape[1]

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Look up the embeddings of token ids: (N, L) to (N, L, d)."""
        return self.table[ids.to(self.table.device)]

    def forward(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """The mean (N, d) of the embeddings (N, L, d) of all words and context tokens, not normalised.

        `ids` (N, L) say what is padding.
        """
        words = self.tokenize.words(ids.to(embeddings.device))[..., None]
        return (embeddings * words).sum(1) / words.sum(1).clamp_min(1)


class WordTokenizer:
    """Turns texts into token ids, with places for context tokens. A text may have any length."""

    start = 0
    """The place of the first word or context token."""

    def __init__(self, tokenizer):
        tokenizer.enable_padding(pad_id=PAD)
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], n_ctx: int = 0) -> Tensor:
        """Token ids (N, L), int64, of N texts. The first `n_ctx` are placeholders for context. `PAD` fills the end."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = torch.tensor([e.ids for e in encoded], dtype=torch.int64).reshape(len(encoded), -1)
        return torch.cat((ids.new_full((len(ids), n_ctx), PAD + 1), ids), 1)

    def words(self, ids: Tensor) -> Tensor:
        """Which ids (N, L) are words or context tokens: a bool tensor, False at padding."""
        return ids != PAD


def load_word_tower(trained: bool = True) -> WordTower:
    """Load WordLlama's embeddings from the files of its package. Its own loader would ask the internet for a file.

    Args:
        trained: False: the same tokens have random embeddings, which are the same every time.

    Raises:
        UserError: the package is not installed, or these files are missing.
    """
    from tokenizers import Tokenizer

    weights, vocabulary = (wordllama_folder() / file for file in FILES)
    for file in (weights, vocabulary):
        if not file.is_file():
            raise UserError(
                f"{file}: no such file, which the text encoder {WORDLLAMA} needs: install the package again with"
                f" `pip install --force-reinstall --no-deps {WORDLLAMA}`"
            )
    table = _read_table(weights) if trained else torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    return WordTower(table, Tokenizer.from_file(str(vocabulary)), trained)


def wordllama_folder() -> Path:
    """The folder of the package WordLlama.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(WORDLLAMA)  # without an import, which would change Python's logging
    if spec is None or spec.origin is None:
        raise UserError(f"the text encoder {WORDLLAMA} is not installed: run `pip install {WORDLLAMA}`")
    return Path(spec.origin).parent


@cache
def _read_table(file: Path) -> Tensor:
    return load_file(file)["embedding.weight"].float()
