"""Find out from the name of a file or folder what it is: image or label, its part of the data set, and its case."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

VOLUMES = (".nii.gz", ".nrrd", ".mha", ".gipl", ".nii", ".mhd", ".nhdr")
PICTURES = (".png", ".tif", ".bmp", ".tiff", ".jpg", ".jpeg")
SERIES, DICOM_SEG, RTSTRUCT = ".dicom", ".dicom-seg", ".dicom-rtstruct"
"""The endings that `listing` gives to the names of DICOM files in our lists: a folder of images, a segmentation, an RT
structure set. On the disk these names may end differently."""
STACK = ".stack"
"""The ending, also only in our lists, of a folder of pictures that are the slices of one volume."""
ENDINGS = (*VOLUMES, *PICTURES, SERIES, DICOM_SEG, RTSTRUCT, STACK)
BESIDE = (".json", ".txt", ".csv", ".tsv", ".md", ".xlsx", ".raw", ".zraw", ".gz", ".cfg", ".bval", ".bvec", ".pdf")
"""The endings of files that are not images and often lie beside images."""

IMAGE, LABEL = "image", "label"
IMAGE_WORDS = frozenset("image images img imgs imaging volume volumes scan scans".split())
LABEL_WORDS = frozenset(
    "label labels mask masks msk seg segs segmentation segmentations dseg gt gts ground truth truths groundtruth "
    "annotation annotations instance instances".split()
)
PARTS = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "validation", "valid", "va"), "val"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled", "un"), "unlabeled"),
}
_SHORT = re.compile(r"(?i)(images?|imgs?|labels?|masks?)[_-]?(tr|va|ts|un|val|test|train)")
_SUFFIX = re.compile(
    rf"(?i)(.*?)[ _.-]+({'|'.join(sorted(LABEL_WORDS, key=len, reverse=True))})([ _.-]?\d{{1,2}})?"  # c1_mask_2, too
)
_PREFIX = re.compile(
    rf"(?i)(?:{'|'.join(sorted(LABEL_WORDS | IMAGE_WORDS | {'vol'}, key=len, reverse=True))})(?:[ _.-]+|(?=\d))(.+)"
)
_VISIT = re.compile(
    r"(?i)(?:ses|session|visit|v|timepoint|time|tp|day|week|month|year)[-_ ]?[\d._-]+|(?:19|20)\d\d[-_.]?\d\d[-_.]?\d\d"
    r"|\d\d?[-_.]\d\d?[-_.](?:19|20)\d\d"
    r"|baseline|(?:follow[-_ ]?up|fu)[-_ ]?\d*|(?:pre|post)(?:[-_ ]?op)?"
)
_SESSION = re.compile(r"(?i)(?:scan|study|series|t|v)?[-_ ]?[\d._-]+")


@dataclass(frozen=True)
class Name:
    """A path, relative to the source and with slashes, and what its parts say.

    Args:
        skip: how many folders at the beginning of the path say nothing.
        source: the folder of the source, for messages.
        by_folder: whether the names of folders decide if a file is an image or a label.
    """

    path: str
    skip: int = 0
    source: str = ""
    by_folder: bool = True

    def __str__(self) -> str:
        return os.path.join(self.source, self.path)

    @cached_property
    def ending(self) -> str:
        """The known ending of the file name, in small letters. Empty if it is not in `ENDINGS`."""
        return next((e for e in ENDINGS if self.path.lower().endswith(e)), "")

    @cached_property
    def folders(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[self.skip : -1])

    @cached_property
    def stem(self) -> str:
        """The file's name without its ending.

        A second `.nii` is removed, too, because ITK would write `a.nii.nii.gz` as `a.nii.gz`.
        """
        name = self.path.rpartition("/")[2]
        stem = name[: len(name) - len(self.ending)].removesuffix(".nii")
        return unicodedata.normalize("NFC", stem)  # a Mac writes ö as two characters

    @cached_property
    def folder_kind(self) -> tuple[int, str] | None:
        """The deepest folder whose name means images or labels: its index, and which of the two."""
        for i in reversed(range(len(self.folders) if self.by_folder else 0)):
            if kind := kind_of(self.folders[i]):
                return i, kind
        return None

    @cached_property
    def above(self) -> tuple[str, ...]:
        """The folders above the one that means images or labels. If there is none, all folders."""
        return self.folders[: self.folder_kind[0]] if self.folder_kind else self.folders

    @cached_property
    def below(self) -> tuple[str, ...]:
        """The folders below the one that means images or labels. Empty if there is none."""
        return self.folders[self.folder_kind[0] + 1 :] if self.folder_kind else ()

    @cached_property
    def part(self) -> str | None:
        """The part of the data set: train, val, test or unlabeled. The deepest folder with such a name decides."""
        return next((part for folder in reversed(self.folders) if (part := part_of(folder))), None)


def words_of(name: str) -> list[str]:
    """Divide a name into words: `TrainingImg` and `training-img` give training, img. A number is a separate word."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]


@cache
def kind_of(folder: str) -> str | None:
    """What a folder's name stands for: images, labels, or neither.

    A name with a number is that of a case or a data set.
    """
    if match := _SHORT.fullmatch(folder):
        return LABEL if match[1].lower().startswith(("label", "mask")) else IMAGE
    words = set(words_of(folder))
    if any(word.isdecimal() for word in words):
        return None
    return LABEL if words & LABEL_WORDS else IMAGE if words & IMAGE_WORDS else None


@cache
def part_of(folder: str) -> str | None:
    """The part of a data set that a folder's name stands for.

    Two letters, as in Tr, count only after words like `images`.
    """
    if match := _SHORT.fullmatch(folder):
        return PARTS[match[2].lower()]
    return next((PARTS[word] for word in words_of(folder) if len(word) > 2 and word in PARTS), None)


@cache
def label_core(stem: str) -> str | None:
    """Reduce the name of a label: c1_seg, c1-label and mask_c1 give `c1`. Empty if nothing is left.

    None if it is no label.
    """
    if stem.lower() in LABEL_WORDS:
        return ""
    if match := _SUFFIX.fullmatch(stem):
        return match[1]
    if (match := _PREFIX.fullmatch(stem)) and words_of(stem)[0] in LABEL_WORDS:
        return match[1]
    return None


def core(stem: str) -> str:
    """Reduce the names of an image and its label to the part that both share: img0001 and label0001 give `0001`."""
    match = _PREFIX.fullmatch(stem)
    return match[1] if match else stem


def without_case(stem: str, case: str) -> str:
    """Take the name of the case out of the stem of a file: P1_t1ce gives `t1ce`."""
    if stem.casefold().startswith(case.casefold()):
        rest = stem[len(case) :]
        if not rest or not rest[0].isalnum():
            return rest.strip(" _.-")
    return stem


def is_visit(folder: str) -> bool:
    """Whether a folder is a visit: its name is a date, or has a word like visit, baseline or week."""
    return _VISIT.fullmatch(folder) is not None


def is_session(folder: str, above: str) -> bool:
    """Whether a folder is a visit: its name alone says so (see `is_visit`), or it is a number below a patient.

    A number may have a word before it, as in scan2. A folder is taken for a patient if its name has a digit. So the
    result is true for `P1/2`, but not for `CT/2`.
    """
    return is_visit(folder) or (_SESSION.fullmatch(folder) is not None and any(c.isdecimal() for c in above))


def plain(text: str) -> str:
    """Keep only letters and digits, in small letters, to compare spellings such as `T1 post` and `t1_post`."""
    return "".join(c for c in text.casefold() if c.isalnum())


def natural(name: str) -> list:
    """A key for sorting names by their numbers: `slice10` comes after `slice9`."""
    return [
        (1, int(part), "") if part.isdecimal() else (0, 0, part.casefold()) for part in re.findall(r"\d+|\D+", name)
    ]


def some(names: Iterable[str], at_most: int = 5) -> str:
    """The first of the names, for a message. `...` at the end says that there are more."""
    names = list(names)
    return ", ".join(names[:at_most]) + (", ..." if len(names) > at_most else "")


def common_root(paths: Sequence[str]) -> int:
    """How many folders at the beginning are the same in all paths.

    The count ends before a folder that means images or labels, or that begins with `sub-`.
    """
    names = [Name(path) for path in paths]
    folders = [name.folders for name in names]
    n = 0
    while folders and all(len(f) > n for f in folders) and len({f[n] for f in folders}) == 1:
        kind = kind_of(folders[0][n])
        if kind == LABEL and any(label_core(name.stem) is not None or name.folder_kind != (n, LABEL) for name in names):
            kind = None  # `Dataset_with_GT` holds images, too
        if kind or folders[0][n].lower().startswith("sub-"):
            break
        n += 1
    return n
