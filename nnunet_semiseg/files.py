"""nnU-Net's folders, and JSON files that are read with a clear error and written whole."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_semiseg.errors import UserError


def dataset_folder(variable: str, dataset: int | str) -> Path:
    """A dataset's folder below ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results``.

    Raises:
        UserError: the variable is not set; no such dataset, or several of that number.
    """
    base = base_folder(variable)
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except ValueError:
        raise UserError(f"dataset {dataset}: give its number or its name, 501 or Dataset501_LA") from None
    except RuntimeError as e:
        what = "several datasets have" if "More than one" in str(e) else "no dataset has"
        raise UserError(f"dataset {dataset}: {what} this number: look into {variable}={base}") from None
    if not re.fullmatch(r"Dataset\d{3}_[^/\\]+", name):  # nnU-Net reads three digits: it takes 1500 for 150
        raise UserError(
            f"dataset {dataset}: {name} is no name like Dataset501_LA, with three digits: rename its folder"
        )
    return base / name


def base_folder(variable: str) -> Path:
    """The folder that ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results`` names."""
    base = os.environ.get(variable)
    if not base:
        guide = "see nnU-Net's documentation/setting_up_paths.md"
        raise UserError(f"{variable} is not set: export {variable}=FOLDER ({guide})")
    if base.startswith(("~", "$", '"', "'")) or base.endswith(('"', "'")):  # nnU-Net would make a folder of this name
        raise UserError(f"{variable}={base}: no shell has read the ~, $ or quotes: export the plain path")
    return Path(base).absolute()


def folder_for(output: str | Path) -> Path:
    """The folder that `-o` names. Raises UserError where it, or what is above it, is a file."""
    output = Path(output).absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file: name a folder with -o")
    return output


def read_json(file: Path, fix: str, kind: type = dict) -> Any:
    """The content of a JSON file: an object, or with `kind=list` a list.

    Raises:
        UserError: the file is missing, no JSON, not in UTF-8, has a key twice or is of another kind.
    """
    try:
        # as bytes: always UTF-8, whatever the locale (reading DICOM changes it)
        content = json.loads(_utf8(file.read_bytes()), object_pairs_hook=_no_key_twice)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: {fix}") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}): {fix}") from None
    except RecursionError:
        raise UserError(f"{file}: not valid JSON (too many brackets within each other): {fix}") from None
    except ValueError as e:  # no JSON, or no UTF-8
        raise UserError(f"{file}: not valid JSON ({e}): {fix}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: is no JSON {'object' if kind is dict else 'list'}: {fix}")
    return content


def _utf8(content: bytes) -> str:
    """nnU-Net refuses what an editor on Windows may put in front of a text; so that it says why, we do, too."""
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without BOM")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16: save it as UTF-8")
    return content.decode("utf-8")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    """Of two values Python would take the last one without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{twice}" is there twice')
    return content


def write_json(content: dict | list, file: Path) -> None:
    """Write the whole file or nothing."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=4))
    os.replace(temporary, file)
