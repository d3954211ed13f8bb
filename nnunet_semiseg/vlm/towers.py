"""Load towers (image and text networks): from open_clip, from timm (images only) or from WordLlama (texts only)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.text.open_clip_models import UNTRAINED, cause_of, load_clip, model_config
from nnunet_semiseg.text.static_words import WORDLLAMA, load_word_tower

TIMM = "timm:"
NO_TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
"""A tiny text half. open_clip cannot make a model without one; this one is deleted afterwards."""


def split_model(model: str) -> tuple[str, str | None]:
    """Split `NAME:TAG` into name and tag. Without a tag, the second result is None.

    Models of the hub and of timm have their own weights. Their only tag is `none`, for random weights.
    """
    if model.endswith(f":{UNTRAINED}"):
        return model.removesuffix(f":{UNTRAINED}"), UNTRAINED
    if model.startswith(("hf-hub:", "local-dir:", TIMM)) or ":" not in model:
        return model, None
    name, _, tag = model.rpartition(":")
    return name, tag


def load_towers(
    model: str, weights: str | None, text_model: str | None, cache_dir: str | None, options: Mapping[str, str]
) -> tuple[nn.Module, Callable, dict]:
    """Load a model with `.visual` and `.text`. Also returns its tokenizer, and the content of `open_clip_config.json`.

    Args:
        model: a model of open_clip (`load_clip`), or `timm:NAME`, an image network of timm.
        weights: see `pretrained` in `load_clip`. For timm: `none` for random weights, or None for the weights of timm.
        text_model: `wordllama` replaces the model's text half. None keeps it, but a `timm:NAME` always gets WordLlama.
        options: how messages name options, see `load_clip`.

    Raises:
        UserError: there is no such model, its weights cannot be loaded, or WordLlama is not installed.
    """
    if text_model not in (None, WORDLLAMA):
        raise UserError(f"setting text_model={text_model}: must be {WORDLLAMA}, or be left out")
    if not model.startswith(TIMM):
        clip, tokenizer = load_clip(model, weights, cache_dir, options)
        config = model_config(model, clip)
    else:
        with TemporaryDirectory() as folder:
            _write_config(model.removeprefix(TIMM), Path(folder))
            trained = weights != UNTRAINED
            try:
                clip, tokenizer = load_clip(folder, UNTRAINED, cache_dir, options, pretrained_image=trained)
            except UserError as error:  # it names the temporary folder
                raise UserError(
                    f"--model {model}: cannot be loaded ({cause_of(error)}): connect this"
                    f" computer to the internet, or choose random weights (--model {model}:{UNTRAINED})"
                ) from None
            config = model_config(folder, clip)
    if text_model == WORDLLAMA or model.startswith(TIMM):
        with_words(clip)
        config["model_cfg"] = {**config["model_cfg"], "text_cfg": NO_TEXT}
    return clip, tokenizer, config


def with_words(clip: nn.Module) -> None:
    """Replace the text half of a model by the frozen word embeddings of WordLlama."""
    clip.text = load_word_tower()


def _write_config(name: str, folder: Path) -> None:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the names"
        raise UserError(f"--model {TIMM}{name}: is not a model of timm: {hint}")
    size = timm.get_pretrained_cfg(name, allow_unregistered=True)
    image_size = size.input_size[-1] if size else 224
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": image_size}
    config = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": NO_TEXT}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}}), encoding="utf-8"
    )
