"""What processes do to files: folders that nobody may open, and disks that are full."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN, EVENT = 0x20, struct.Struct("iIII")  # of Linux's inotify.h


@contextmanager
def opened_in(*folders: Path) -> Iterator[list[str]]:
    """The paths that are opened in these folders meanwhile, by any process and in C, too; filled at the end.

    Python's audit hook would not see what SimpleITK and blosc2 open. Listing a folder counts as opening it.
    """
    libc, found = ctypes.CDLL(None, use_errno=True), []
    fd = libc.inotify_init1(os.O_NONBLOCK)
    watched = {libc.inotify_add_watch(fd, os.fsencode(folder), IN_OPEN): folder for folder in folders}
    assert fd >= 0 and min(watched) >= 0, os.strerror(ctypes.get_errno())
    try:
        yield found
    finally:
        try:
            while events := os.read(fd, 1 << 16):
                while events:
                    watch, _, _, length = EVENT.unpack_from(events)
                    name = events[EVENT.size : EVENT.size + length].rstrip(b"\0").decode()
                    found.append(str(watched[watch] / name))
                    events = events[EVENT.size + length :]
        except BlockingIOError:
            pass
        os.close(fd)


@contextmanager
def nothing_of_the_test_set_is_opened(dataset) -> Iterator[None]:
    """Nor the raw labels, for what a training needs of them is preprocessed."""
    with opened_in(*(dataset.raw / folder for folder in ("imagesTs", "labelsTs", "labelsTr"))) as opened:
        yield
    assert not opened


@contextmanager
def no_room_for_files_of(size: int) -> Iterator[None]:
    """Writing beyond so many bytes fails, as on a full disk; the system says `File too large`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
