"""nnU-Net's folders, and JSON files that are read with a clear error and written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_semiseg.errors import UserError

DATASET_JSON_GUIDE = "write it as nnU-Net's documentation/dataset_format.md says"


def dataset_folder(variable: str, dataset: int | str) -> Path:
    """A dataset's folder below ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results``.

    Raises:
        UserError: the variable is not set; no such dataset, or several of that number.
    """
    base = base_folder(variable)
    try:
        return base / str(maybe_convert_to_dataset_name(dataset))
    except ValueError:
        raise UserError(f"dataset {dataset}: give its number or its name, 501 or Dataset501_LA") from None
    except RuntimeError as e:
        what = "several datasets have" if "More than one" in str(e) else "no dataset has"
        raise UserError(f"dataset {dataset}: {what} this number: look into {variable}={base}") from None


def base_folder(variable: str) -> Path:
    """The folder that ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results`` names."""
    base = os.environ.get(variable)
    if not base:
        guide = "see nnU-Net's documentation/setting_up_paths.md"
        raise UserError(f"{variable} is not set: export {variable}=FOLDER ({guide})")
    return Path(base).absolute()


def read_json(file: Path, fix: str) -> dict:
    """Raises UserError where the file is missing or no JSON."""
    try:
        return json.loads(file.read_bytes())  # as bytes: always UTF-8, whatever the locale (reading DICOM changes it)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: {fix}") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}): {fix}") from None
    except ValueError as e:  # no JSON, or no UTF-8
        raise UserError(f"{file}: not valid JSON ({e}): {fix}") from None


def read_dataset_json(dataset: Path) -> dict:
    """A raw dataset's `dataset.json`, with the keys that nnU-Net cannot do without.

    Raises:
        UserError: missing, no JSON, or not what nnU-Net's documentation says.
    """
    file = dataset / "dataset.json"
    content = read_json(file, DATASET_JSON_GUIDE)
    if not isinstance(content, dict):
        raise UserError(f"{file}: is no JSON object: {DATASET_JSON_GUIDE}")
    for key in ("labels", "file_ending", "channel_names"):
        if key not in content and not (key == "channel_names" and "modality" in content):
            raise UserError(f'{file}: has no "{key}": {DATASET_JSON_GUIDE}')
    for name, value in content["labels"].items():
        if not all(isinstance(v, int) for v in (value if isinstance(value, list) else [value])):
            raise UserError(f'{file}: label "{name}": {value!r} is no whole number: {DATASET_JSON_GUIDE}')
    return content


def write_json(content: dict | list, file: Path) -> None:
    """Write the whole file or nothing."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=4))
    os.replace(temporary, file)
