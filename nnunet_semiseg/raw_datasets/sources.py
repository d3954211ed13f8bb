"""Functions with which the modules of data sets find their cases: files, published lists and random lists."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from nnunet_semiseg.errors import UserError

JUNK = (".", "__MACOSX", "~$")


def published_split(name: str) -> dict:
    """Read the published lists of case names, by part, from `dataset_conversion/splits`."""
    file = resources.files("nnunet_semiseg.dataset_conversion") / "splits" / f"{name}.json"
    return json.loads(file.read_bytes())


def seeded_split(names: Iterable[str], test: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Divide cases at random, but always alike, if there is no published list. Returns training cases and test cases.

    Cases are sorted by a hash of their name. So a missing case does not change the order of the others.

    Args:
        test: the share of the test cases.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    n = round(test * len(order))
    return order[n:], order[:n]


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Find files and folders below a folder, at any depth, whose path ends as the pattern says. They are sorted.

    Args:
        pattern: a pattern such as `*.tif`, or with folders, such as `imagesTr/lung_*.nii.gz`.

    Links to folders are followed. Files that a Mac or an office program adds are ignored: `__MACOSX`, `._x`, `~$x`, and
    hidden files.
    """
    found, seen = [], {os.path.realpath(folder)}
    for directory, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(directory, name)) for name in folders}
        folders[:] = [name for name in folders if not name.startswith(JUNK) and real[name] not in seen]
        seen |= {real[name] for name in folders}  # a link may lead back to a folder above it
        paths = (Path(directory, name) for name in (*folders, *files) if not name.startswith(JUNK))
        found += [path for path in paths if path.match(pattern)]
    return sorted(found)


def by_name(found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """The paths by the names of their cases, sorted.

    Raises:
        UserError: a case appears twice. The message names both paths.
    """
    paths: dict[str, Path] = {}
    for name, path in sorted(found):
        if name in paths:
            raise UserError(f"{path}: case {name} appears twice, also as {paths[name]}: remove one of them")
        paths[name] = path
    return paths
