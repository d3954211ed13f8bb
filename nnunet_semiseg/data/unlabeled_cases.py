"""The raw unlabelled cases: image files in the folder ``imagesUn``."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nnunet_semiseg.data.image_problems import IMAGES_FOLDER, header_problems
from nnunet_semiseg.data.labeled_cases import channel_names, labeled_images
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.parallel import DELAY

READERS = 16
"""The number of threads that look at files. They mostly wait for the disk, which is often on a network."""
_ADD_OR_TAKE_OUT = f"add the file or take its case out of {IMAGES_FOLDER}"


def find_unlabeled_cases(raw_dataset_folder: str | Path, dataset_json: dict, or_else: str = "") -> dict[str, list[str]]:
    """The image files of each unlabelled case, by its name. Each case has as many files as a labelled case.

    Args:
        or_else: what the user can do without unlabelled images, for the message that there are none.

    Raises:
        UserError: ``imagesUn`` is missing or has no images; a folder or a link to nothing is among them; the name of a
            file has no channel; a case has too few or too many channels; a labelled case has the same name; see also
            `labeled_images`. There is one line for each problem.
    """
    folder, ending = Path(raw_dataset_folder) / IMAGES_FOLDER, dataset_json["file_ending"]
    put = f"put the unlabelled images there, named CASE_0000{ending}{or_else}"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: make it and {put}")
    with os.scandir(folder) as entries:  # `is_dir` asks the disk again only for links
        found = {e.name: e for e in entries if not e.name.startswith(".")}
    if folders := sorted(name for name, e in found.items() if name.endswith(ending) and e.is_dir()):
        raise UserError("\n".join(f"{folder / name}: is a folder, not an image: remove it" for name in folders))
    there = {name: e for name, e in found.items() if not e.is_dir()}
    files = sorted(there)
    images = [name for name in files if name.endswith(ending)]
    if not images:
        found = f"has no *{ending} among its {len(files)} files (the first is {files[0]})" if files else "is empty"
        raise UserError(f"{folder}: {found}: {put}")

    labeled_cases = labeled_images(raw_dataset_folder, dataset_json)
    channels = max(map(len, labeled_cases.values()), default=len(channel_names(dataset_json)))
    cases: dict[str, dict[int, Path]] = {}
    problems = []
    for name in images:
        match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", name)
        if there[name].is_symlink() and not there[name].is_file():
            problems.append(f"{folder / name}: a link to a file that does not exist: fix it or remove it")
        if match:
            cases.setdefault(match[1], {})[int(match[2])] = folder / name
        else:
            problems.append(f"{folder / name}: its name has no channel: rename it to CASE_0000{ending}")
    for case, found in cases.items():
        for c in range(channels):
            if c not in found:
                missing = folder / f"{case}_{c:04d}{ending}"
                problems.append(f"{missing}: no such file, but {case} needs {channels} channels: {_ADD_OR_TAKE_OUT}")
        for c in found:
            if c >= channels:
                problems.append(f"{found[c]}: labelled cases have only {channels} channels: remove this file")
        if case in labeled_cases:
            problems.append(f"{folder / case}_*{ending}: {case} is a labelled case too: remove it from {IMAGES_FOLDER}")
    if problems:
        raise UserError("\n".join(problems))
    return {case: [str(found[c]) for c in range(channels)] for case, found in sorted(cases.items())}


def check_headers(cases: dict[str, list[str]], reader: type) -> None:
    """Check the headers of all unlabelled images. Voxels are not read.

    Args:
        reader: nnU-Net's reader of the images. Only for its `SimpleITKIO` the geometries are compared.

    Raises:
        UserError: a header cannot be read or trusted, or the channels of a case have different geometries. There is one
            line for each problem.
    """
    with ThreadPoolExecutor(READERS) as threads:
        found = threads.map(lambda images: header_problems(images, reader), cases.values())
        problems = [line for lines in tqdm(found, "Headers", len(cases), delay=DELAY) for line in lines]
    if problems:
        raise UserError("\n".join(problems))
