"""The manifest: the list of the preprocessed unlabelled cases, from which a training takes its cases.

The folder ``<data_identifier>__unlabeled`` holds the preprocessed cases. The manifest is the file
``<data_identifier>__unlabeled.json`` beside this folder. It lists the cases, with the stamps (name, size, times,
hash) of their images and of their preprocessed files. It is written last. So if it exists, every case in it is
complete.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tqdm import tqdm

from nnunet_semiseg.data.image_problems import IMAGES_FOLDER
from nnunet_semiseg.data.plans_hash import plans_hash
from nnunet_semiseg.data.preprocessed import DAMAGED, SUFFIXES, case_files, preprocess_unlabeled_again
from nnunet_semiseg.data.stamps import STAMP, Stamp, all_renewed, renewed
from nnunet_semiseg.data.unlabeled_cases import find_unlabeled_cases
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json, write_json
from nnunet_semiseg.parallel import DELAY
from nnunet_semiseg.schema import check, read_dataset_json, resolved

ENDING = "__unlabeled"
"""The name of the folder with the unlabelled cases is that of the folder with the labelled ones, plus this."""
MANIFEST = {"plans_hash": str, "cases": dict[str, dict]}


def load_manifest(
    preprocessed_dataset_folder: str | Path, plans: dict, configuration: str, dataset: int | str
) -> tuple[str, list[str]]:
    """Find the folder of the preprocessed unlabelled cases and their names, for the trainer.

    Args:
        dataset: the number or the name of the dataset, for the message.

    Raises:
        UserError: the cases are not preprocessed for these plans and images, or a file is missing or damaged. The
            message names the command that fixes it.
    """
    preprocessed = Path(preprocessed_dataset_folder)
    folder, manifest_file = output_of(preprocessed, plans, configuration)
    plans_name = plans["plans_name"]
    fix = preprocess_unlabeled_again(plans | {"dataset_name": dataset}, configuration)
    # a computer that trains need not have the raw data
    raw = Path(os.environ["nnUNet_raw"]) / preprocessed.name if os.environ.get("nnUNet_raw") else None
    images = raw / IMAGES_FOLDER if raw and raw.is_dir() else None
    if not manifest_file.is_file():
        if images and not images.is_dir():
            fix = f"put the unlabelled images into {images}, then {fix}"
        raise UserError(
            f"{manifest_file}: no such file, because the unlabelled cases are not (all) preprocessed: {fix}"
        )
    manifest = read_json(manifest_file, fix)
    check(manifest, MANIFEST, manifest_file, fix)
    if not _is_whole(manifest):
        raise UserError(f"{manifest_file}: damaged, or written by another version of nnunet_semiseg: {fix}")
    if manifest["plans_hash"] != plans_hash(plans, configuration):
        raise UserError(f"{folder}: was preprocessed with other plans: {plans_name} have changed since then: {fix}")
    entries = {case: dict(entry) for case, entry in manifest["cases"].items()}
    # it takes long if the files were copied, because then they are read; None: a bar only on a terminal
    for case, entry in tqdm(entries.items(), "Unlabelled cases", delay=DELAY, disable=None):
        entry["made"] = [_unchanged(*pair, fix) for pair in zip(entry["made"], case_files(folder, case), strict=True)]
    if raw and images and images.is_dir():
        found = find_unlabeled_cases(raw, read_dataset_json(raw))
        for case in sorted(found.keys() ^ entries.keys()):
            what = "is new and not preprocessed" if case in found else "was preprocessed but is missing now"
            raise UserError(f"{images}: case {case} {what}: {fix}")
        for case, files in found.items():
            entries[case]["images"] = now = all_renewed(entries[case]["images"], files)
            if now is None:
                raise UserError(f"{images}: the images of case {case} have changed since they were preprocessed: {fix}")
    if entries != manifest["cases"]:  # files were copied: so that the next start does not have to read them again
        with contextlib.suppress(UserError):  # it is not needed, so it does not matter if it cannot be written
            write_json(manifest | {"cases": entries}, manifest_file)
    return str(folder), list(entries)


def output_of(preprocessed: Path, plans: dict, configuration: str) -> tuple[Path, Path]:
    """The folder for the preprocessed unlabelled cases, and the path of its manifest."""
    name = resolved(plans, configuration)["data_identifier"] + ENDING
    return preprocessed / name, preprocessed / f"{name}.json"


def _is_whole(manifest: dict) -> bool:
    """Whether each case in the manifest has all its stamps."""
    try:
        entries = manifest["cases"].values()
        return all(
            entry["images"] and len(entry["made"]) == len(SUFFIXES) and all(len(s) == len(STAMP) for s in stamps)
            for entry in entries
            for stamps in (entry["images"], entry["made"])
        )
    except (AttributeError, KeyError, TypeError):
        return False


def recorded_cases(manifest_file: Path) -> dict[str, dict]:
    """The entries of a manifest, by case. There are none if the file is missing or damaged."""
    with contextlib.suppress(UserError):
        manifest = read_json(manifest_file, "")
        return manifest["cases"] if _is_whole(manifest) else {}
    return {}


def _unchanged(old: Stamp, file: Path, fix: str) -> Stamp:
    """Return the stamp of a preprocessed file with its present times, if its content has not changed; see `renewed`.

    Raises:
        UserError: the file is missing, or its content has changed.
    """
    try:
        if (now := renewed(old, file)) is not None:
            return now
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: {fix}") from None
    raise UserError(f"{file}: {DAMAGED}: {fix}")
