"""What JSON files must hold: shapes, which are written as types, and nnU-Net's rules for `dataset.json` and plans.

nnU-Net itself does not check its files. If they are wrong, it may fail hours later. So each file is checked here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json
from nnunet_semiseg.json_types import in_words, matches

Shape = Mapping[str, Any]
"""The shape of a JSON object: a map from its keys to the types of the values.

A key that ends with `?` may be missing.
"""

DATASET_FIX = "write it as nnU-Net's documentation/dataset_format.md says"
READER_KEY = "overwrite_image_reader_writer"
DATASET_SECTION = "semiseg"
"""The key in `dataset.json` for all that this package adds to it, for example `prompts` and `labeled_order`."""

DATASET: Shape = {
    "labels": dict[str, int | list[int]],
    "file_ending": str,
    "numTraining": int,
    "channel_names?": dict[str, str],
    "modality?": dict[str, str],
    "regions_class_order?": list[int] | None,
    f"{READER_KEY}?": str,
    "dataset?": dict[str, dict],
}
PLANS: Shape = {
    "plans_name": str,
    "configurations": dict[str, dict],
    "dataset_name?": str,
    "image_reader_writer?": str,
    "transpose_forward?": list[int],
    "semiseg?": dict,
    "semiseg_found?": dict,
}
USED: Shape = {
    "dataset_name": str,
    "image_reader_writer": str,
    "transpose_forward": list[int],
    "transpose_backward": list[int],
}
"""The shape of the plans with which a training runs."""
CONFIGURATION: Shape = {
    "data_identifier": str,
    "preprocessor_name": str,
    "use_mask_for_norm": list[bool],
    "resampling_fn_data": str,
    "resampling_fn_data_kwargs": dict,
    "resampling_fn_seg": str,
    "resampling_fn_seg_kwargs": dict,
    "batch_size": int,
    "patch_size": list[int],
    "spacing": list[float],
    "normalization_schemes": list[str],
}
ARCHITECTURE: Shape = {"network_class_name": str, "arch_kwargs": dict, "_kw_requires_import": list[str]}
PER_STAGE = {
    "features_per_stage": int | list[int],
    "kernel_sizes": int | list[int | list[int]],
    "strides": list[int | list[int]],
    "n_conv_per_stage": int | list[int],
    "n_blocks_per_stage": int | list[int],
    "n_conv_per_stage_decoder": int | list[int],
}
ARCHITECTURE_KWARGS: Shape = {"n_stages?": int, **{f"{key}?": hint for key, hint in PER_STAGE.items()}}
NETWORKS = r"(dynamic_network_architectures|nnunetv2|nnunet_semiseg)(\.\w+)*\.[A-Z]\w*"
PARTS = r"torch\.nn(\.modules(\.\w+)?)?\.[A-Z]\w*"
"""A pattern for the classes that plans may import for convolutions and similar parts of a network."""
OTHER_PLANS = "take other plans"
TRUST = "nnUNet_semiseg_trust"
"""An environment variable. If it is 1, checkpoints and plans that can run code are used."""
FOLD: Shape = {"train": list[str], "val": list[str]}


def check(content: dict, shape: Shape, file: str | Path, fix: str, within: str = "") -> None:
    """Refuse JSON content if a key is missing or a value has another type.

    Args:
        within: the place of the content in the file, for the message.

    Raises:
        UserError: the content has another shape. The message names the key, and the type that its value must have.
    """
    for key, hint in shape.items():
        name = key.removesuffix("?")
        if name not in content:
            if name == key:
                raise UserError(f'{file}: {within}has no "{name}": {fix}')
        elif not matches(content[name], hint):
            raise UserError(f"{file}: {within}{_wrong(name, content[name], hint)}: {fix}")


def _wrong(name: str, value: Any, hint: Any) -> str:
    """A sentence that names a value with a wrong type.

    If the wrong value is inside another one, the sentence names the inner value.
    """
    if get_origin(hint) is dict and isinstance(value, dict):
        inner = get_args(hint)[1]
        key = next(key for key, v in value.items() if not matches(v, inner))
        return f'"{name}": {_wrong(key, value[key], inner)}'
    found = repr(value)
    return f'"{name}" is {found if len(found) <= 60 else f"{found[:57]}..."}, but must be {in_words(hint)}'


def read_dataset_json(dataset: Path) -> dict:
    """Read and check the `dataset.json` in a dataset's folder.

    Raises:
        UserError: the file is missing, is not JSON, or is not what nnU-Net accepts; see `check_dataset_json`.
    """
    file = dataset / "dataset.json"
    content = read_json(file, DATASET_FIX)
    check_dataset_json(content, file)
    return content


def check_dataset_json(content: dict, file: str | Path) -> None:
    """Refuse the content of a dataset.json with which nnU-Net cannot train, or would train wrongly.

    Raises:
        UserError: for example, a key is missing or has another type; a label is below 0, or there is a gap between
            labels; the background is not 0; there is no class; regions have no order; the ignore label is not the last
            one; channels are not numbered from 0; nnU-Net does not have the reader.
    """
    check(content, DATASET, file, DATASET_FIX)
    key = "modality" if "modality" in content and not content.get("channel_names") else "channel_names"
    channels = content.get(key)
    if not channels:
        found = "is empty" if key in content else "is missing"
        raise UserError(f'{file}: "{key}" {found}: {DATASET_FIX}')
    if list(channels) != [str(i) for i in range(len(channels))]:  # nnU-Net uses them in the order of the file
        found, right = (", ".join(map(repr, keys)) for keys in (channels, map(str, range(len(channels)))))
        raise UserError(f'{file}: "{key}" has the keys {found}, but must have {right}, in this order')
    if len(content.get("modality", channels)) != len(channels):  # nnU-Net counts `modality`, but reads the other one
        raise UserError(f'{file}: "modality" and "channel_names" have different lengths: remove "modality"')
    if not content["file_ending"].startswith("."):
        raise UserError(
            f'{file}: "file_ending" is "{content["file_ending"]}", but must begin with a dot: {DATASET_FIX}'
        )
    if content["numTraining"] < 0:
        raise UserError(f'{file}: "numTraining" is {content["numTraining"]}: write the number of labelled cases')
    readers = [reader.__name__ for reader in LIST_OF_IO_CLASSES]
    if content.get(READER_KEY, "None") not in (*readers, "None"):
        raise UserError(f'{file}: "{READER_KEY}" is "{content[READER_KEY]}": use {" or ".join(readers)}')
    if isinstance(content.get(DATASET_SECTION), dict):  # another type is refused when the prompts are read
        check(content[DATASET_SECTION], {"labeled_order?": list[str]}, file, DATASET_FIX, f'"{DATASET_SECTION}" ')
    for case, entry in content.get("dataset", {}).items():
        check(entry, {"images": list[str], "label": str}, file, DATASET_FIX, f'"dataset" {case} ')
        if case in ("", ".", "..") or "/" in case or "\\" in case:  # its files would be in another folder
            raise UserError(f'{file}: "dataset" has a case called "{case}": give it a name without / and \\')
    _check_labels(content, file)


def _check_labels(content: dict, file: str | Path) -> None:
    labels = {name: value if isinstance(value, list) else [value] for name, value in content["labels"].items()}
    classes = [name for name in labels if name not in ("background", "ignore")]
    for name, values in labels.items():
        if not name.strip() or not name.isprintable():  # it is shown in tables, figures and texts
            raise UserError(f'{file}: "labels" has a class called {name!r}: give it a name that can be printed')
        if not values or min(values) < 0:
            what = f"is {values[0]}" if len(values) == 1 else f"is {values}"
            raise UserError(f'{file}: label "{name}" {what}, but labels are 0 or more: {DATASET_FIX}')
        if len(values) > 1 and (0 in values or len(set(values)) < len(values)):
            what = "the background in it" if 0 in values else "a value twice"
            raise UserError(f'{file}: label "{name}" is {values}, but must not have {what}: {DATASET_FIX}')
    if labels.get("background") != [0] or isinstance(content["labels"]["background"], list):
        raise UserError(f'{file}: "labels" must have "background": 0: {DATASET_FIX}')
    if not classes:
        raise UserError(f'{file}: "labels" has only background and ignore: add a class')
    regions = [name for name in classes if len(labels[name]) > 1]
    known = sorted({value for name, values in labels.items() if name != "ignore" for value in values})
    if regions:
        _check_order(content.get("regions_class_order"), regions[0], classes, known, file)
    elif known != list(range(len(classes) + 1)):
        found = ", ".join(map(str, known))
        raise UserError(f'{file}: "labels" has the values {found}, but must have 0 to {len(classes)}, each once')
    largest = max(max(labels[name]) for name in classes)
    if isinstance(content["labels"].get("ignore"), list):
        raise UserError(f'{file}: label "ignore" is a list, but must be the last value: {largest + 1}')
    if "ignore" in labels and labels["ignore"] != [largest + 1]:
        raise UserError(f'{file}: label "ignore" is {labels["ignore"][0]}, but must be the last one: {largest + 1}')


def _check_order(order: list[int] | None, region: str, classes: list[str], known: list[int], file: str | Path) -> None:
    if order is None or len(order) != len(classes):
        found = "is missing" if order is None else f"has {len(order)} values"
        raise UserError(
            f'{file}: "regions_class_order" {found}, but label "{region}" is a region: write one value for each of the'
            f" {len(classes)} classes, in the order in which they are drawn"
        )
    if unknown := sorted(set(order) - set(known)):
        raise UserError(
            f'{file}: "regions_class_order" has {unknown[0]}, which is not a value in "labels": {DATASET_FIX}'
        )
    if len(set(order)) < len(order):
        raise UserError(f'{file}: "regions_class_order" has a value twice: {DATASET_FIX}')


def load_plans(file: Path, fix: str) -> dict:
    """Read and check a plans file.

    Args:
        fix: what to do if the file is missing or damaged, for the message.

    Raises:
        UserError: the file is missing or is not JSON; a key is missing or has another type.
    """
    plans = read_json(file, fix)
    check(plans, PLANS, file, fix)
    return plans


def names_of_plans(preprocessed: Path) -> list[str]:
    """The names of the plans of a dataset, without the copies that a comparison makes for its runs."""
    there = [f.stem for f in sorted(preprocessed.glob("*.json")) if b'"plans_name"' in f.read_bytes()]
    originals = {name: re.sub(r"(_\d+labeled)?(_seed\d+)?$", "", name) for name in there}
    return [name for name, original in originals.items() if original == name or original not in there]


def resolved(plans: dict, configuration: str) -> dict:
    """A configuration of the plans, with all values that it inherits.

    nnU-Net's `PlansManager` does the same, but needs torch.
    """
    about = plans["configurations"][configuration]
    return (resolved(plans, about["inherits_from"]) if "inherits_from" in about else {}) | about


def read_splits(file: Path, fix: str) -> list[dict]:
    """Read and check the folds in a `splits_final.json`.

    Raises:
        UserError: the file is missing, is not JSON, or is not a list of folds.
    """
    folds = read_json(file, fix, list)
    for i, fold in enumerate(folds):
        if not isinstance(fold, dict):
            raise UserError(f"{file}: fold {i} is not a JSON object: {fix}")
        check(fold, FOLD, file, fix, f"fold {i} ")
    return folds


def check_configuration(plans: dict, configuration: str, file: str | Path, fix: str) -> None:
    """Refuse a configuration that the plans do not have, or that is damaged.

    Args:
        file: the plans file, for the message.

    Raises:
        UserError: there is no such configuration (the message lists all), or something is wrong with it.
    """
    known = plans["configurations"]
    if configuration not in known:
        raise UserError(f"{file}: no configuration {configuration}: use {' or '.join(known) or fix}")
    check(plans, USED, file, fix)
    within = f"configuration {configuration} "
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # it needs torch

    try:
        found = PlansManager(plans).get_configuration(configuration).configuration
    except Exception as e:  # errors of many kinds: old plans, or what the configuration inherits from
        raise UserError(f"{file}: {within}cannot be read ({type(e).__name__}: {e}): {fix}") from None
    check(found, CONFIGURATION, file, fix, within)
    if min(found["spacing"], default=0) <= 0:
        raise UserError(f'{file}: {within}"spacing" is {found["spacing"]}, but must be above 0: {fix}')
    for key, values in {"patch_size": found["patch_size"], "batch_size": [found["batch_size"]]}.items():
        if min(values, default=0) < 1:
            raise UserError(f'{file}: {within}"{key}" is {found[key]}, but must be 1 or more: {fix}')
    if len(found["patch_size"]) != len(found["spacing"]):
        axes = len(found["spacing"])
        raise UserError(f'{file}: {within}"patch_size" is {found["patch_size"]}, but must have {axes} values: {fix}')
    if not found["data_identifier"]:
        raise UserError(f'{file}: {within}"data_identifier" is empty: {fix}')
    check_architecture(found, file, fix, within)


def check_architecture(configuration: dict, file: str | Path, fix: str, within: str = "") -> None:
    """Refuse a network that cannot be built, and unknown code, before anything is imported.

    Args:
        configuration: a configuration of the plans, with everything that it inherits.

    Raises:
        UserError: a key is missing or has another type; a class is neither nnU-Net's nor torch's nor of this package,
            and the user does not trust it; numbers of stages or axes differ; the strides do not divide the patch.
    """
    check(configuration, {"architecture": dict}, file, fix, within)
    about, within = configuration["architecture"], f"{within}architecture "
    check(about, ARCHITECTURE, file, fix, within)
    kwargs, patch = about["arch_kwargs"], configuration["patch_size"]
    check(kwargs, ARCHITECTURE_KWARGS, file, fix, within)
    parts = {key: kwargs.get(key) for key in about["_kw_requires_import"]}
    for key, name in {"network_class_name": about["network_class_name"], **parts}.items():
        known = NETWORKS if key == "network_class_name" else PARTS
        if name is not None and not (isinstance(name, str) and re.fullmatch(known, name)) and not is_trusted():
            raise UserError(
                f'{file}: {within}"{key}" is {name!r}, which is unknown code: {fix}; or, if you trust it,'
                f" export {TRUST}=1"
            )
    for key in PER_STAGE if "n_stages" in kwargs else ():
        value = kwargs.get(key)
        expected = kwargs["n_stages"] - (key == "n_conv_per_stage_decoder")
        if isinstance(value, list) and len(value) != expected:
            raise UserError(f'{file}: {within}"{key}" has {len(value)} values, but must have {expected}: {fix}')
    axes = re.search(r"Conv(\d)d$", str(kwargs.get("conv_op")))
    if axes and int(axes[1]) != len(patch):
        raise UserError(f'{file}: {within}"conv_op" has {axes[1]} axes, but "patch_size" has {len(patch)}: {fix}')
    strides = [s if isinstance(s, list) else [s] * len(patch) for s in kwargs.get("strides") or ()]
    if wrong := next((s for s in strides if len(s) != len(patch) or min(s) < 1), None):
        raise UserError(
            f'{file}: {within}"strides" has {wrong}, but must have {len(patch)} numbers of 1 or more: {fix}'
        )
    factors = [math.prod(axis) for axis in zip(*strides, strict=True)]
    if any(size % factor for size, factor in zip(patch, factors, strict=False)):
        raise UserError(
            f'{file}: "patch_size" is {patch}, but with these "strides" it must be divisible by {factors}: {fix}'
        )


def is_trusted() -> bool:
    """Whether the user trusts files that can run code."""
    return os.environ.get(TRUST) == "1"


def check_name(option: str, name: str) -> None:
    """Refuse a name of plans that cannot be part of a folder's name.

    Raises:
        UserError: the name is wrong. The message says which option gave it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        rule = "use letters, digits, - _ and . only, at most 100 of them, and begin with a letter or a digit"
        raise UserError(f"{option} {shown}: {rule}")
    if "__" in name:  # in TRAINER__PLANS__CONFIGURATION, the folder of a model
        raise UserError(f"{option} {name}: nnU-Net divides the names of folders at __: write a single _")
    if name in ("dataset", "dataset_fingerprint", "splits_final"):  # nnU-Net's own files beside the plans
        raise UserError(f"{option} {name}: nnU-Net itself uses the file {name}.json: choose another name")
