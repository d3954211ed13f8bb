"""The frozen text half of an open_clip model, fed with token embeddings instead of token ids."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_semiseg.errors import UserError

UNTRAINED = "none"
"""as `pretrained`: a tower with random weights, the same ones every time"""


class TextTower(nn.Module):
    """A frozen text transformer whose token embeddings the caller may change before they go in (CoOp).

    Weights never require a gradient and the tower is always in eval mode; gradients flow through it to the
    embeddings. Everything between the embeddings and the features is open_clip's own ``forward``.

    Args:
        text: the ``.text`` of an open_clip model: ``TextTransformer`` (CLIP, CoCa, SigLIP) or
            ``HFTextEncoder`` (BiomedCLIP). With ``force_custom_text=True`` every model has one.
        tokenizer: from ``open_clip.get_tokenizer``.
        trained: False for random weights.
    """

    def __init__(self, text: nn.Module, tokenizer, trained: bool = True):
        super().__init__()
        self.text = text.requires_grad_(False)
        self.text.output_tokens = False
        self.trained = trained
        self.context_length: int = tokenizer.context_length
        self._tokenizer = tokenizer
        self._is_hf = not hasattr(text, "token_embedding")
        # Nothing looks at the padding of a causal tower that pools at the end token, and Hugging Face towers
        # mask it. CoCa appends a class token behind it, and SigLIP looks at all and pools at the last place.
        pools_at_end = not self._is_hf and text.pool_type in ("argmax", "eos") and text.cls_emb is None
        self._may_cut = self._is_hf or (text.attn_mask is not None and pools_at_end)
        self._probe_tokenizer()
        self.eval()

    @property
    def width(self) -> int:
        """Length of a token embedding."""
        return self._embedding.embedding_dim

    @property
    def start(self) -> int:
        """Position of the first context token: 1 after a start token, 0 where the tokenizer has none."""
        return self._start

    def train(self, mode: bool = True) -> TextTower:
        return super().train(False)

    def tokenize(self, texts: Sequence[str], n_ctx: int = 0) -> Tensor:
        """Token ids with room for ``n_ctx`` context tokens after the start token.

        Args:
            texts: N prompts.
            n_ctx: number of placeholders; their embeddings are meant to be replaced.

        Returns:
            (N, L) int64; L is the longest prompt's length where that does not change the features, otherwise
            the context length.

        Raises:
            UserError: a prompt and its context tokens exceed the context length (open_clip would cut it off
                without a word). The message names it.
        """
        ids = self._tokenizer(list(texts), context_length=self.context_length + 1)
        positions = torch.arange(1, ids.shape[1] + 1)
        lengths = ((ids != self._pad) * positions).amax(1) + self._unseen_end + n_ctx
        for text, length in zip(texts, lengths, strict=True):
            if length > self.context_length:
                text = text if len(text) <= 80 else f"{text[:77]}..."
                raise UserError(
                    f'dataset.json: prompt "{text}" is too long: the text encoder takes {self.context_length}'
                    f" tokens, {n_ctx} of them context tokens; shorten it (or try --set n_ctx=NUMBER)"
                )
        # A placeholder is a word: neither padding, which may be masked, nor the end token, where CLIP pools
        placeholders = ids.new_full((len(ids), n_ctx), self._word)
        ids = torch.cat([ids[:, : self._start], placeholders, ids[:, self._start :]], dim=1)
        return ids[:, : int(lengths.max()) if self._may_cut else self.context_length]

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token embeddings, without positions: (N, L) ids to (N, L, width)."""
        return self._embedding(ids.to(self._embedding.weight.device))

    def forward(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """Text features of token embeddings.

        Args:
            embeddings: (N, L, width), from :meth:`embed_tokens`, some of them replaced.
            ids: (N, L), from :meth:`tokenize`: they say where padding is and where to pool.

        Returns:
            (N, d), not normalised; equal to open_clip's ``encode_text`` if no embedding was replaced.
        """
        length, mask = ids.shape[1], {}
        if length < self.context_length and not self._is_hf:  # open_clip would not cut its mask itself
            mask = {"attn_mask": self.text.attn_mask[:length, :length]}
        # What a forward hook returns takes the place of the module's output
        hook = self._embedding.register_forward_hook(lambda *_: embeddings)
        try:
            return torch.func.functional_call(self.text, mask, (ids,))
        finally:
            hook.remove()

    @property
    def _embedding(self) -> nn.Embedding:
        return self.text.transformer.get_input_embeddings() if self._is_hf else self.text.token_embedding

    def _probe_tokenizer(self) -> None:
        """Learn from three texts what open_clip's tokenizers do not tell."""
        empty, a, b = self._tokenizer(["", "a", "b"], context_length=self.context_length + 1)
        self._start = int(a[0] == b[0])
        self._word = int(a[self._start])
        self._pad = int(empty[-1])
        # SigLIP pads with its end token, which therefore cannot be told from padding but takes one place
        self._unseen_end = int(empty[self._start] == self._pad)


def load_text_tower(model: str, pretrained: str | None, cache_dir: str | None = None) -> TextTower:
    """The text half of an open_clip model; the image half is not kept.

    Args:
        model: a name of open_clip's (``ViT-B-32``), ``hf-hub:OWNER/NAME``, or a folder (``local-dir:PATH`` or
            the path alone) with an ``open_clip_config.json``, and its weights beside it.
        pretrained: a tag of open_clip's (``openai``), the path of a checkpoint, or ``"none"`` for random
            weights drawn from a fixed seed. ``hf-hub:`` models and folders bring their own weights and pass
            over a tag. A checkpoint does not tell the activation it was trained with: one trained with
            QuickGELU needs a model that has it (``ViT-B-32-quickgelu``). Of a tag it is known, and of
            OpenAI's own ``.pt`` files, which are TorchScript archives.
        cache_dir: where to look for downloaded weights, and to keep them; default: the hub's own cache.

    Raises:
        UserError: unknown model or tag, a checkpoint of another model, weights that cannot be had.
    """
    import open_clip  # a prediction never gets here, and does without

    model = _model_name(model)
    is_hub, is_folder = model.startswith("hf-hub:"), model.startswith("local-dir:")
    untrained = pretrained == UNTRAINED
    file = pretrained if pretrained and Path(pretrained).is_file() else None
    tag = None if is_hub or is_folder or untrained or file else _tag(model, pretrained)
    is_archive = file is not None and _is_torchscript(file)
    quick_gelu = is_archive or bool(tag and open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"))
    if untrained or file:
        weights = {"load_weights": False, "pretrained_text": False}
    else:
        weights = {"pretrained": tag, "require_pretrained": True}
    try:
        needs_hub = tag or is_hub or _has_hf_text(model)
        with _quiet(), _hub_or_cache(needs_hub), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # an untrained tower must be the same again when a training is resumed
            # force_custom_text: the text half as one module, also where it is part of the model itself
            clip = open_clip.create_model(
                model, force_custom_text=True, force_quick_gelu=quick_gelu, cache_dir=cache_dir, **weights
            )
            if is_archive:
                clip.text.load_state_dict(_archived_text(file))
            elif file:
                open_clip.load_checkpoint(clip, file, weights_only=True)
            tokenizer = open_clip.get_tokenizer(model, cache_dir=cache_dir)
    except Exception as e:
        raise UserError(_why(e, model, pretrained, file, quick_gelu)) from None
    return TextTower(clip.text, tokenizer, trained=not untrained)


def _model_name(model: str) -> str:
    import open_clip

    if model.startswith("hf-hub:"):
        return model
    known = open_clip.list_models()
    if model.replace("/", "-") in known:
        return model.replace("/", "-")
    folder = Path(model.removeprefix("local-dir:"))
    if (folder / "open_clip_config.json").is_file():
        return f"local-dir:{folder}"
    if folder.is_dir():
        raise UserError(f"text_model={model}: the folder has no open_clip_config.json; name one that has")
    near = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() lists the names"
    raise UserError(f"text_model={model}: neither a model of open_clip's nor a folder; {hint}")


def _tag(model: str, tag: str | None) -> str:
    import open_clip

    if tag and open_clip.is_pretrained_cfg(model, tag):
        return tag
    tags = ", ".join([*open_clip.list_pretrained_tags_by_model(model), UNTRAINED])
    raise UserError(f"text_pretrained={tag}: neither a file nor a tag of {model}; its tags are {tags}")


def _has_hf_text(model: str) -> bool:
    import open_clip

    text = open_clip.get_model_config(model)["text_cfg"]
    return "hf_model_name" in text or "hf_tokenizer_name" in text


def _is_torchscript(file: str) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _archived_text(file: str) -> dict[str, Tensor]:
    """The text half's weights in a TorchScript archive; open_clip would have torch.load trust its pickles."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_to_custom_text_state_dict(torch.jit.load(file, map_location="cpu").state_dict())
    return {key.removeprefix("text."): value for key, value in state.items() if key.startswith("text.")}


@contextmanager
def _quiet():
    """open_clip's log (random weights, retries, failures): what the user must know is in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _hub_or_cache(needs_hub: object):
    """Turn to the cache at once when the hub does not answer: huggingface_hub retries each file for 23 s."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    if needs_hub and not before:
        try:
            constants.HF_HUB_OFFLINE = get_session().head(constants.ENDPOINT, timeout=5).status_code >= 500
        except Exception:  # requests, httpx and the system each have their own
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _why(error: Exception, model: str, pretrained: str | None, file: str | None, quick_gelu: bool) -> str:
    import open_clip

    reason = " ".join(str(error).split())
    if "transformers" in reason and importlib.util.find_spec("transformers") is None:
        return f"text_model={model}: has a Hugging Face text tower, which needs `pip install transformers`"
    reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
    if file:
        return (
            f"text_pretrained={file}: no readable checkpoint of {model}; "
            f"name the model it belongs to with --set text_model=MODEL [{reason}]"
        )
    local = "--set text_pretrained=FILE"
    if model.startswith("hf-hub:"):  # its configuration is on the hub as well
        local = "--set text_model=FOLDER"
    elif quick_gelu and f"{model}-quickgelu" in open_clip.list_models():  # a bare file does not tell
        local += f" --set text_model={model}-quickgelu"
    return (
        f"text_model={model}, text_pretrained={pretrained}: the weights cannot be had; "
        f"use a local checkpoint ({local}), "
        f"or a cache folder filled elsewhere (--set text_cache_dir=DIR), "
        f"or run `nnunet_semiseg embed_prompts -d ID -o FILE.safetensors` elsewhere "
        f"and bring its file (--set text_embeddings=FILE.safetensors) [{reason}]"
    )
