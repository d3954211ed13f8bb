"""Evaluate a test set, and store the metrics on disk."""

from __future__ import annotations

from pathlib import Path

from nnunet_semiseg.evaluation.metrics import evaluate_folder
from nnunet_semiseg.evaluation.request import Request, TestSet
from nnunet_semiseg.files import read_json, write_json


def evaluate(folder: Path, test_set: TestSet, request: Request, cache: Path) -> list[dict]:
    """Do the same as `evaluate_folder`, and store the result.

    The stored result is used until a file, the labels or the tolerance change.
    """
    ending = test_set.file_ending
    files = [place / f"{case}{ending}" for place in (folder, test_set.references) for case in test_set.images]
    key = {
        "tolerance": request.tolerance,
        "labels": test_set.labels,
        "files": [signature(file) for file in files if file.is_file()],
    }
    if cache.is_file() and (known := read_json(cache, "remove it")).get("key") == key:
        return known["rows"]
    rows = evaluate_folder(
        folder, test_set.references, test_set.labels, ending, test_set.reader, request.tolerance,
        cases=test_set.images, num_processes=request.num_processes,
    )  # fmt: skip
    cache.parent.mkdir(exist_ok=True)
    write_json({"key": key, "rows": rows}, cache)
    return rows


def signature(file: Path) -> list:
    """Name, size and time of a file. If a later file with this name has the same values, it counts as the same file."""
    about = file.stat()
    return [file.name, about.st_size, about.st_mtime_ns]
