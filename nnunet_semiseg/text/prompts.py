"""The classes of a data set, and the prompts that describe them."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.schema import DATASET_SECTION, read_dataset_json


def class_names(dataset_json: dict, source: str = "dataset.json") -> list[str]:
    """The names of the K classes: first the background, then the classes in the order of nnU-Net's heads.

    Heads are in the order of the label values or, for regions, in the order of the regions in ``dataset.json``
    (nnunetv2 ``LabelManager``). The ignore label has no head. For regions the background has no head either, but its
    name still comes first.

    Args:
        source: how messages name the file.

    Raises:
        UserError: not exactly one label has the value 0; or two labels have the same value (this is not checked for
            regions).
    """
    labels = {k: _values(v) for k, v in dataset_json["labels"].items() if k != "ignore"}
    background = [name for name, values in labels.items() if set(values) == {0}]
    if len(background) != 1:
        raise UserError(f'{source}: exactly one label must have the value 0: fix "labels"')
    foreground = [name for name in labels if name not in background]
    if all(len(values) == 1 for values in labels.values()):
        if len(set(labels.values())) < len(labels):
            raise UserError(f'{source}: two labels have the same value: fix "labels"')
        foreground.sort(key=labels.get)
    return background + foreground


def read_prompts(dataset_json: dict, source: str = "dataset.json") -> dict[str, tuple[str, ...]]:
    """The prompts of every class, in the order of :func:`class_names`.

    They are in the optional key ``"semiseg": {"prompts": {class: text or [text, ...]}}`` of ``dataset.json``. Without
    this key, the name of a class is its prompt. With it, every class but the background needs a prompt.

    Args:
        dataset_json: the content of ``dataset.json``.
        source: how messages name the file.

    Raises:
        UserError: there is a prompt for a class that does not exist (the message names similar classes); a foreground
            class has no prompt; a prompt is empty; a value has the wrong type; the key ``prompts`` is misspelt; or see
            :func:`class_names`.
    """
    names = class_names(dataset_json, source)
    given = _given_prompts(dataset_json, source)
    if given is None:
        return {name: (name,) for name in names}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the classes are {', '.join(names)}"
            raise UserError(f'{source}: there is a prompt for "{name}", but no such class: {hint}')
    return {name: _texts(name, given, source, optional=name == names[0]) for name in names}


def check_prompts_are_current(dataset_name: str, dataset_json: dict) -> None:
    """Refuse prompts in the raw dataset that were changed after nnU-Net's planning copied its `dataset.json`.

    Raises:
        UserError: the prompts differ, or are wrong in one of the two files. Without raw data nothing is checked.
    """
    raw = Path(os.environ.get("nnUNet_raw") or "", dataset_name, "dataset.json")
    if not os.environ.get("nnUNet_raw") or not raw.is_file():
        return
    copy = Path(os.environ["nnUNet_preprocessed"], dataset_name, "dataset.json")
    if read_prompts(read_dataset_json(raw.parent), str(raw)) != read_prompts(dataset_json, str(copy)):
        raise UserError(f"{raw}: its prompts are no longer those in {copy}, which training uses: copy the file there")


def _values(label: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(v) for v in label) if isinstance(label, (list, tuple)) else (int(label),)


def _given_prompts(dataset_json: dict, source: str) -> dict | None:
    section = dataset_json.get(DATASET_SECTION, {})
    if not isinstance(section, dict):
        raise UserError(f'{source}: "{DATASET_SECTION}" must be like {{"prompts": {{"CLASS": "TEXT"}}}}')
    if "prompts" not in section:
        near = difflib.get_close_matches("prompts", section, n=1, cutoff=0.8)
        if near:  # a wrong letter in the key must not silently replace the prompts by the names of the classes
            raise UserError(f'{source}: unknown key "{near[0]}" in "{DATASET_SECTION}": rename it to "prompts"')
        return None
    if not isinstance(section["prompts"], dict):
        raise UserError(f'{source}: "prompts" must map each class to a text or to a list of texts')
    return section["prompts"]


def _texts(name: str, given: dict, source: str, optional: bool) -> tuple[str, ...]:
    if name not in given:
        if optional:
            return (name,)
        raise UserError(f'{source}: class "{name}" has no prompt: add "{name}": "TEXT" to "prompts"')
    value = given[name]
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f'{source}: prompt of "{name}": {json.dumps(value)} is not a text or a list of texts')
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f'{source}: the prompt of "{name}" is empty: write a text that names the class')
    return tuple(text.strip() for text in texts)
