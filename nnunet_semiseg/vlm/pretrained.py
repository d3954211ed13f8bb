"""Read what `pretrain_vlm` wrote: the model, and whose labels it saw."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json
from nnunet_semiseg.schema import check
from nnunet_semiseg.text.open_clip_models import UNTRAINED, load_clip
from nnunet_semiseg.vlm.model import AMVLM
from nnunet_semiseg.vlm.towers import with_words

ABOUT, WEIGHTS, STATE = "vlm.json", "vlm.safetensors", "training_state.safetensors"


def load_vlm(folder: str | Path) -> AMVLM:
    """Load a pre-trained model from a folder of `pretrain_vlm`, frozen and in eval mode. It needs no internet.

    Raises:
        UserError: there is no such folder; `pretrain_vlm` has not written it; or the pre-training is not finished.
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
                " nnunet_semiseg pretrain_vlm command again to continue"
            )
    try:
        clip, tokenizer = load_clip(str(folder), UNTRAINED)
    except UserError as error:
        raise UserError(f"{folder}: its image and text networks cannot be built: {fix} [{error}]") from None
    if settings.get("text_model"):
        with_words(clip)
    vlm = AMVLM(clip, tokenizer, settings["dim"], settings["hidden"])
    try:
        vlm.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({' '.join(str(error).split())[:200]}): {fix}") from None
    return vlm.requires_grad_(False).eval()


def read_state(folder: Path) -> dict:
    """Read the metadata of the state of a pre-training: `epoch` (the number of finished epochs) and more.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / STATE
    try:
        with safe_open(str(file), "pt") as opened:
            return json.loads(opened.metadata()["state"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): remove {folder} to begin again") from None


def read_about(folder: Path, fix: str) -> dict:
    """Read and check `vlm.json` of a pre-training. Raises UserError if it is missing, damaged or another file."""
    about = read_json(folder / ABOUT, fix)
    check(about, {"settings": dict, "mask_cases?": list[str]}, folder / ABOUT, fix)
    sizes = {"dim": int, "hidden": int, "slice_axis?": int, "num_epochs?": int, "text_model?": str | None}
    check(about["settings"], sizes, folder / ABOUT, fix, '"settings" ')
    if min(about["settings"]["dim"], about["settings"]["hidden"]) < 1:
        raise UserError(f"{folder / ABOUT}: dim and hidden must be 1 or more: {fix}")
    return about


def seen_cases(about: dict, dataset: str) -> set[str]:
    """The labelled cases of a dataset whose labels a pre-training saw, by its `vlm.json`."""
    return set(about.get("mask_cases", ())) if about.get("dataset") == dataset else set()
