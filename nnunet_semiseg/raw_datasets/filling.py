"""Functions that sort files into a `Layout`: from a folder for all cases, for some cases, or for one case."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.names import (
    DICOM_SEG,
    IMAGE,
    LABEL,
    PICTURES,
    RTSTRUCT,
    SERIES,
    STACK,
    Name,
    kind_of,
    label_core,
    without_case,
)
from nnunet_semiseg.raw_datasets.pairs import find_suffixes, pair


@dataclass
class Layout:
    """What the names of the files say about the cases.

    Args:
        kind: how the source is organised, in words.
        images: the paths by case and channel. A file with all channels has the channel name "". A missing channel has
            no entry.
        labels: the paths by case and class. A file with all classes has the class name "".
        channels: the channels in their order. Empty if there is one channel without a name.
        parts: the part of a case: val, test or unlabeled. All other cases are for training.
        patients: the patients by case, if folders name them.
        left_out: the files that no case uses, each with the reason.
        joined: different names of labels that were treated as the same class. Empty if the names do not differ.
    """

    kind: str
    images: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    channels: tuple[str, ...] = ()
    parts: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    joined: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe the layout in one line for the user."""
        with_label = f"{len(self.images)} cases, {len(self.labels)} with a label"
        channels = f", channels {' '.join(self.channels)}" if self.channels else ""
        return f"{self.kind}: {with_label}{channels}"


def is_label(name: Name) -> bool:
    """Whether a file is a label: by its type (DICOM-SEG, RTSTRUCT), else by its folder, else by its own name."""
    if name.ending in (DICOM_SEG, RTSTRUCT):
        return True
    if name.folder_kind:
        return name.folder_kind[1] == LABEL
    return name.ending != SERIES and label_core(name.stem) is not None


def by_kind(names: Iterable[Name]) -> tuple[list[Name], list[Name]]:
    """Divide names into images and labels."""
    names = list(names)
    return [name for name in names if not is_label(name)], [name for name in names if is_label(name)]


def put(layout: Layout, kind: str, case: str, rest: str, name: Name) -> None:
    """Add one file. Raises UserError if the case already has one for this channel or class."""
    files = (layout.images if kind == IMAGE else layout.labels)[case]
    if rest in files:
        other, fix = replace(name, path=files[rest]), "remove one"
        what = "appears twice, also as" if kind == IMAGE else "has two labels, this one and"
        fix = fix if kind == IMAGE else f"{fix}, or join them"
        raise UserError(f"{name}: case {case} {what} {other}: {fix}")
    files[rest] = name.path
    if name.part and kind == IMAGE:
        layout.parts[case] = name.part


def fill_flat(
    layout: Layout, names: Sequence[Name], channels: Sequence[str] | None, suffixes: Sequence[str] | None = None
) -> None:
    """Add files from one folder for all cases, see `pairs`.

    Args:
        names: the files.
        channels: the names of the channels, if the user gives them.
        suffixes: the ends of file names that stand for channels. None: `find_suffixes` finds them.
    """
    images, labels = by_kind(names)
    if suffixes is None:
        suffixes = find_suffixes(images, labels, channels)
    for kind, found in zip((IMAGE, LABEL), pair(images, labels, suffixes), strict=True):
        for case, rest, name in found:
            put(layout, kind, case, rest, name)


def fill_groups(
    layout: Layout, groups: Mapping[str, Sequence[Name]], channels: Sequence[str] | None, patients: bool = True
) -> None:
    """Add files of several cases from folders. If two cases have the same name, all names begin with their folder.

    Args:
        groups: the files of each folder.
        patients: whether each folder belongs to one patient.
    """
    found = {}
    suffixes = find_suffixes(*by_kind(name for names in groups.values() for name in names), channels)
    for group, names in groups.items():
        found[group] = Layout("")
        fill_flat(found[group], names, channels, suffixes)
    cases = [case for own in found.values() for case in own.images]
    for group, own in found.items():
        prefix = f"{group}_" if len(set(cases)) < len(cases) else ""
        layout.images |= {prefix + case: files for case, files in own.images.items()}
        layout.labels |= {prefix + case: files for case, files in own.labels.items()}
        layout.parts |= {prefix + case: part for case, part in own.parts.items()}
        if patients:
            layout.patients |= {prefix + case: group for case in own.images}


def fill_case(layout: Layout, case: str, names: Sequence[Name], stacked: bool) -> None:
    """Add files from the folder of one case: channels and classes, or slices of a volume."""
    images, labels = by_kind(names)
    series = [name for name in images if name.ending == SERIES]
    if _are_slices(images) and stacked:
        images = [_folder_of(images)]
    elif _are_slices(images) and len({re.sub(r"\d+", "", name.stem) for name in images}) == 1:
        raise UserError(
            f"{os.path.dirname(str(images[0]))}: {len(images)} numbered pictures lie there: if they are slices of a"
            " volume, give the size of their voxels with --spacing X Y Z (mm); if each is a case, put all images into"
            " one folder images, and their labels, with the same names, into labels"
        )
    elif len(series) > 1:  # their headers say which is which
        folder = os.path.commonpath([name.path.removesuffix(SERIES) for name in series])
        images = [name for name in images if name.ending != SERIES] + [replace(series[0], path=folder + SERIES)]
    if _are_slices(labels) and not any(name.ending in PICTURES for name in images):
        labels = [_folder_of(labels)]
    for name in images:
        rest = "_".join([*_folders_within(name, case), without_case(name.stem, case)])
        put(layout, IMAGE, case, "" if name.ending in (SERIES, STACK) else rest, name)
    cores = [label_core(name.stem) for name in labels]
    for name, own in zip(labels, cores, strict=True):
        rest = without_case(name.stem if own is None or cores.count(own) > 1 else own, case)
        if name.ending in (DICOM_SEG, RTSTRUCT):  # the names of their classes are inside
            rest = name.path if len(labels) > 1 else ""
        put(layout, LABEL, case, "" if name.ending in (SERIES, STACK) else rest, name)


def _are_slices(names: Sequence[Name]) -> bool:
    return len(names) > 1 and all(name.ending in PICTURES for name in names)


def _folder_of(slices: Sequence[Name]) -> Name:
    """The path that stands for all slices of a volume."""
    folders = sorted({os.path.dirname(name.path) for name in slices})
    if len(folders) > 1:
        raise UserError(
            f"{slices[0]}: the slices of one volume lie in {' and '.join(folders)}: put them into one folder"
        )
    return replace(slices[0], path=folders[0] + STACK)


def _folders_within(name: Name, case: str) -> list[str]:
    """The folders between that of the case and the file, without folders whose name means images or labels."""
    folders = list(name.folders)
    start = next((i for i in reversed(range(len(folders))) if folders[i] == case), len(folders) - 1)
    return [folder for folder in folders[start + 1 :] if not kind_of(folder)]
