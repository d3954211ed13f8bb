"""nnU-Net's folders; files that are read with a clear error and written whole; locks against a second process."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import Any

from filelock import SoftFileLease, Timeout
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_semiseg.errors import UserError


def dataset_folder(variable: str, dataset: int | str) -> Path:
    """A dataset's folder below ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results``.

    Raises:
        UserError: the variable is not set; no such dataset, or several of that number.
    """
    base = base_folder(variable)
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except ValueError:
        raise UserError(f"dataset {dataset}: give its number or its name, 501 or Dataset501_LA") from None
    except RuntimeError as e:
        what = "several datasets have" if "More than one" in str(e) else "no dataset has"
        raise UserError(f"dataset {dataset}: {what} this number: look into {variable}={base}") from None
    if not re.fullmatch(r"Dataset\d{3}_[^/\\]+", name):  # nnU-Net reads three digits: it takes 1500 for 150
        raise UserError(
            f"dataset {dataset}: {name} is no name like Dataset501_LA, with three digits: rename its folder"
        )
    return base / name


def base_folder(variable: str) -> Path:
    """The folder that ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results`` names."""
    base = os.environ.get(variable)
    if not base:
        guide = "see nnU-Net's documentation/setting_up_paths.md"
        raise UserError(f"{variable} is not set: export {variable}=FOLDER ({guide})")
    if base.startswith(("~", "$", '"', "'")) or base.endswith(('"', "'")):  # nnU-Net would make a folder of this name
        raise UserError(f"{variable}={base}: no shell has read the ~, $ or quotes: export the plain path")
    return Path(base).absolute()


def folder_for(output: str | Path) -> Path:
    """The folder that `-o` names. Raises UserError where it is empty, or where it, or what is above it, is a file."""
    if not str(output):
        raise UserError("-o is empty: name a folder")
    output = Path(output).absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file: name a folder with -o")
    return output


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it. Raises DiskError where the system does not, whatever it says."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # in /proc it says that there is no such file
        raise disk_error(error.filename or folder, error.strerror) from None


def read_json(file: Path, fix: str, kind: type = dict) -> Any:
    """The content of a JSON file: an object, or with `kind=list` a list.

    Raises:
        UserError: the file is missing, no JSON, not in UTF-8, has a key twice or is of another kind.
    """
    try:
        # as bytes: always UTF-8, whatever the locale (reading DICOM changes it)
        content = json.loads(_utf8(file.read_bytes()), object_pairs_hook=_no_key_twice)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: {fix}") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}): {fix}") from None
    except RecursionError:
        raise UserError(f"{file}: not valid JSON (too many brackets within each other): {fix}") from None
    except ValueError as e:  # no JSON, or no UTF-8
        raise UserError(f"{file}: not valid JSON ({e}): {fix}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: is no JSON {'object' if kind is dict else 'list'}: {fix}")
    return content


def _utf8(content: bytes) -> str:
    """nnU-Net refuses what an editor on Windows may put in front of a text; so that it says why, we do, too."""
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without BOM")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16: save it as UTF-8")
    return content.decode("utf-8")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    """Of two values Python would take the last one without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{twice}" is there twice')
    return content


def write_json(content: dict | list, file: Path) -> None:
    """Write the whole file or nothing; raises DiskError."""
    text = json.dumps(content, indent=4)
    with written_whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- disks

NOT_WRITABLE = {
    getattr(errno, name)
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EROFS",
        "EACCES",
        "EPERM",
        "EIO",
        "ESTALE",
        "ENOTDIR",
        "EEXIST",
        "EISDIR",
    )
    if hasattr(errno, name)
}
"""what a disk says that is full, read-only or gone"""


class DiskError(UserError):
    """A file that could not be written: the disk is full or read-only, or the folder is not the user's."""


@contextmanager
def disk_errors(place: Path | str) -> Iterator[None]:
    """Say in one line what could not be written and why, where a disk is full or read-only.

    Args:
        place: the file or folder to name where the system names none.

    Raises:
        DiskError: in place of the system's error; other errors pass.
    """
    try:
        yield
    except shutil.Error as error:  # of copytree: source, target and cause of each file
        ((_, target, cause), *_) = error.args[0]
        raise disk_error(target, cause) from None
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        written = error.filename2 or error.filename  # of a copy or a link the second one is new
        raise disk_error(written or place, error.strerror) from None


def disk_error(place: Path | str, cause: str) -> DiskError:
    """The error of a file that could not be written."""
    fix = "make room or use another disk, then run the command again"
    return DiskError(f"{place}: cannot be written ({cause}): {fix}")


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a name to write to; what was written there takes the file's place, or is gone where writing failed.

    The name is new each time, so that two processes do not write into each other's file.

    Raises:
        DiskError: the disk is full or read-only.
    """
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise disk_error(file, error.strerror) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def put_back(file: Path) -> Iterator[None]:
    """Put the file back as it was where something fails that writes it, not whole, in this context."""
    before = file.with_name(f"{file.name}.before.tmp")
    if file.is_file():
        with written_whole(before) as temporary:
            shutil.copyfile(file, temporary)
    try:
        yield
    except BaseException:
        if before.is_file():
            os.replace(before, file)
        else:
            file.unlink(missing_ok=True)
        raise
    finally:
        before.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- locks

LEASE = 60.0
"""seconds: a process on another computer that gives no sign of life for so long is dead"""


READS, REWRITES = "uses these preprocessed cases", "rewrites these preprocessed cases"
WAIT = 5.0
"""seconds, for the moment in which another one begins to read"""


class BusyError(UserError):
    """Another process is at work on the same files."""


@contextmanager
def only_one(lock: Path, does: str, wait: float = 0.0) -> Iterator[None]:
    """Do what two processes must not do at once; the second one is told who is there.

    The lock file holds the computer's name and the process's number, and is gone at the end. A dead process does not
    block for ever: on this computer it is known at once, on another one after `LEASE` seconds without a sign of life.

    Args:
        lock: the lock file; its folder must be there.
        does: what the process does, with its object, as in "trains this model".
        wait: seconds to wait for the other one to end.

    Raises:
        BusyError: another process is there.
        DiskError: the lock cannot be written.
    """
    lease = _lease(lock)
    with disk_errors(lock):
        if not (_acquired(lease, wait) or (_is_elsewhere(lease) and _acquired_from_the_dead(lease))):
            raise BusyError(f"{lock}: {_name_of(lease)} {does}: wait until it has ended, or end it")
    try:
        yield
    finally:
        lease.release()


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Use preprocessed data that nobody rewrites meanwhile; as many as there are may use it at the same time.

    Each has a lock file of its own beside the folder, made while `rewriting` is kept out. Where no file can be
    written, nobody can rewrite the data either, and there is no lock.

    Raises:
        BusyError: another process rewrites the data.
    """
    with ExitStack() as stack:
        try:
            with only_one(_gate(folder), REWRITES, WAIT):
                for left in _readers(folder):  # by who was killed on this computer
                    if _acquired(lease := _lease(left), 0.0):
                        lease.release()
                name = f".{folder.name}.{uuid.uuid4().hex[:8]}.reading.lock"
                stack.enter_context(only_one(folder.with_name(name), READS))
        except DiskError:
            pass
        yield


@contextmanager
def rewriting(folder: Path) -> Iterator[None]:
    """Change preprocessed data that nobody uses meanwhile; see `reading`.

    Raises:
        BusyError: another process uses the data, or rewrites it.
        DiskError: the lock cannot be written.
    """
    with only_one(_gate(folder), REWRITES, WAIT):
        for lock in _readers(folder):
            with only_one(lock, READS):  # one that lives holds it; that of a dead one goes
                pass
        yield


def _gate(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _readers(folder: Path) -> list[Path]:
    return sorted(folder.parent.glob(f".{folder.name}.????????.reading.lock"))


def _lease(lock: Path) -> SoftFileLease:
    return SoftFileLease(lock, lease_duration=LEASE, heartbeat_interval=LEASE / 6, thread_local=False)


def _acquired(lease: SoftFileLease, wait: float) -> bool:
    with suppress(Timeout):
        lease.acquire(timeout=wait)
    return lease.is_locked


def _name_of(lease: SoftFileLease) -> str:
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname}" if owner else "another process"


def _is_elsewhere(lease: SoftFileLease) -> bool:
    """Whether the one who is there cannot be looked at from here: on another computer, or in another container."""
    return lease.owner is not None and lease.owner.hostname != gethostname()


def _acquired_from_the_dead(lease: SoftFileLease) -> bool:
    print(f"{lease.lock_file}: left by {_name_of(lease)}: looking for a sign of life, up to {LEASE:.0f} s", flush=True)
    seen, end = _sign_of_life(lease), time.monotonic() + 1.5 * LEASE
    while _sign_of_life(lease) in (seen, None) and time.monotonic() < end:
        if _acquired(lease, LEASE / 60):
            return True
    return False


def _sign_of_life(lease: SoftFileLease) -> int | None:
    """When the lock file was last touched; None where it is gone."""
    with suppress(OSError):
        return os.stat(lease.lock_file).st_mtime_ns
    return None
