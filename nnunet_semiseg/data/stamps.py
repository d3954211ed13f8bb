"""What is kept of a file, so that a later command notices that it has changed, without reading it.

A stamp is `[name, size, mtime, ctime, digest]`, times in nanoseconds. Where size and both times are as they were, the
file is taken for the same and is not opened. `cp -p`, rsync or unzip can give a file an old mtime, but no old ctime:
the system sets that one whenever content, name or owner changes. So no change escapes, and no byte is read, as long as
files stay where they are. Where a time differs (a copy of the data, a `touch`, a hard link), the whole content decides:
a hash of some blocks would be quicker, but would miss a voxel that changed in between.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

Stamp = list  # JSON has no tuples
STAMP = ("name", "size", "mtime", "ctime", "digest")


def digest(file: str | Path) -> str:
    """A hash of the content."""
    content = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def stamp(file: str | Path) -> Stamp:
    """The stamp of a file as it is now; the file is read."""
    s = os.stat(file)  # before reading: what changes while it is read has another time afterwards
    return [os.path.basename(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, digest(file)]


def renewed(old: Stamp, file: str | Path, may_read: bool = True) -> Stamp | None:
    """The stamp with the times of now, if the file still is what it was, else None.

    Args:
        may_read: whether the file may be opened. If not, size and time of modification decide, and the ctime, which
            every copy changes, does not.
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
    """`renewed` for several files, in this order; None if one of them changed, or there are more or fewer."""
    if len(old) != len(files):
        return None
    stamps = []
    for stamp_, file in zip(old, files, strict=True):
        now = renewed(stamp_, file, may_read)
        if now is None:
            return None
        stamps.append(now)
    return stamps
