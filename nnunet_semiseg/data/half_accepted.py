"""Cases that `accept` is moving from unlabelled to labelled. A journal in the raw data set lists what is moved."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json

FOLDER, JOURNAL = ".accepted", "journal.json"
"""The raw data set has a folder `.accepted`, with a numbered folder for each call of `accept`. Each numbered folder has
a `journal.json`, which lists what this call moves and writes."""
DONE = "done"


def journals(dataset: Path) -> list[Path]:
    """The journal files of a raw data set, from the first to the last."""
    found = (dataset / FOLDER).glob(f"*/{JOURNAL}")
    return sorted(file for file in found if re.fullmatch(r"\d{4}", file.parent.name))


def refuse_half_accepted(dataset: Path) -> None:
    """Refuse a data set in which `nnunet_semiseg accept` was interrupted. A case may then be split between two folders.

    Raises:
        UserError: there is an unfinished or damaged journal.
    """
    for journal in journals(dataset):
        fix = "put it back as it was"
        if read_json(journal, fix).get("state") != DONE:
            number = dataset.name.removeprefix("Dataset")[:3]
            raise UserError(
                f"{journal}: nnunet_semiseg accept was interrupted: finish it with nnunet_semiseg accept -d {number}"
            )
