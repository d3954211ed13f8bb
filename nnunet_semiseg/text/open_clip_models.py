"""Load models of open_clip: by name and tag, from the hub, from a folder, from a file, or untrained."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_semiseg.errors import UserError

HF_CONFIG = "config.json"
UNTRAINED = "none"
"""The value of `pretrained` for random weights. They are the same every time."""

TEXT_OPTIONS = {
    "model": "--set text_model=",
    "pretrained": "--set text_pretrained=",
    "cache_dir": "--set text_cache_dir=",
    "else": ", or run `nnunet_semiseg embed_prompts -d ID -o FILE.safetensors` on another computer and copy its file"
    " (--set text_embeddings=FILE.safetensors)",
}
"""How messages name the options of a training, and what else a user can do if the weights cannot be loaded."""


def load_clip(
    model: str,
    pretrained: str | None,
    cache_dir: str | None = None,
    options: Mapping[str, str] = TEXT_OPTIONS,
    pretrained_image: bool = False,
) -> tuple[nn.Module, Callable]:
    """Load a model of open_clip, with `.visual` and `.text`, and its tokenizer.

    Args:
        model: the name of a model of open_clip (``ViT-B-32``), ``hf-hub:OWNER/NAME``, or a folder (``local-dir:PATH``
            or only the path) with an ``open_clip_config.json`` and the weights.
        pretrained: a tag of open_clip (``openai``), the path of a checkpoint, or ``"none"`` for random weights from a
            fixed seed. ``hf-hub:`` models and folders have their own weights, and ignore a tag or None. A checkpoint
            does not say which activation it was trained with: if that was QuickGELU, name a model that has it
            (``ViT-B-32-quickgelu``). For tags, and for OpenAI's own ``.pt`` files (TorchScript archives), the
            activation is known.
        cache_dir: the folder for downloaded weights. Default: the hub's own cache.
        options: how messages name the options for model, pretrained and cache_dir, and a further hint (`else`).
            `MODEL` stands for the model, if its name is a part of an option.
        pretrained_image: whether an image half from timm gets timm's weights, even if the rest is random.

    Raises:
        UserError: the model or the tag is unknown; the checkpoint is of another model; the weights cannot be loaded;
            or a package that the model needs is not installed.
    """
    import open_clip  # a prediction never comes here and does not need it

    model = _model_name(model, options)
    is_hub, is_folder = model.startswith("hf-hub:"), model.startswith("local-dir:")
    untrained = pretrained == UNTRAINED
    file = pretrained if pretrained and Path(pretrained).is_file() else None
    tag = None if is_hub or is_folder or untrained or file else _tag(model, pretrained, options)
    is_archive = file is not None and _is_torchscript(file)
    quick_gelu = is_archive or bool(tag and open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"))
    if untrained or file:
        weights = {"load_weights": False, "pretrained_text": False, "pretrained_image": pretrained_image}
    else:
        weights = {"pretrained": tag, "require_pretrained": True}
    local = Path(model.removeprefix("local-dir:"))
    has_text_config = is_folder and (local / HF_CONFIG).is_file()  # written by `save_text_config`
    if has_text_config:
        own = {"hf_model_name": str(local), "hf_model_pretrained": False}  # its weights are in those of the model
        weights["text_cfg"] = open_clip.get_model_config(model)["text_cfg"] | own
    try:
        needs_hub = tag or is_hub or pretrained_image or (_has_hf_text(model) and not has_text_config)
        with _quiet(), _hub_or_cache(needs_hub), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # an untrained tower must be the same when a training is resumed
            # force_custom_text: the text half is a module of its own, even if it is a part of the model itself
            clip = open_clip.create_model(
                model, force_custom_text=True, force_quick_gelu=quick_gelu, cache_dir=cache_dir, **weights
            )
            if is_archive:
                clip.load_state_dict(_archived(file, clip.state_dict()))
            elif file:
                open_clip.load_checkpoint(clip, file, weights_only=True)
            tokenizer = open_clip.get_tokenizer(model, cache_dir=cache_dir)
    except Exception as e:
        raise UserError(_why(e, model, pretrained, file, quick_gelu, options)) from None
    return clip, tokenizer


def model_config(model: str, clip: nn.Module) -> dict:
    """The content of `open_clip_config.json` for a model from `load_clip`.

    From a folder with this file and the weights, `load_clip` loads the same model.
    """
    import open_clip
    from open_clip.transformer import QuickGELU

    config = open_clip.get_model_config(_model_name(model, TEXT_OPTIONS))
    if any(isinstance(module, QuickGELU) for module in clip.modules()):
        config = config | {"quick_gelu": True}
    return {"model_cfg": config, "preprocess_cfg": dict(clip.visual.preprocess_cfg)}


def save_text_config(clip: nn.Module, tokenizer: Callable, folder: Path) -> None:
    """Save the files with which a Hugging Face text tower can be built without the hub.

    Args:
        folder: the folder of `open_clip_config.json`.
    """
    clip.text.transformer.config.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)


def _model_name(model: str, options: Mapping[str, str]) -> str:
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
        about = named(options, "model")
        raise UserError(f"{about}{model}: the folder has no open_clip_config.json: name a folder that has one")
    near = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() lists the names"
    raise UserError(f"{named(options, 'model')}{model}: is neither a model of open_clip nor a folder: {hint}")


def _tag(model: str, tag: str | None, options: Mapping[str, str]) -> str:
    import open_clip

    if tag and open_clip.is_pretrained_cfg(model, tag):
        return tag
    tags = ", ".join([*open_clip.list_pretrained_tags_by_model(model), UNTRAINED])
    about = named(options, "pretrained").replace("MODEL", model)
    raise UserError(f"{about}{tag}: is neither a file nor a tag of {model}: use one of its tags: {tags}")


def _has_hf_text(model: str) -> bool:
    import open_clip

    text = open_clip.get_model_config(model)["text_cfg"]
    return "hf_model_name" in text or "hf_tokenizer_name" in text


def _is_torchscript(file: str) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _archived(file: str, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Load the weights in a TorchScript archive.

    open_clip reads such a file with `weights_only=False` only, which lets a pickle run any code.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_to_custom_text_state_dict(torch.jit.load(file, map_location="cpu").state_dict())
    return {key: state[key] for key in wanted if key in state}


@contextmanager
def _quiet():
    """Hide all logs and all warnings of this process while a model is loaded.

    open_clip logs to the root logger, and the libraries that it calls log, too: about random weights, retries and
    failures. Our error says what the user must know.
    """
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
    """If the Hugging Face hub does not answer, use the cache at once. The hub's code would retry each file for 23 s."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    if needs_hub and not before:
        try:
            constants.HF_HUB_OFFLINE = get_session().head(constants.ENDPOINT, timeout=5).status_code >= 500
        except Exception:  # requests, httpx and the system have different errors
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def named(options: Mapping[str, str], name: str) -> str:
    """How a message names an option before its value."""
    return options[name].removeprefix("--set ")


def cause_of(error: UserError) -> str:
    """What a library said, in one line, before `load_clip` made this error of it."""
    return _short(error.__context__ or error)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _why(
    error: Exception, model: str, pretrained: str | None, file: str | None, quick_gelu: bool, options: Mapping[str, str]
) -> str:
    import open_clip

    reason, name = _short(error), model.removeprefix("local-dir:")
    about, weights = named(options, "model") + model, named(options, "pretrained").replace("MODEL", name)
    if "transformers" in str(error) and importlib.util.find_spec("transformers") is None:
        return f"{about}: has a Hugging Face text tower, which needs `pip install transformers`"
    if file:
        fix = f"{options['pretrained']}{file}" if "MODEL" in options["pretrained"] else f"{options['model']}MODEL"
        return (
            f"{weights}{file}: not a readable checkpoint of {model}: name the model it belongs to with {fix} [{reason}]"
        )
    if not model.startswith(("hf-hub:", "local-dir:")):  # these have their own weights
        about = f"{weights}{pretrained}" if "MODEL" in options["pretrained"] else f"{about}, {weights}{pretrained}"
    local = f"{options['pretrained']}FILE"
    if model.startswith("hf-hub:"):  # its configuration is on the hub, too
        local = f"{options['model']}FOLDER"
    elif quick_gelu and f"{model}-quickgelu" in open_clip.list_models():  # the file itself does not say which
        name += "-quickgelu"
        local += "" if "MODEL" in local else f" {options['model']}{name}"
    local = local.replace("MODEL", name)
    return (
        f"{about}: the weights cannot be loaded: use a local checkpoint ({local}), "
        f"or a cache folder from another computer ({options['cache_dir']}DIR){options.get('else', '')} [{reason}]"
    )
