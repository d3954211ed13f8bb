"""The towers that a pre-training starts from: open_clip's, any image network of timm's, words of WordLlama's."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.text.open_clip_models import UNTRAINED, load_clip, model_config
from nnunet_semiseg.text.static_words import WORDLLAMA, load_word_tower

TIMM = "timm:"
NO_TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
"""open_clip builds no model without a text half; this one is thrown away"""


def split_model(model: str) -> tuple[str, str | None]:
    """`NAME:TAG` to name and tag; what has no tag brings its own weights."""
    if model.endswith(f":{UNTRAINED}"):
        return model.removesuffix(f":{UNTRAINED}"), UNTRAINED
    if model.startswith(("hf-hub:", "local-dir:", TIMM)) or ":" not in model:
        return model, None
    name, _, tag = model.rpartition(":")
    return name, tag


def load_towers(
    model: str, weights: str | None, text_model: str | None, cache_dir: str | None, options: Mapping[str, str]
) -> tuple[nn.Module, Callable, dict]:
    """A model with `.visual` and `.text`, its tokenizer, and what `open_clip_config.json` says of it.

    Args:
        model: of open_clip's (`load_clip`), or `timm:NAME`, an image network of timm's.
        weights: as `pretrained` of `load_clip`; for timm `none`, or None for timm's own.
        text_model: `wordllama` in place of the model's text half, the only one that goes with `timm:NAME`.

    Raises:
        UserError: unknown models, or weights that cannot be had.
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
            clip, tokenizer = load_clip(folder, UNTRAINED, cache_dir, options, pretrained_image=trained)
            config = model_config(folder, clip)
    if text_model == WORDLLAMA or model.startswith(TIMM):
        with_words(clip)
        config["model_cfg"] = {**config["model_cfg"], "text_cfg": NO_TEXT}
    return clip, tokenizer, config


def with_words(clip: nn.Module) -> None:
    """Put WordLlama's embeddings, frozen, in the place of a model's text half."""
    clip.text = load_word_tower()


def _write_config(name: str, folder: Path) -> None:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the names"
        raise UserError(f"--model {TIMM}{name}: no model of timm's; {hint}")
    size = timm.get_pretrained_cfg(name, allow_unregistered=True)
    image_size = size.input_size[-1] if size else 224
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": image_size}
    config = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": NO_TEXT}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}}), encoding="utf-8"
    )
