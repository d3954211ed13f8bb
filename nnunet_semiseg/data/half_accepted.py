"""Cases on their way from unlabelled to labelled: a journal in the raw data set says what is being moved."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json

FOLDER, JOURNAL = ".accepted", "journal.json"
"""in the raw data set: a numbered folder for each time that cases were accepted, and the file that says what is done"""
DONE = "done"


def journals(dataset: Path) -> list[Path]:
    """The journals of a raw data set, from the first to the last."""
    found = (dataset / FOLDER).glob(f"*/{JOURNAL}")
    return sorted(file for file in found if re.fullmatch(r"\d{4}", file.parent.name))


def refuse_half_accepted(dataset: Path) -> None:
    """Raises UserError where `nnunet_semiseg accept` was interrupted: a case may be between two folders."""
    for journal in journals(dataset):
        fix = "put it back as it was"
        if read_json(journal, fix).get("state") != DONE:
            number = dataset.name.removeprefix("Dataset")[:3]
            raise UserError(
                f"{journal}: cases were being accepted or taken back, and that was interrupted: end it with"
                f" nnunet_semiseg accept -d {number}"
            )
