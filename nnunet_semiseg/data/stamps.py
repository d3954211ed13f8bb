"""Stamps of files. With a stamp, a later command sees whether a file has changed, without reading it.

A stamp is `[name, size, mtime, ctime, digest]`, with times in nanoseconds. If size and both times are the same, the
file is taken to be the same and is not opened. `cp -p`, rsync or unzip can give a file an old mtime, but not an old
ctime: the system sets the ctime whenever content, name or owner changes. So every change is seen, and nothing is read,
as long as the files stay where they are. If a time differs (a copied data set, a `touch`, a hard link), the whole
content is compared. A hash of some blocks would be faster, but could miss a voxel that changed in between.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

Stamp = list  # JSON has no tuples
STAMP = ("name", "size", "mtime", "ctime", "digest")


def digest(file: str | Path) -> str:
    """A hash of a file's content."""
    content = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def stamp(file: str | Path) -> Stamp:
    """The stamp of a file as it is now. The file is read."""
    s = os.stat(file)  # before reading: a file that changes meanwhile will have another time
    return [os.path.basename(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, digest(file)]


def renewed(old: Stamp, file: str | Path, may_read: bool = True) -> Stamp | None:
    """The stamp with the present times of the file if its content has not changed, else None.

    Args:
        may_read: whether the file may be opened. If not, only size and mtime are compared, but not the ctime, because
            every copy changes the ctime.

    Raises:
        FileNotFoundError: there is no such file.
    """
    s = os.stat(file)
    name, size, mtime, ctime, content = old
    if (os.path.basename(file), s.st_size) != (name, size):
        return None
    if (s.st_mtime_ns, s.st_ctime_ns) != (mtime, ctime):
        same = digest(file) == content if may_read else s.st_mtime_ns == mtime
        if not same:
            return None
    return [name, size, s.st_mtime_ns, s.st_ctime_ns, content]


def all_renewed(old: list[Stamp], files: Sequence[str | Path], may_read: bool = True) -> list[Stamp] | None:
    """The results of `renewed` for several files. None if a file has changed, or if there are more or fewer files."""
    if len(old) != len(files):
        return None
    stamps = []
    for stamp_, file in zip(old, files, strict=True):
        now = renewed(stamp_, file, may_read)
        if now is None:
            return None
        stamps.append(now)
    return stamps
