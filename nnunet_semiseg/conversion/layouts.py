"""Which files are images, channels and labels of which case: told from their names alone, nothing is opened.

Three ways to keep a data set are known, and tried in this order: names as BIDS has them; folders for images and folders
for labels; a folder a case. What is kept in none of these is taken as one folder for all.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nnunet_semiseg.conversion.names import (
    DICOM_SEG,
    IMAGE,
    LABEL,
    PICTURES,
    RTSTRUCT,
    SERIES,
    STACK,
    Name,
    common_root,
    core,
    is_session,
    kind_of,
    label_core,
    natural,
    part_of,
    without_case,
)
from nnunet_semiseg.conversion.pairs import choose_channels, pair
from nnunet_semiseg.errors import UserError


@dataclass
class Layout:
    """What the names say.

    Args:
        kind: how the source is kept, in words.
        images: case to channel to path; a file that holds all channels is that of channel "". A channel that the case
            lacks is not there.
        labels: case to class to path; a file that holds all classes is that of class "".
        channels: in their order; none where there is one, and nothing says what it is.
        parts: case to val, test or unlabeled; all others are for training.
        patients: case to patient, where folders say it.
        left_out: path to reason.
    """

    kind: str
    images: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    channels: tuple[str, ...] = ()
    parts: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for the user."""
        with_label = f"{len(self.images)} cases, {len(self.labels)} with a label"
        channels = f", channels {' '.join(self.channels)}" if self.channels else ""
        return f"{self.kind}: {with_label}{channels}"


def recognise(
    paths: Iterable[str], channels: Sequence[str] | None = None, stacked: bool = False, source: str = ""
) -> Layout:
    """The cases that relative paths tell of.

    Args:
        paths: of files that can be read, with slashes; see `listing` for what stands for DICOM.
        channels: wanted, by name and in this order; None: those that all labelled cases have.
        stacked: pictures in a folder of their case are the slices of a volume.
        source: the folder, for messages.

    Raises:
        UserError: names that make no sense, or more than one: two cases of one name, a label of no case.
    """
    paths = sorted(paths, key=natural)
    root = common_root(paths)
    names = [Name(path, root, source) for path in paths]
    layout = _bids(names) or _folders_of_kinds(names, channels, stacked) or _folders_of_cases(names, channels, stacked)
    layout = layout or _one_folder(names, channels)
    _check_labels(layout, source)
    layout.channels, unused = choose_channels(layout.images, layout.labels, channels)
    layout.left_out |= unused
    for case, part in list(layout.parts.items()):
        if part == "train" or (part == "val" and case not in layout.labels):
            del layout.parts[case]
    return replace(layout, images=dict(sorted(layout.images.items())), labels=dict(sorted(layout.labels.items())))


def _check_labels(layout: Layout, source: str) -> None:
    alone = {case: files for case, files in layout.labels.items() if case not in layout.images}
    lines = [
        f"{os.path.join(source, next(iter(files.values())))}: no image of case {case}: rename it, or take it away"
        for case, files in list(alone.items())[:5]
    ]
    if lines:
        raise UserError("\n".join(lines))
    for case, files in layout.labels.items():
        if len(files) == 1:  # whatever it is called
            layout.labels[case] = {"": next(iter(files.values()))}


# --------------------------------------------------------------------------------------------------------------- BIDS


def _bids(names: Sequence[Name]) -> Layout | None:
    """`sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz`, and labels in there or in `derivatives`."""
    files = [name for name in names if re.match(r"sub-[^_]+_", name.stem)]
    if len(files) * 2 < len(names) or not files:
        return None
    layout = Layout("BIDS names")
    layout.left_out = {name.path: "no name as BIDS has them" for name in names if name not in files}
    for name in files:
        words = name.stem.split("_")
        case = "_".join(word for word in words if word.startswith(("sub-", "ses-")))
        rest = "_".join(word for word in words if not word.startswith(("sub-", "ses-")))
        kind = _kind(name)
        if kind == IMAGE and "derivatives" in name.folders:
            layout.left_out[name.path] = "a derivative that is no label"
            continue
        _put(layout, kind, case, (label_core(rest) or "").split("label-")[-1] if kind == LABEL else rest, name)
        layout.patients[case] = words[0]
    return layout


# ------------------------------------------------------------------------------ folders of images, folders of labels


def _folders_of_kinds(names: Sequence[Name], channels: Sequence[str] | None, stacked: bool) -> Layout | None:
    """`images/c1.nii.gz` and `labels/c1.nii.gz`, with parts (`imagesTs`, `test/images`) or folders of cases."""
    above = {name.folders[: name.folder_kind[0]] for name in names if name.folder_kind and name.folder_kind[1] == IMAGE}
    in_parts = all(any(map(part_of, folders)) for folders in above)
    if not above or (len(above) > 1 and not in_parts):
        return None
    inside: dict[str, list[Name]] = {IMAGE: [], LABEL: []}
    nested: dict[str, list[Name]] = {IMAGE: [], LABEL: []}
    layout = Layout("folders of images and of labels")
    for name in names:
        where = name.folder_kind
        if where is None and name.part in (None, "train"):
            layout.left_out[name.path] = "beside the folders of images and labels"
        elif where is None or len(name.folders) == where[0] + 1:
            inside[_kind(name)].append(name)
        else:
            nested[_kind(name)].append(name)
    if nested[IMAGE] and _slice_by_slice(nested[IMAGE], nested[LABEL], stacked):
        layout.kind += ", with folders therein"
        _fill_slices(layout, nested, channels)
        nested = {IMAGE: [], LABEL: []}
    elif nested[IMAGE]:
        layout.kind += ", with a folder a case"
    _fill_flat(layout, inside, channels)
    keys = {name: name.folders[: name.folder_kind[0] + 2] for kind in nested for name in nested[kind]}
    for kind in nested:
        groups = defaultdict(list)
        for name in nested[kind]:
            groups[keys[name][-1]].append(name)
        for case, files in groups.items():
            _fill_case(layout, kind, case, files, stacked)
    return layout


def _fill_slices(layout: Layout, files: Mapping[str, Sequence[Name]], channels: Sequence[str] | None) -> None:
    """Files in folders of patients, each a case; the folder comes into its name where it would be another's, too."""
    groups: dict[str, dict[str, list[Name]]] = defaultdict(lambda: {IMAGE: [], LABEL: []})
    for kind in files:
        for name in files[kind]:
            groups["_".join(name.folders[name.folder_kind[0] + 1 :])][kind].append(name)
    stems = [name.stem for name in files[IMAGE]]
    for folder, group in groups.items():
        own = Layout("")
        _fill_flat(own, group, channels)
        prefix = f"{folder}_" if len(set(stems)) < len(stems) else ""
        for case in (*own.images, *(case for case in own.labels if case not in own.images)):
            layout.patients[prefix + case] = folder
            for target, source in ((layout.images, own.images), (layout.labels, own.labels), (layout.parts, own.parts)):
                if case in source:
                    target[prefix + case] = source[case]


def _slice_by_slice(images: Sequence[Name], labels: Sequence[Name], stacked: bool) -> bool:
    """Whether files in folders are cases of their own: several labels in a folder, each named as an image is."""

    def below(name: Name) -> tuple:
        return (*name.folders[name.folder_kind[0] + 1 :], core(label_core(name.stem) or name.stem))

    if stacked and all(name.ending in PICTURES for name in images):
        return False
    known, found = {below(name) for name in images}, [below(name) for name in labels]
    several = len({key[:-1] for key in found}) < len(found)
    return several and sum(key in known for key in found) * 2 > len(found)


# ----------------------------------------------------------------------------------------------------- a folder a case


def _folders_of_cases(names: Sequence[Name], channels: Sequence[str] | None, stacked: bool) -> Layout | None:
    """`P1/P1_t1ce.nii.gz`, `P1/P1_seg.nii.gz`, or with folders therein; `labels/P1.nii.gz` for those without."""
    dicom = any(name.ending == SERIES for name in names)
    keys = {name: _case_folder(name, dicom) for name in names}
    of_labels = {keys[name] for name in names if _kind(name) == LABEL}
    for name, key in keys.items():  # P1/T1/a.nii.gz beside P1/seg.nii.gz
        keys[name] = next((key[:n] for n in range(1, len(key)) if key[:n] in of_labels), key)
    folders = {keys[name] for name in names if keys[name] and _kind(name) == IMAGE}
    if len(folders) < 2 and not dicom:
        return None
    groups: dict[tuple[str, ...], list[Name]] = defaultdict(list)
    for name in names:
        groups[keys[name]].append(name)
    alone = groups.pop((), [])
    cases = _name_folders(folders | {key for key in groups if key})
    layout = Layout(f"{len(folders)} folders of cases")
    if _several_pairs(groups):
        layout.kind = f"{len(folders)} folders of several cases each"
        for key, files in groups.items():
            own = Layout("")
            _fill_flat(own, {kind: [n for n in files if _kind(n) == kind] for kind in (IMAGE, LABEL)}, channels)
            layout.images |= own.images
            layout.labels |= own.labels
            layout.patients |= dict.fromkeys(own.images, cases[key])
        return layout
    for key, files in groups.items():
        for kind in (IMAGE, LABEL):
            _fill_case(layout, kind, cases[key], [name for name in files if _kind(name) == kind], stacked)
        if len(key) > 1 and is_session(key[-1]):
            layout.patients[cases[key]] = key[-2]
        if part := next((part for folder in reversed(key[:-1]) if (part := part_of(folder))), None):
            layout.parts[cases[key]] = part
    for name in alone:
        if _kind(name) == LABEL:
            _put(layout, LABEL, label_core(name.stem) or name.stem, "", name)
        else:
            layout.left_out[name.path] = "beside the folders of cases"
    return layout


def _case_folder(name: Name, dicom: bool) -> tuple[str, ...]:
    """The folder of a file's case: of DICOM the uppermost, else the lowest that is not named for a kind."""
    folders = name.folders
    if dicom:
        folders = (*folders, name.stem) if name.ending == SERIES else folders
        start = next((i for i, folder in enumerate(folders) if not part_of(folder)), len(folders))
        key = folders[: start + 1]
        return () if name.folder_kind and name.folder_kind[0] <= start else key
    return folders[: name.folder_kind[0]] if name.folder_kind else folders


def _name_folders(keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The last folder of each, with those above where it is a session's or would be another case's, too."""
    keys = set(keys)
    last = [key[-1] for key in keys]
    names = {}
    for key in keys:
        length = 1
        while length < len(key) and (
            (length == 1 and is_session(key[-1])) or sum(other[-length:] == key[-length:] for other in keys) > 1
        ):
            length += 1
        names[key] = "_".join(key[-length:])
    return names if len(last) else {}


def _several_pairs(groups: Mapping[tuple[str, ...], Sequence[Name]]) -> bool:
    """Whether a folder holds several images, each with a label that is named like it alone."""
    pairs = []
    for files in groups.values():
        images = {name.stem for name in files if _kind(name) == IMAGE and name.ending != SERIES}
        labels = [label_core(name.stem) for name in files if _kind(name) == LABEL]
        pairs.append(sum(label in images for label in labels))
    return max(pairs, default=0) > 1


# ------------------------------------------------------------------------------------------------- one folder for all


def _one_folder(names: Sequence[Name], channels: Sequence[str] | None) -> Layout:
    """`c1.nii.gz` and `c1_seg.nii.gz`, `volume-1.nii` and `segmentation-1.nii`; or images alone."""
    layout = Layout(
        "one folder for images and labels" if any(_kind(n) == LABEL for n in names) else "a folder of images"
    )
    _fill_flat(layout, {kind: [n for n in names if _kind(n) == kind] for kind in (IMAGE, LABEL)}, channels)
    return layout


# ----------------------------------------------------------------------------------------------------- what they share


def _kind(name: Name) -> str:
    """By the folder, or else by the file's own name."""
    if name.ending in (DICOM_SEG, RTSTRUCT):
        return LABEL
    if name.folder_kind:
        return name.folder_kind[1]
    return IMAGE if label_core(name.stem) is None or name.ending == SERIES else LABEL


def _put(layout: Layout, kind: str, case: str, rest: str, name: Name) -> None:
    files = (layout.images if kind == IMAGE else layout.labels)[case]
    if rest in files:
        other = replace(name, path=files[rest])
        raise UserError(f"{name}: case {case} is there twice, also as {other}: take one away")
    files[rest] = name.path
    if name.part and kind == IMAGE:
        layout.parts[case] = name.part


def _fill_flat(layout: Layout, files: Mapping[str, Sequence[Name]], channels: Sequence[str] | None) -> None:
    """Files that lie among those of other cases, see `pairs`."""
    for kind, found in zip((IMAGE, LABEL), pair(files[IMAGE], files[LABEL], channels), strict=True):
        for case, rest, name in found:
            _put(layout, kind, case, rest, name)


def _fill_case(layout: Layout, kind: str, case: str, files: Sequence[Name], stacked: bool) -> None:
    """Files of one kind in a folder of their own: channels or classes, or slices of a volume."""
    series = [name for name in files if name.ending == SERIES]
    slices = [name for name in files if name.ending in PICTURES]
    is_volume = kind == IMAGE and stacked or kind == LABEL and _volumes(layout.images.get(case, {}).values())
    if len(slices) > 1 and len(slices) == len(files) and is_volume:
        files = [replace(slices[0], path=os.path.dirname(slices[0].path) + STACK)]
    elif kind == IMAGE and len(slices) > 1 and len({re.sub(r"\d+", "", name.stem) for name in slices}) == 1:
        raise UserError(
            f"{os.path.dirname(str(slices[0]))}: {len(slices)} numbered pictures: say the size of their voxels with"
            f" --spacing X Y Z (mm), and they are slices of a volume"
        )
    elif len(series) > 1:  # which is which, their headers say
        files = [name for name in files if name.ending != SERIES]
        files.append(
            replace(series[0], path=os.path.commonpath([name.path.removesuffix(SERIES) for name in series]) + SERIES)
        )
    for name in files:
        stem = name.stem if kind == IMAGE else label_core(name.stem) if label_core(name.stem) is not None else name.stem
        below = [] if name.ending in (SERIES, STACK) or kind == LABEL else _below(name, case)
        rest = "" if name.ending in (SERIES, STACK) else "_".join([*below, without_case(stem, case)])
        _put(layout, kind, case, rest, name)


def _below(name: Name, case: str) -> list[str]:
    """Folders between that of the case and the file, less those that are named for a kind."""
    folders = list(name.folders)
    start = next((i for i in reversed(range(len(folders))) if folders[i] == case), len(folders) - 1)
    return [folder for folder in folders[start + 1 :] if not kind_of(folder)]


def _volumes(paths: Iterable[str]) -> bool:
    return all(Name(path).ending not in PICTURES for path in paths)
