"""`texts.json`: a text for each case, such as a report or a caption, for the methods that use one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json

TEXTS_FILE = "texts.json"
FIX = 'write {"case id": "text", ...} into it'


def read_texts(dataset_name: str, cases: Iterable[str], missing: Literal["error", "skip"] = "error") -> dict[str, str]:
    """Read the texts of these cases, from the texts.json of the raw dataset, or else of the preprocessed one.

    Args:
        cases: their names, without file endings and channel numbers. Other cases of the dataset may have texts, too.
        missing: what to do with a case that has no text or an empty one: raise an error (`error`), or leave out the
            case (`skip`).

    Returns:
        For each case its text, without white space around it.

    Raises:
        UserError: the file is missing; a case has no text, or, with `skip`, none has one; a name is not that of a case
            (the message names similar ones); a value is not a text.
    """
    file = texts_file(dataset_name)
    content = read_json(file, FIX)
    cases = set(cases)
    images = _raw_cases(file.parent)
    known = cases | images
    for name, text in content.items():
        if images and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f": did you mean {' or '.join(near)}?" if near else ": remove it"
            raise UserError(f'{file}: there is a text for "{name}", but the dataset has no such case{hint}')
        if not isinstance(text, str):
            raise UserError(f'{file}: "{name}": {text!r} is not a text: {FIX}')
    texts = {case: content[case].strip() for case in sorted(cases) if content.get(case, "").strip()}
    if missing == "error" and (without := sorted(cases - texts.keys())):
        what = "an empty text" if without[0] in content else "no text"
        more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        raise UserError(f'{file}: has {what} for case "{without[0]}"{more}: add it, or use --set missing_texts=skip')
    if not texts:
        raise UserError(f"{file}: no case has a text: {FIX}")
    return texts


def has_texts(dataset_name: str) -> bool:
    """Whether there is a texts.json, in the raw or in the preprocessed dataset."""
    return texts_file(dataset_name).is_file()


def texts_file(dataset_name: str) -> Path:
    """The texts.json of a dataset: the raw one if it exists, else the preprocessed one."""
    folders = [Path(os.environ[v], dataset_name) for v in ("nnUNet_raw", "nnUNet_preprocessed") if os.environ.get(v)]
    files = [folder / TEXTS_FILE for folder in folders]
    return next((f for f in files if f.is_file()), files[0])


def _raw_cases(raw: Path) -> set[str]:
    """The names of all cases in a raw dataset. A preprocessed dataset has no images, so the result is empty."""
    parts = ("imagesTr", "imagesUn", "imagesTs")
    return {file.name.rpartition("_0000")[0] for part in parts for file in (raw / part).glob("*_0000.*")}
