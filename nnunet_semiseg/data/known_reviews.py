"""Where the reviews of a dataset are: in the folder `review` of its results, or where `review -o` has written them."""

from __future__ import annotations

from pathlib import Path

from nnunet_semiseg.files import make_folder, only_one, read_json, write_json

REVIEWS, PAGE = "review", "review.html"
"""The folder below the results of a dataset that holds its reviews, and the page of a review."""
ELSEWHERE = "elsewhere.json"
"""A file in the folder `REVIEWS`: the model of each review that was written with `-o`, by the path of the review."""


def known_reviews(results: Path) -> dict[Path, str]:
    """The model of each review of a dataset, by the folder of the review. The review with the newest page is the last.

    A review that has no page yet comes first. Folders that are gone are left out.

    Args:
        results: the folder of the dataset in ``nnUNet_results``.

    Raises:
        UserError: the file with the other folders is damaged.
    """
    own = {folder: folder.name for folder in (results / REVIEWS).glob("*") if folder.is_dir()}
    others = {Path(folder): model for folder, model in _elsewhere(results).items() if Path(folder).is_dir()}
    found = own | others
    return {folder: found[folder] for folder in sorted(found, key=lambda folder: (_time(folder / PAGE), folder))}


def remember(results: Path, folder: Path, model: str) -> None:
    """Make a review known, if it lies elsewhere than the others.

    Args:
        model: the name that its folder would have beside the others.

    Raises:
        UserError: the disk is full or read-only, the file with the other folders is damaged, or another process has
            locked it for a minute.
    """
    folder, own = folder.resolve(), (results / REVIEWS).resolve()
    if folder.parent == own:
        return
    make_folder(own)
    with only_one(own / f".{ELSEWHERE}.lock", "ends a review of this dataset", wait=60):
        write_json(_elsewhere(results) | {str(folder): model}, own / ELSEWHERE)


def _elsewhere(results: Path) -> dict[str, str]:
    file = results / REVIEWS / ELSEWHERE
    return read_json(file, "remove it, then accept knows only reviews without -o") if file.exists() else {}


def _time(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0
