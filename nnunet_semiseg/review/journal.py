"""Change many files completely or not at all. A journal lists all steps before the first file is changed.

Each step of a journal can be repeated, or undone, without harm. A process that is killed leaves the journal; the next
process continues the work, or the undoing, from there. Paths are written as `raw/...` and `preprocessed/...`, so that
nnU-Net's folders can be moved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_semiseg.data.half_accepted import DONE, FOLDER, JOURNAL, journals
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json, write_json
from nnunet_semiseg.schema import check

GOING, UNDOING = "going", "undoing"
SHAPE = {"state": str, "steps": list[list[str]], "cases": dict[str, str]}
BEFORE, AFTER = "before", "after"
"""Folders beside a journal, for the content of the written files before and after the change."""

Roots = Mapping[str, Path]
"""The folders of the data set: the raw one under the name `raw`, the preprocessed one under `preprocessed`."""


def resolve(place: str, roots: Roots) -> Path:
    """Turn `raw/...` or `preprocessed/...` into a path."""
    root, _, rest = place.partition("/")
    return roots[root] / rest


@dataclass
class Staging:
    """All that is prepared before a change. It has no effect until `commit` is called.

    Attributes:
        number: four digits. They are the name of the folder of this change in both roots.
        steps: `move SOURCE TARGET` and `write FILE`, in the order in which they are done.
    """

    roots: Roots
    number: str
    steps: list[list[str]] = field(default_factory=list)

    @classmethod
    def begin(cls, roots: Roots) -> Staging:
        """Start an empty change. It has the next free number."""
        last = max((int(file.parent.name) for file in journals(roots["raw"])), default=0)
        staging = cls(roots, f"{last + 1:04d}")
        for root in ("raw", "preprocessed"):
            if root == "raw" or roots[root].is_dir():
                shutil.rmtree(staging.folder(root), ignore_errors=True)
                staging.folder(root).mkdir(parents=True)
        return staging

    def folder(self, root: str) -> Path:
        """The folder for the new files of this change. In `raw` it gets its final name by `commit`."""
        return self.roots[root] / FOLDER / (f"{self.number}.tmp" if root == "raw" else self.number)

    def move(self, source: str, target: str) -> None:
        """Plan to move a file, within one root."""
        self.steps.append(["move", source, target])

    def take_in(self, root: str, name: str, target: str) -> Path:
        """The path at which to make a new file below `folder(root)`. The change will move it to `target`."""
        file = self.folder(root) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        self.move(f"{root}/{FOLDER}/{self.number}/{name}", target)
        return file

    def put_away(self, root: str, name: str, source: str) -> None:
        """Plan to move a file into the folder of this change, under `name`."""
        self.move(source, f"{root}/{FOLDER}/{self.number}/{name}")

    def new_content(self, place: str) -> Path:
        """The path at which to write the new content of the file `place`."""
        before, after = (self.folder("raw") / kind / place for kind in (BEFORE, AFTER))
        for file in (before, after):
            file.parent.mkdir(parents=True, exist_ok=True)
        if (current := resolve(place, self.roots)).is_file():
            shutil.copy2(current, before)
        self.steps.append(["write", place])
        return after

    def write(self, place: str, content: dict | list) -> None:
        """Plan to write this content into a JSON file."""
        write_json(content, self.new_content(place))

    def commit(self, cases: Mapping[str, str]) -> Path:
        """Make the change valid, and return its journal. From now on this process or a later one will carry it out.

        Args:
            cases: where the label of each case comes from: `human`, `corrected` or `prediction`.
        """
        journal = {"state": GOING, "steps": self.steps, "cases": dict(cases)}
        write_json(journal, self.folder("raw") / JOURNAL)
        final = self.roots["raw"] / FOLDER / self.number
        os.rename(self.folder("raw"), final)
        return final / JOURNAL


def finish(journal: Path, roots: Roots) -> str:
    """Complete a change, or the undoing of it, as its state says. Returns the state.

    Raises:
        UserError: a file is neither at its old place nor at its new one; or the journal is damaged.
    """
    content = read_journal(journal)
    state, steps = content["state"], content["steps"]
    if state == UNDOING:
        for step in reversed(steps):
            _back(step, journal.parent, roots)
        _remove(journal, roots)
    elif state == GOING:
        for step in steps:
            _forth(step, journal.parent, roots)
        write_json(content | {"state": DONE}, journal)
    return state


def recover(roots: Roots, say: Callable[[str], None] = print) -> bool:
    """Complete changes that another process has not finished, and remove changes that were only prepared.

    Returns:
        Whether there was something to finish.
    """
    numbers = {journal.parent.name for journal in journals(roots["raw"])}
    for root in roots.values():
        for folder in (root / FOLDER).glob("*"):
            if folder.name not in numbers:
                shutil.rmtree(folder)
        _remove_empty(root / FOLDER)
    found = False
    for journal in journals(roots["raw"]):
        content = read_journal(journal)
        if (state := content["state"]) != DONE:
            found = True
            finish(journal, roots)
            what = "taken back" if state == UNDOING else "accepted"
            say(f"an interrupted command was finished: {', '.join(sorted(content['cases']))}: {what}")
    return found


def undo(journal: Path, roots: Roots, say: Callable[[str], None] = print) -> None:
    """Undo a change. If preprocessed data was changed after it, only the raw data is restored, and a line says so.

    Raises:
        UserError: a file of the raw data set was changed after it.
    """
    content = read_journal(journal)
    stale = [step for step in content["steps"] if not _is_as_done(step, journal.parent, roots)]
    if raw := [step[-1] for step in stale if step[-1].startswith("raw/")]:
        file, copy = resolve(raw[0], roots), journal.parent / AFTER / raw[0]
        place = f" (a copy is {copy})" if copy.is_file() else ""
        raise UserError(
            f"{file}: was changed or removed after accept: put back what accept wrote{place}, then undo again"
        )
    kept = [step for step in content["steps"] if not (stale and step[-1].startswith("preprocessed/"))]
    if stale:
        say(
            f"{resolve(stale[0][-1], roots)}: was changed since: only raw data is restored: run nnunet_semiseg"
            " plan_and_preprocess again"
        )
    write_json(content | {"state": UNDOING, "steps": kept}, journal)
    finish(journal, roots)


def read_journal(journal: Path) -> dict:
    """Read and check a journal. Raises UserError if it is damaged."""
    fix = f"restore the old file, or move the files by hand and remove {journal.parent}"
    content = read_json(journal, fix)
    check(content, SHAPE, journal, fix)
    return content


def _forth(step: list[str], folder: Path, roots: Roots) -> None:
    kind, *places = step
    if kind == "move":
        source, target = (resolve(place, roots) for place in places)
        _move(source, target)
    else:
        _copy(folder / AFTER / places[0], places[0], folder.name, roots)


def _back(step: list[str], folder: Path, roots: Roots) -> None:
    kind, *places = step
    if kind == "move":
        source, target = (resolve(place, roots) for place in places)
        if FOLDER in source.parts and not os.path.lexists(target):
            return  # a new file, which is removed already
        _move(target, source)
    elif (folder / BEFORE / places[0]).is_file():
        _copy(folder / BEFORE / places[0], places[0], folder.name, roots)
    else:
        resolve(places[0], roots).unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    if os.path.lexists(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    elif not os.path.lexists(target):
        raise UserError(f"{source}: no such file, and it is not at {target} either: put it back and run accept again")


def _copy(source: Path, place: str, number: str, roots: Roots) -> None:
    """Replace the content of a file by that of another.

    While the copy is incomplete, it has another name. So a killed process leaves no damaged file.
    """
    half, target = resolve(f"{place.partition('/')[0]}/{FOLDER}/{number}/half", roots), resolve(place, roots)
    for file in (half, target):
        file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, half)  # with its time, by which a training recognises a label
    os.replace(half, target)


def _is_as_done(step: list[str], folder: Path, roots: Roots) -> bool:
    kind, *places = step
    file = resolve(places[-1], roots)
    if kind == "move":
        return os.path.lexists(file)
    return file.is_file() and _says_the_same(file.read_bytes(), (folder / AFTER / places[0]).read_bytes())


def _says_the_same(now: bytes, then: bytes) -> bool:
    """Whether a file still has the content that was written.

    Of a record of cases only the plans and the names of the cases are compared, because a training updates its times.
    """
    if now == then:
        return True
    try:
        contents = [json.loads(content) for content in (now, then)]
        a, b = ((content["plans_hash"], content["cases"].keys()) for content in contents)
        return a == b
    except (ValueError, KeyError, TypeError, AttributeError):  # these are not two records
        return False


def _remove(journal: Path, roots: Roots) -> None:
    """Remove the folders of an undone change. The journal's is renamed first, so that nobody reads it half removed."""
    number = journal.parent.name
    shutil.rmtree(roots["preprocessed"] / FOLDER / number, ignore_errors=True)
    gone = journal.parent.with_name(f"{number}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(journal.parent, gone)
    shutil.rmtree(gone)
    for root in roots.values():
        _remove_empty(root / FOLDER)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
