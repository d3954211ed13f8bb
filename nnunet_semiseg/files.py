"""Find nnU-Net's folders, read files with clear errors, write them completely or not at all, and lock them."""

from __future__ import annotations

import codecs
import difflib
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

SETTINGS, LOCK = "settings.json", "training.lock"
"""Files in the folder of a training: the settings it was started with, and the lock of the process that trains or
validates."""


def dataset_folder(variable: str, dataset: int | str) -> Path:
    """The folder of a dataset in ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results``.

    The folder may be missing if the dataset has one in another of these three.

    Raises:
        UserError: the variable is not set (see `base_folder`); no such dataset, or several with this number; its name
            is not one that nnU-Net can read.
    """
    base = base_folder(variable)
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except ValueError:
        raise UserError(f"dataset {dataset}: give its number or its name, 501 or Dataset501_LA") from None
    except RuntimeError as e:
        if "More than one" in str(e):
            fix = "give the name of one of them, or rename the others"
            raise UserError(f"dataset {dataset}: several datasets have this number: {fix}") from None
        raise UserError(f"dataset {dataset}: no dataset has this number: choose one in {variable}={base}") from None
    if not re.fullmatch(r"Dataset\d{3}_[^/\\]+", name):  # nnU-Net reads only three digits: 1500 would become 150
        raise UserError(
            f"dataset {dataset}: {name} is not a name like Dataset501_LA, with three digits: rename its folder"
        )
    folders = [Path(folder) for variable in VARIABLES if (folder := os.environ.get(variable))]
    if not any((folder / name).is_dir() for folder in folders):
        near = difflib.get_close_matches(name, {file.name for folder in folders for file in folder.glob("Dataset*")}, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one in {variable}={base}"
        raise UserError(f"dataset {dataset}: no dataset has this name: {hint}")
    return base / name


VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def base_folder(variable: str) -> Path:
    """The folder in the variable ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results``.

    Raises:
        UserError: the variable is not set, or has a `~`, `$` or quotes that the shell should have replaced.
    """
    base = os.environ.get(variable)
    if not base:
        others = [name for name in VARIABLES if name != variable and not os.environ.get(name)]
        too = f"; {' and '.join(others)}, too" if others else ""
        guide = "see nnU-Net's documentation/setting_up_paths.md"
        raise UserError(f"{variable} is not set: export {variable}=FOLDER{too} ({guide})")
    if base.startswith(("~", "$", '"', "'")) or base.endswith(('"', "'")):  # nnU-Net would make a folder of this name
        raise UserError(f"{variable}={base}: the shell has not replaced ~, $ or quotes: export the full path")
    return Path(base).absolute()


def folder_for(output: str | Path) -> Path:
    """The folder that `-o` names. Raises UserError if it is empty, or if it or a folder above it is a file."""
    if not str(output):
        raise UserError("-o is empty: name a folder")
    output = Path(output).absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file: name a folder with -o")
    return output


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises DiskError if the system refuses, for whatever reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # in /proc the system says "no such file"
        raise disk_error(error.filename or folder, error.strerror) from None


def read_json(file: Path, fix: str, kind: type = dict) -> Any:
    """Read a JSON file that holds an object or, with `kind=list`, a list.

    Args:
        fix: what to do if the file is missing or wrong, for the message.

    Raises:
        UserError: the file cannot be read, is not JSON or not in UTF-8, holds something else, or has a key twice.
    """
    try:
        # as bytes: then it is UTF-8 with every locale (reading DICOM changes the locale)
        content = json.loads(_utf8(file.read_bytes()), object_pairs_hook=_no_key_twice)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: {fix}") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}): {fix}") from None
    except RecursionError:
        raise UserError(f"{file}: not valid JSON (too many brackets within each other): {fix}") from None
    except ValueError as e:  # not JSON, or not UTF-8
        raise UserError(f"{file}: not valid JSON ({e}): {fix}") from None
    if not isinstance(content, kind):
        raise UserError(f"{file}: is not a JSON {'object' if kind is dict else 'list'}: {fix}")
    return content


def _utf8(content: bytes) -> str:
    """Decode UTF-8. Refuse the byte order mark that editors on Windows may put before a text, and say so."""
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without BOM")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16: save it as UTF-8")
    return content.decode("utf-8")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    """Refuse a key that appears twice. Python would silently take the last value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'"{twice}" is there twice')
    return content


def write_json(content: dict | list, file: Path) -> None:
    """Write a file completely or not at all. Raises DiskError."""
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
"""The error numbers of the system that mean: the disk is full, read-only or missing, the user may not write there, or
another file or folder is in the way."""


class DiskError(UserError):
    """A file or folder could not be written, for example because the disk is full or read-only."""


@contextmanager
def disk_errors(place: Path | str) -> Iterator[None]:
    """Turn the error of a full or read-only disk into one line that names the file and the reason.

    Args:
        place: a file or folder, which is named if the system names none.

    Raises:
        DiskError: replaces the error of the system. Other errors are not changed.
    """
    try:
        yield
    except shutil.Error as error:  # from copytree: source, target and reason for each file
        ((_, target, cause), *_) = error.args[0]
        raise disk_error(target, cause) from None
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        written = error.filename2 or error.filename  # for a copy or a link the second name is the new file
        raise disk_error(written or place, error.strerror) from None


def disk_error(place: Path | str, cause: str) -> DiskError:
    """Make the error for a file that could not be written."""
    fix = "make room or use another disk, then run the command again"
    return DiskError(f"{place}: cannot be written ({cause}): {fix}")


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a temporary path to write to. At the end, the file there replaces `file`.

    If writing fails, the temporary file is removed, and `file` stays as it was.

    The temporary name is new each time, so that two processes do not write into the same file.

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
    """Restore a file if the `with` block fails; if there was none before, remove it.

    It is for code that may leave a half-written file.
    """
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
"""If a process on another computer gives no sign of life for this number of seconds, it counts as dead."""


READS, REWRITES = "uses these preprocessed cases", "rewrites these preprocessed cases"
WAIT = 5.0
"""How many seconds to wait while another process starts to read. That takes a short time."""


class BusyError(UserError):
    """Another process works on the same files."""


@contextmanager
def only_one(lock: Path, does: str, wait: float = 0.0) -> Iterator[None]:
    """Let only one process at a time run this `with` block. The error of the second process names the first one.

    The lock file has the computer's name and the number of the process. It is removed at the end. A dead process does
    not block for ever: on this computer it is noticed at once, on another one after `LEASE` seconds without a sign of
    life.

    Args:
        lock: the lock file. Its folder must exist.
        does: what the process does, for example "trains this model". The error of the second process says it.
        wait: how many seconds to wait for the other process.

    Raises:
        BusyError: another process is at work.
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


def is_held(lock: Path) -> bool:
    """Whether a process holds this lock, which means that it has given a sign of life within `LEASE` seconds.

    Nothing is written or removed, so that this works on a read-only disk, too.
    """
    seen = _sign_of_life(_lease(lock))
    return seen is not None and time.time() - seen / 1e9 < LEASE


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Use preprocessed data while no process rewrites it. Any number of processes may use it at the same time.

    Each process has its own lock file beside the folder. It is made while no process can begin with `rewriting`. If no
    file can be written, nobody can rewrite the data either, and there is no lock.

    Raises:
        BusyError: another process rewrites the data.
    """
    with ExitStack() as stack:
        try:
            with only_one(_gate(folder), REWRITES, WAIT):
                for left in _readers(folder):  # from processes that were killed on this computer
                    if _acquired(lease := _lease(left), 0.0):
                        lease.release()
                name = f".{folder.name}.{uuid.uuid4().hex[:8]}.reading.lock"
                stack.enter_context(only_one(folder.with_name(name), READS))
        except DiskError:
            pass
        yield


@contextmanager
def rewriting(folder: Path) -> Iterator[None]:
    """Change preprocessed data while no process uses it; see `reading`.

    Raises:
        BusyError: another process uses or rewrites the data.
        DiskError: the lock cannot be written.
    """
    with only_one(_gate(folder), REWRITES, WAIT):
        for lock in _readers(folder):
            with only_one(lock, READS):  # fails if that process is alive; the lock of a dead one is removed
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
    """Whether the owner of the lock cannot be checked, because it runs on another computer or in another container."""
    return lease.owner is not None and lease.owner.hostname != gethostname()


def _acquired_from_the_dead(lease: SoftFileLease) -> bool:
    print(f"{lease.lock_file}: left by {_name_of(lease)}: looking for a sign of life, up to {LEASE:.0f} s", flush=True)
    seen, end = _sign_of_life(lease), time.monotonic() + 1.5 * LEASE
    while _sign_of_life(lease) in (seen, None) and time.monotonic() < end:
        if _acquired(lease, LEASE / 60):
            return True
    return False


def _sign_of_life(lease: SoftFileLease) -> int | None:
    """The time in ns, by the clock of the disk, at which the owner last renewed the lock file. None if it is gone."""
    with suppress(OSError):
        return os.stat(lease.lock_file).st_mtime_ns
    return None
