"""Archives from the internet, read without trusting them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from nnunet_semiseg.data.image_problems import one_line_of
from nnunet_semiseg.errors import UserError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


RATIO, HARMLESS = 100, 1 << 30
"""an archive may unpack to so many times its size, or to so many bytes; images and labels stay below"""


@contextlib.contextmanager
def unpacked(archive: Path, parent: Path, purpose: str, max_size: float | None = None) -> Iterator[Path]:
    """A folder below `parent` with what is in the archive; it is there for the time of the context.

    Its name is that of archive and purpose, so that the next run removes what a killed one has left.

    Args:
        max_size: in bytes, of all that is in it; None: `RATIO` times the archive's own size.
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
    """Unpack a zip or tar; nothing gets out of the folder.

    Raises:
        UserError: damaged or encrypted; a member outside the folder, a link or a device; more than the limit, or than
            there is space for.
    """
    try:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as file:
                for member in file.infolist():
                    _refuse_outside(member.filename, archive)
                    member.filename = member.filename.replace("\\", "/")  # some programs on Windows write these
                _refuse_large(sum(member.file_size for member in file.infolist()), archive, folder, max_size)
                file.extractall(folder, file.infolist())
        else:
            with tarfile.open(archive) as file:
                size = 0
                for member in file:
                    _refuse_outside(member.name, archive)
                    size += member.size
                    _refuse_large(size, archive, folder, max_size)
                    if not (member.isfile() or member.isdir()):
                        raise UserError(f"{archive}: {member.name} is a link or a device: do not trust it")
                # an attribute, as the argument came with Python 3.11.4 (3.10.12); before, what is refused above must do
                file.extraction_filter = getattr(tarfile, "data_filter", None)
                file.extractall(folder)
    except UserError:
        raise
    except Exception as e:  # a damaged archive raises of many kinds, those of its compression among them
        raise UserError(f"{archive}: cannot be unpacked ({one_line_of(e)}): download it again") from None


def _refuse_outside(name: str, archive: Path) -> None:
    path = PureWindowsPath(name)  # takes both kinds of slashes
    if path.anchor or ".." in path.parts:
        raise UserError(f"{archive}: {name} would be unpacked outside its folder: do not trust it")


def _refuse_large(size: int, archive: Path, folder: Path, max_size: float | None) -> None:
    """By what the members say of themselves: neither module unpacks more of one."""
    packed, free = archive.stat().st_size, shutil.disk_usage(folder).free
    limit = max(RATIO * packed, HARMLESS) if max_size is None else max_size
    if size > limit:
        raise UserError(
            f"{archive}: would unpack to {size / 1e9:.1f} GB or more, {size / packed:.0f} times its size: if you trust"
            f" it, allow that with --max-size {math.ceil(size / 1e9)} (GB)"
        )
    if size > free:
        raise UserError(
            f"{archive}: unpacks to {size / 1e9:.1f} GB or more, and {folder.parent} has {free / 1e9:.1f} GB free: make"
            " room there, or unpack it elsewhere and give the folder"
        )
