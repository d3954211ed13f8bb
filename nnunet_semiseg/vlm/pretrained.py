"""Read what `pretrain_vlm` wrote: the model, and whose labels it saw."""

from __future__ import annotations

import json
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nnunet_semiseg.data.labeled_subset import cases_of_fold, take_labeled
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json
from nnunet_semiseg.schema import check
from nnunet_semiseg.text.open_clip_models import UNTRAINED, cause_of, load_clip
from nnunet_semiseg.vlm.model import AMVLM
from nnunet_semiseg.vlm.towers import with_words

ABOUT, WEIGHTS, STATE = "vlm.json", "vlm.safetensors", "training_state.safetensors"


def load_vlm(folder: str | Path) -> AMVLM:
    """Load a pre-trained model from a folder of `pretrain_vlm`, frozen and in eval mode. It needs no internet.

    Raises:
        UserError: there is no such folder; `pretrain_vlm` has not written it; the pre-training is not finished; a file
            is damaged; or a package that the model needs is not installed.
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
        # the error says how to get weights, which are not needed here
        raise UserError(f"{folder}: its image and text networks cannot be built ({cause_of(error)}): {fix}") from None
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


def check_pretraining(settings, plans: dict, configuration: str, fold, dataset_json: dict) -> set[str]:
    """Refuse a pre-training that does not fit a training. Returns the labelled cases whose labels it saw.

    Args:
        settings: those of `AMVLMTrainer`. `vlm` is the folder of the pre-training.

    Raises:
        UserError: the pre-training used labels which this training must not know; or it had slices along an axis that
            the text masks do not use; or see `read_about`.
    """
    about, manager = read_about(Path(settings.vlm), "pre-train again"), PlansManager(plans)
    refuse_seen_labels(settings, about, plans, configuration, fold, dataset_json)
    axis = about["settings"].get("slice_axis", 0)
    if len(manager.get_configuration(configuration).patch_size) == 3 and axis != 0:
        raise UserError(
            f"setting vlm={settings.vlm}: was pre-trained on slices across axis {axis}, but text masks need"
            " slices across axis 0: pre-train again with --set slice_axis=0"
        )
    return seen_cases(about, plans["dataset_name"])


def refuse_seen_labels(settings, about: dict, plans: dict, configuration: str, fold, dataset_json: dict) -> None:
    """Refuse a pre-training that used labels which this training must not know, such as those of validation cases.

    Raises:
        UserError: the pre-training used such a label.
    """
    name, number = plans["dataset_name"], settings.num_labeled
    if not (seen := seen_cases(about, name)):
        return
    base = Path(str(nnUNet_preprocessed), name)
    folder = str(base / PlansManager(plans).get_configuration(configuration).data_identifier)
    training = cases_of_fold(base, infer_dataset_class(folder).get_identifiers(folder), fold)
    hidden = sorted(set(seen) - set(take_labeled(training, [], number, dataset_json)[0]))
    if hidden:
        same = " ".join([*([] if fold == "all" else [f"fold={fold}"]), *([f"num_labeled={number}"] if number else [])])
        more = f" (and {len(hidden) - 1} more)" if len(hidden) > 1 else ""
        raise UserError(
            f"setting vlm={settings.vlm}: its pre-training used the label of {hidden[0]}{more}, which this training"
            f" must not know: pre-train again with {f'--set {same} or ' if same else ''}--set mask_weight=0"
        )
