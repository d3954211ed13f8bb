"""Read archives from the internet without trusting them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from nnunet_semiseg.data.image_problems import one_line_of
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import disk_error

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


RATIO, HARMLESS = 100, 1 << 30
"""The size limit of what is in an archive: `RATIO` times the size of the archive, or `HARMLESS` bytes if that is more.
Normal images and labels need less."""


@contextlib.contextmanager
def unpacked(archive: Path, parent: Path, purpose: str, max_size: float | None = None) -> Iterator[Path]:
    """A folder in `parent` with the content of the archive. It exists only during the `with` block.

    Its name depends only on the archive and the purpose. So if this process is killed, the next one finds the folder
    and removes it.

    Args:
        max_size: the largest allowed size of the whole content, in bytes. None: the limit of `RATIO` and `HARMLESS`.

    Raises:
        UserError: see `unpack`.
    """
    folder = parent / f".unpacked_{purpose}_{hashlib.sha256(str(archive).encode()).hexdigest()[:12]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        unpack(archive, folder, max_size)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(archive: Path, folder: Path, max_size: float | None = None) -> None:
    """Unpack a zip or tar file. Nothing is written outside of the folder.

    Raises:
        UserError: the archive is damaged or encrypted; it has a path outside the folder, a link or a device; it is
            larger than the limit (see `unpacked`) or than the free space.
        DiskError: the disk is full.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as file:
                for member in file.infolist():
                    _refuse_outside(member.filename, archive)
                    member.filename = member.filename.replace("\\", "/")  # some Windows programs write backslashes
                _refuse_large(sum(member.file_size for member in file.infolist()), archive, folder, max_size)
                file.extractall(folder, file.infolist())
        else:
            with tarfile.open(archive) as file:
                for member in file:
                    _refuse_outside(member.name, archive)
                    if not (member.isfile() or member.isdir()):
                        raise UserError(
                            f"{archive}: {member.name} is a link or a device, which may be an attack: do not use"
                            f" this archive"
                        )
                # after all members were seen, so that the message can say how large the archive is
                _refuse_large(sum(member.size for member in file.getmembers()), archive, folder, max_size)
                # an attribute: the argument is new in Python 3.11.4 (3.10.12); older ones have the checks above only
                file.extraction_filter = getattr(tarfile, "data_filter", None)
                file.extractall(folder)
    except UserError:
        raise
    except Exception as e:  # a damaged archive has errors of many kinds, some from its compression
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_error(folder.parent, e.strerror) from None
        raise UserError(f"{archive}: cannot be unpacked ({one_line_of(e)}): download it again") from None


def _refuse_outside(name: str, archive: Path) -> None:
    path = PureWindowsPath(name)  # it understands both kinds of slashes
    if path.anchor or ".." in path.parts:
        raise UserError(
            f"{archive}: {name} would be unpacked outside its folder, which may be an attack: do not use this archive"
        )


def _refuse_large(size: int, archive: Path, folder: Path, max_size: float | None) -> None:
    """Refuse an archive if its files together are larger than the limit (see `unpacked`) or than the free space.

    `size` is what the archive says. Unpacking never writes more bytes than that.
    """
    packed, free = archive.stat().st_size, shutil.disk_usage(folder).free
    limit = max(RATIO * packed, HARMLESS) if max_size is None else max_size
    if size > limit:
        raise UserError(
            f"{archive}: would unpack to {size / 1e9:.1f} GB, {size / packed:.0f} times its size: if you trust it,"
            f" allow that with --max-size {math.ceil(size / 1e9)} (GB)"
        )
    if size > free:
        raise UserError(
            f"{archive}: unpacks to {size / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB free: make room"
            " there, or unpack it elsewhere and give that folder with -i"
        )
