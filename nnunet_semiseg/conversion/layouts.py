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
    layout.left_out |= dict.fromkeys(_unused(paths, layout), "of no case")
    return replace(layout, images=dict(sorted(layout.images.items())), labels=dict(sorted(layout.labels.items())))


def _unused(paths: Sequence[str], layout: Layout) -> list[str]:
    used = {path for files in (*layout.images.values(), *layout.labels.values()) for path in files.values()}
    folders = tuple(
        f"{path.removesuffix(SERIES).removesuffix(STACK)}/" for path in used if path.endswith((SERIES, STACK))
    )
    return [p for p in paths if p not in used and p not in layout.left_out and not p.startswith(folders)]


def _check_labels(layout: Layout, source: str) -> None:
    alone = {case: files for case, files in layout.labels.items() if case not in layout.images}
    lines = [
        f"{os.path.join(source, next(iter(files.values())))}: no image of case {case}: rename it, or take it away"
        for case, files in list(alone.items())[:5]
    ]
    if lines:
        raise UserError("\n".join(lines))
    names = [name for files in layout.labels.values() for name in files]
    if len(names) == len(layout.labels) and not 1 < len(set(names)) <= len(names) / 2:
        for case, files in layout.labels.items():  # one label a case, whatever it is called
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
    above = {name.above for name in names if name.folder_kind and name.folder_kind[1] == IMAGE}
    in_parts = all(any(map(part_of, folders)) for folders in above)
    if not above or (len(above) > 1 and not in_parts):
        return None
    layout = Layout("folders of images and of labels")
    beside = [name for name in names if not name.folder_kind and name.part in (None, "train")]
    layout.left_out = {name.path: "beside the folders of images and labels" for name in beside}
    flat = [name for name in names if name not in beside and not name.below]
    nested = [name for name in names if name.below]
    _fill_flat(layout, flat, channels)
    groups = defaultdict(list)
    if _slice_by_slice(nested, stacked):
        layout.kind += ", with folders therein"
        for name in nested:
            groups["_".join(name.below)].append(name)
        _fill_groups(layout, groups, channels)
        return layout
    for name in nested:
        groups[name.below[0]].append(name)
    for case, files in groups.items():
        _fill_case(layout, case, files, stacked)
    if any(_kind(name) == IMAGE for name in nested):
        layout.kind += ", with a folder a case"
    return layout


def _slice_by_slice(names: Sequence[Name], stacked: bool) -> bool:
    """Whether files in folders are cases of their own: several labels in a folder, each named as an image is."""
    images, labels = ([name for name in names if _kind(name) == kind] for kind in (IMAGE, LABEL))
    if not images or (stacked and all(name.ending in PICTURES for name in images)):
        return False
    known = {(name.below, core(name.stem)) for name in images}
    found = [(name.below, core(label_core(name.stem) or name.stem)) for name in labels]
    several = len({folders for folders, _ in found}) < len(found)
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
        _fill_groups(layout, {cases[key]: files for key, files in groups.items()}, channels)
        return layout
    for key, files in groups.items():
        _fill_case(layout, cases[key], files, stacked)
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
    return name.above


def _name_folders(keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The last folder of each, with those above where it is a session's or would be another case's, too."""
    keys = set(keys)
    names = {}
    for key in keys:
        length = 1
        while length < len(key) and (
            (length == 1 and is_session(key[-1])) or sum(other[-length:] == key[-length:] for other in keys) > 1
        ):
            length += 1
        names[key] = "_".join(key[-length:])
    return names


def _several_pairs(groups: Mapping[tuple[str, ...], Sequence[Name]]) -> bool:
    """Whether a folder holds several images, each with a label that is named like it alone."""
    pairs = []
    for files in groups.values():
        images = {name.stem for name in files if _kind(name) == IMAGE and name.ending != SERIES}
        labels = [label_core(name.stem) or name.stem for name in files if _kind(name) == LABEL]
        pairs.append(sum(label in images for label in labels))
    return max(pairs, default=0) > 1


# ------------------------------------------------------------------------------------------------- one folder for all


def _one_folder(names: Sequence[Name], channels: Sequence[str] | None) -> Layout:
    """`c1.nii.gz` and `c1_seg.nii.gz`, `volume-1.nii` and `segmentation-1.nii`; or images alone."""
    layout = Layout(
        "one folder for images and labels" if any(_kind(n) == LABEL for n in names) else "a folder of images"
    )
    _fill_flat(layout, names, channels)
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


def _fill_flat(layout: Layout, names: Sequence[Name], channels: Sequence[str] | None) -> None:
    """Files that lie among those of other cases, see `pairs`."""
    images, labels = ([name for name in names if _kind(name) == kind] for kind in (IMAGE, LABEL))
    for kind, found in zip((IMAGE, LABEL), pair(images, labels, channels), strict=True):
        for case, rest, name in found:
            _put(layout, kind, case, rest, name)


def _fill_groups(layout: Layout, groups: Mapping[str, Sequence[Name]], channels: Sequence[str] | None) -> None:
    """Files of several cases in the folder of a patient, which comes into a name that would be another case's, too."""
    found = {}
    for patient, names in groups.items():
        found[patient] = Layout("")
        _fill_flat(found[patient], names, channels)
    cases = [case for own in found.values() for case in own.images]
    for patient, own in found.items():
        prefix = f"{patient}_" if len(set(cases)) < len(cases) else ""
        layout.images |= {prefix + case: files for case, files in own.images.items()}
        layout.labels |= {prefix + case: files for case, files in own.labels.items()}
        layout.parts |= {prefix + case: part for case, part in own.parts.items()}
        layout.patients |= {prefix + case: patient for case in own.images}


def _fill_case(layout: Layout, case: str, names: Sequence[Name], stacked: bool) -> None:
    """Files in a folder of their own: channels and classes, or slices of a volume."""
    images, labels = ([name for name in names if _kind(name) == kind] for kind in (IMAGE, LABEL))
    series = [name for name in images if name.ending == SERIES]
    if _are_slices(images) and stacked:
        images = [_folder_of(images)]
    elif _are_slices(images) and len({re.sub(r"\d+", "", name.stem) for name in images}) == 1:
        raise UserError(
            f"{os.path.dirname(str(images[0]))}: {len(images)} numbered pictures: say the size of their voxels with"
            f" --spacing X Y Z (mm), and they are slices of a volume"
        )
    elif len(series) > 1:  # which is which, their headers say
        folder = os.path.commonpath([name.path.removesuffix(SERIES) for name in series])
        images = [name for name in images if name.ending != SERIES] + [replace(series[0], path=folder + SERIES)]
    if _are_slices(labels) and not any(name.ending in PICTURES for name in images):
        labels = [_folder_of(labels)]
    for name in images:
        rest = "_".join([*_folders_within(name, case), without_case(name.stem, case)])
        _put(layout, IMAGE, case, "" if name.ending in (SERIES, STACK) else rest, name)
    for name in labels:
        own = label_core(name.stem)
        rest = without_case(name.stem if own is None else own, case)
        _put(layout, LABEL, case, "" if name.ending in (SERIES, STACK) else rest, name)


def _are_slices(names: Sequence[Name]) -> bool:
    return len(names) > 1 and all(name.ending in PICTURES for name in names)


def _folder_of(slices: Sequence[Name]) -> Name:
    """What stands for the slices of a volume."""
    folders = sorted({os.path.dirname(name.path) for name in slices})
    if len(folders) > 1:
        raise UserError(f"{slices[0]}: slices of one volume in {' and '.join(folders)}: put them into one folder")
    return replace(slices[0], path=folders[0] + STACK)


def _folders_within(name: Name, case: str) -> list[str]:
    """Folders between that of the case and the file, less those that are named for a kind."""
    folders = list(name.folders)
    start = next((i for i in reversed(range(len(folders))) if folders[i] == case), len(folders) - 1)
    return [folder for folder in folders[start + 1 :] if not kind_of(folder)]
