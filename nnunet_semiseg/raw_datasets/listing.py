"""List the files of a source by name for `layouts`. The DICOM slices in a folder become one name."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_semiseg.data.headers import data_files
from nnunet_semiseg.raw_datasets.names import BESIDE, DICOM_SEG, ENDINGS, RTSTRUCT, SERIES, STACK, kind_of
from nnunet_semiseg.raw_datasets.sources import JUNK

SYSTEM = ("thumbs.db", "desktop.ini", "dicomdir", "lockfile", "version")
DICOM_FILES = (".dcm", ".ima")
UNKNOWN = "of no known kind"
_SINGLE = tuple(f"1.2.840.10008.5.1.4.1.1.{kind}\0".encode() for kind in ("1", "1.1", "1.2"))  # X-rays
_KINDS = {b"1.2.840.10008.5.1.4.1.1.66.4": DICOM_SEG, b"1.2.840.10008.5.1.4.1.1.481.3": RTSTRUCT}


def list_files(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """List the files below a folder, at any depth: those that a conversion can read, and the others with the reason.

    Names are relative, with slashes. The DICOM slices in a folder share one name: that of the folder plus `.dicom`. But
    each DICOM image has its own name if it lies in `folder` itself, or if it is an X-ray in a folder such as `images`.
    The name of a segmentation ends with `.dicom-seg`, that of a structure set with `.dicom-rtstruct`. Links to folders
    are followed.
    """
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    seen = {os.path.realpath(folder)}
    for directory, folders, files in os.walk(folder, followlinks=True):
        here = Path(directory)
        inside = here.relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        real = {name: os.path.realpath(here / name) for name in folders}
        folders[:] = sorted(name for name in folders if not name.startswith(JUNK) and real[name] not in seen)
        seen |= {real[name] for name in folders}  # a link may lead back to a folder above it
        for file in sorted(files):
            name = prefix + file
            if file.startswith(JUNK) or file.lower() in SYSTEM:
                left_out[name] = "a file of the operating system"
            elif file.lower().endswith(ENDINGS):
                found[name] = here / file
            elif kind := dicom_kind(here / file):
                series = kind == SERIES and not (inside == "." or kind_of(here.name) and _is_single(here / file))
                own = name[:-4] if name.lower().endswith(DICOM_FILES) else name
                found[f"{inside}{SERIES}" if series else f"{own}{kind}"] = here if series else here / file
            else:
                left_out[name] = "not an image" if file.lower().endswith(BESIDE) else UNKNOWN
    for name, file in found.items():
        for data in data_files(file):  # the file with the voxels of a .mhd
            left_out.pop(os.path.normpath(os.path.join(os.path.dirname(name), data)).replace(os.sep, "/"), None)
    return found, left_out


def real_path(name: str, folder: Path, found: dict[str, Path]) -> Path:
    """Find the file or folder for a name in a layout. The name of a folder ends with `.dicom` or `.stack`.

    Args:
        found: the result of `list_files`.
    """
    return found.get(name) or folder / name.removesuffix(SERIES).removesuffix(STACK)


def dicom_kind(file: Path) -> str | None:
    """The kind of a DICOM file: `.dicom`, `.dicom-seg` or `.dicom-rtstruct`. None if the file is not DICOM.

    A file that ends with `.dcm` or `.ima` is always taken for DICOM. A file with another ending never is, unless the
    ending is a number.
    """
    ending = file.suffix.lower()
    by_name = ending in DICOM_FILES
    if not by_name and ending and not ending[1:].isdecimal():
        return None
    head = _head(file)
    if not by_name and head[128:132] != b"DICM":
        return None
    return next((kind for uid, kind in _KINDS.items() if uid in head), SERIES)


def _is_single(file: Path) -> bool:
    return any(uid in _head(file) for uid in _SINGLE)


def _head(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(1024)
