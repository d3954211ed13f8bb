"""Find images, channels and labels of each case from the names of files. Nothing is opened.

These layouts are known and tried in this order: names in BIDS style; a single case; a folder for each channel; folders
for images and folders for labels; labels that have the names of images and lie in other folders; a folder for each
case. If none fits, the source counts as one folder for all cases.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.dicom_folders import case_folders, without_channels
from nnunet_semiseg.raw_datasets.filling import Layout, by_kind, fill_case, fill_flat, fill_groups, is_label, put
from nnunet_semiseg.raw_datasets.names import (
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
    label_core,
    natural,
    part_of,
)
from nnunet_semiseg.raw_datasets.pairs import choose_channels

MANY_CHANNELS = 8
"""If more images than this lie beside one label, they are not channels of one case."""


def recognise(
    paths: Iterable[str],
    channels: Sequence[str] | None = None,
    stacked: bool = False,
    source: str = "",
    classes: Sequence[str] | None = None,
) -> Layout:
    """Find the cases from relative paths.

    Args:
        paths: the paths of files that can be read, with slashes; see `listing` for the names of DICOM folders.
        channels: the names of the wanted channels, in this order. None: the channels that all labelled cases have.
        stacked: whether pictures in the folder of a case are the slices of a volume.
        source: the folder, for messages.
        classes: the wanted classes. If masks have these names, each is the mask of its class.

    Raises:
        UserError: the names have no clear meaning: two cases have the same name, or a label has no image, or a channel
            has no files.
    """
    paths = sorted(paths, key=natural)
    root = common_root(paths)
    names = [Name(path, root, source) for path in paths]
    if not any(map(is_label, names)):  # images/c1.nii.gz and images/c1_seg.nii.gz
        names = [replace(name, by_folder=False) for name in names]
    layout = (
        _bids(names)
        or _one_case(names, channels, stacked)
        or _folders_of_channels(names)
        or _folders_of_kinds(names, channels, stacked)
        or _apart(names, channels)
        or _folders_of_cases(names, channels, stacked)
        or _one_folder(names, channels)
    )
    _check_labels(layout, source, classes)
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
        f"{folder}/" if (folder := path.removesuffix(SERIES).removesuffix(STACK)) else ""  # the source itself
        for path in used
        if path.endswith((SERIES, STACK))
    )
    inside = {path for path in paths if path.endswith((SERIES, *PICTURES)) and path.startswith(folders)}
    return [path for path in paths if path not in used and path not in layout.left_out and path not in inside]


def _check_labels(layout: Layout, source: str, classes: Sequence[str] | None) -> None:
    alone = {case: files for case, files in layout.labels.items() if case not in layout.images}
    lines = [
        f"{os.path.join(source, next(iter(files.values())))}: no image of case {case}: rename this label, or remove it"
        for case, files in list(alone.items())[:5]
    ]
    if lines:
        raise UserError("\n".join(lines))
    wanted = {name.casefold() for name in classes or ()}
    names = [name for files in layout.labels.values() for name in files]
    if all("" in files for files in layout.labels.values()) and not wanted & {name.casefold() for name in names}:
        for files in layout.labels.values():  # brain_mask.nii.gz beside seg.nii.gz
            beside = [files.pop(name) for name in set(files) - {""}]
            layout.left_out |= dict.fromkeys(beside, "beside a label of the whole case")
        return
    different = sorted(set(names), key=natural)
    are_classes = len(wanted) > 1 and {name.casefold() for name in names} <= wanted
    if len(names) == len(layout.labels) and not (are_classes or 1 < len(different) <= len(names) / 2):
        for case, files in layout.labels.items():  # one label for each case, whatever its name
            layout.labels[case] = {"": next(iter(files.values()))}
        layout.joined = tuple(different) if len(different) > 1 else ()


# --------------------------------------------------------------------------------------------------------------- BIDS


def _bids(names: Sequence[Name]) -> Layout | None:
    """Recognise BIDS: `sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz`, with labels there or in `derivatives`."""
    files = [name for name in names if re.match(r"sub-[^_]+_", name.stem)]
    if len(files) * 2 < len(names) or not files:
        return None
    layout = Layout("BIDS names")
    layout.left_out = {name.path: "its name is not in BIDS style" for name in names if name not in files}
    for name in files:
        words = name.stem.split("_")
        case = "_".join(word for word in words if word.startswith(("sub-", "ses-")))
        rest = "_".join(word for word in words if not word.startswith(("sub-", "ses-")))
        kind = LABEL if is_label(name) else IMAGE
        if kind == IMAGE and "derivatives" in name.folders:
            layout.left_out[name.path] = "a derivative that is not a label"
            continue
        put(layout, kind, case, (label_core(rest) or "").split("label-")[-1] if kind == LABEL else rest, name)
        layout.patients[case] = words[0]
    return layout


# ----------------------------------------------------------------------------------------------------------- one case


def _one_case(names: Sequence[Name], channels: Sequence[str] | None, stacked: bool) -> Layout | None:
    """Recognise a single case, or one DICOM study.

    Its files lie beside each other: `t1.nii.gz`, `t2.nii.gz` and `seg.nii.gz`, or a folder with masks instead of
    `seg.nii.gz`.
    """
    images, labels = by_kind(names)
    if not images or not labels:
        return None
    nameless = all(label_core(name.stem) == "" or name.ending in (DICOM_SEG, RTSTRUCT) for name in labels)
    if any(name.ending == SERIES for name in images):
        slices = len(labels) > 1 and all(name.ending in PICTURES for name in labels)
        known = {folder for name in images for folder in (*name.folders, name.stem)}
        keys = case_folders(names, channels)
        matched = any(keys[name] or {name.stem, *name.folders} & known for name in labels)
        alone = (nameless or slices) and not matched
    else:
        stems = {name.stem.casefold() for name in images}
        chosen = stems == {channel.casefold() for channel in channels or ()}
        masks = len(images) == 1 < len(labels) and not images[0].folder_kind
        matched = any((label_core(name.stem) or name.stem).casefold() in stems for name in labels)
        alone = (nameless and len(images) <= MANY_CHANNELS) or ((chosen or masks) and not matched)
        alone = alone and len({name.folders for name in images}) == 1
    if not alone:
        return None
    above = [*os.path.split(names[0].source)[1:], *names[0].path.split("/")[: names[0].skip]]
    case = next((folder for folder in reversed(above) if folder and not folder.startswith(".")), "case")
    layout = Layout("a folder of one case")
    fill_case(layout, case, names, stacked)
    return layout


# ------------------------------------------------------------------------------------------- a folder for each channel


def _folders_of_channels(names: Sequence[Name]) -> Layout | None:
    """Recognise a folder for each channel: `t1/c1.nii.gz`, `t2/c1.nii.gz` and `labels/c1.nii.gz`.

    These folders may be in folders for training and test.
    """
    images, labels = by_kind(names)
    places: dict[tuple, dict[str, Name]] = defaultdict(dict)
    for name in images:
        if name.folders and not part_of(name.folders[-1]) and name.ending != SERIES:
            channel = name.folders[-1]
            stem = re.sub(rf"(?i)[_-]{re.escape(channel)}$", "", name.stem)
            places[(*name.folders[:-1], stem)][channel] = name
    found = {channel for files in places.values() for channel in files}
    in_several = sum(len(files) for files in places.values() if len(files) > 1)
    stems = {place[-1] for place in places}
    cores = {name: label_core(name.stem) or name.stem for name in labels}
    cases = [own if own in stems else name.stem for name, own in cores.items()]
    own = all(found.isdisjoint(name.folders) for name in labels)
    if not (labels and own and in_several * 2 > len(images) and set(cases) <= stems and len(set(cases)) == len(cases)):
        return None
    twice = Counter(place[-1] for place in places)
    layout = Layout("a folder for each channel")
    for (*_, stem), files in places.items():
        for channel, name in files.items():
            put(layout, IMAGE, f"{name.part or 'train'}_{stem}" if twice[stem] > 1 else stem, channel, name)
    for case, name in zip(cases, labels, strict=True):
        put(layout, LABEL, f"{name.part or 'train'}_{case}" if twice[case] > 1 else case, "", name)
    return layout


# ------------------------------------------------------------------------------ folders of images, folders of labels


def _folders_of_kinds(names: Sequence[Name], channels: Sequence[str] | None, stacked: bool) -> Layout | None:
    """Recognise folders for images and for labels: `images/c1.nii.gz` and `labels/c1.nii.gz`.

    There may be parts (`imagesTs`, `test/images`) or folders of cases.
    """
    above = {name.above for name in names if name.folder_kind and name.folder_kind[1] == IMAGE}
    in_parts = all(not folders or any(map(part_of, folders)) for folders in above)  # images and test/images, too
    if not above or (len(above) > 1 and not in_parts):
        return None
    layout = Layout("folders of images and of labels")
    beside = [name for name in names if not name.folder_kind and name.part in (None, "train")]
    layout.left_out = {name.path: "beside the folders of images and labels" for name in beside}
    flat = [name for name in names if name not in beside and not name.below]
    nested = [name for name in names if name.below]
    parts = defaultdict(list)
    for name in flat:
        parts[name.part or "train"].append(name)
    stems = [stem for files in parts.values() for stem in {name.stem for name in files if not is_label(name)}]
    if len(set(stems)) < len(stems):  # train/images/1.png and test/images/1.png
        fill_groups(layout, parts, channels, patients=False)
    else:
        fill_flat(layout, flat, channels)
    groups = defaultdict(list)
    if _slice_by_slice(nested, stacked):
        layout.kind += ", with folders therein"
        for name in nested:
            groups["_".join(name.below)].append(name)
        fill_groups(layout, groups, channels)
        return layout
    for name in nested:
        groups[name.below[0]].append(name)
    for case, files in groups.items():
        fill_case(layout, case, files, stacked)
    if any(not is_label(name) for name in nested):
        layout.kind += ", with a folder for each case"
    return layout


def _slice_by_slice(names: Sequence[Name], stacked: bool) -> bool:
    """Whether each image in a folder is a case: then a folder has several labels, each named like an image."""
    images, labels = by_kind(names)
    if not images or (stacked and all(name.ending in PICTURES for name in images)):
        return False
    known = {(name.below, core(name.stem)) for name in images}
    found = [(name.below, core(label_core(name.stem) or name.stem)) for name in labels]
    several = len({folders for folders, _ in found}) < len(found)
    return several and sum(key in known for key in found) * 2 > len(found)


# ---------------------------------------------------------------------------------------------------- labels elsewhere


def _apart(names: Sequence[Name], channels: Sequence[str] | None) -> Layout | None:
    """Recognise labels that have the names of images and lie in other folders.

    An example: `Training_Input/c1.jpg` and `Training_Truth/c1_mask.png`.
    """
    images, labels = by_kind(names)
    if any(name.ending == SERIES for name in images) or len({name.stem for name in images}) < len(images):
        return None
    folders = {name.stem[: end.start()]: name.folders for name in images for end in re.finditer(r"[_-]|$", name.stem)}
    apart = 0
    for name in labels:
        found = folders.get(label_core(name.stem) or name.stem)
        apart += found is not None and name.folders[: len(found)] != found
    return _one_folder(names, channels) if apart * 2 > len(labels) else None


# ---------------------------------------------------------------------------------------------- a folder for each case


def _folders_of_cases(names: Sequence[Name], channels: Sequence[str] | None, stacked: bool) -> Layout | None:
    """Recognise a folder for each case: `P1/P1_t1ce.nii.gz`, `P1/P1_seg.nii.gz`, also with subfolders.

    Some labels may be in `labels/P1.nii.gz`.
    """
    dicom = any(name.ending == SERIES for name in names)
    keys = case_folders(names, channels) if dicom else {name: name.above for name in names}
    of_labels = {keys[name] for name in names if is_label(name)}
    for name, key in keys.items():  # P1/T1/a.nii.gz beside P1/seg.nii.gz
        keys[name] = next((key[:n] for n in range(1, len(key)) if key[:n] in of_labels), key)
    folders = {keys[name] for name in names if keys[name] and not is_label(name)}
    if len(folders) < 2 and not dicom:
        return None
    groups: dict[tuple[str, ...], list[Name]] = defaultdict(list)
    for name in names:
        groups[keys[name]].append(name)
    alone = groups.pop((), [])
    others = [name for key in without_channels(groups, channels) for name in groups.pop(key)]
    folders &= groups.keys()
    cases = _name_folders(folders | {key for key in groups if key})
    layout = Layout(f"{len(folders)} folders of cases")
    layout.left_out = {name.path: f"in no folder with the name {' or '.join(channels or ())}" for name in others}
    if _several_pairs(groups):
        layout.kind = f"{len(folders)} folders of several cases each"
        fill_groups(layout, {cases[key]: files for key, files in groups.items()}, channels)
        return layout
    for key, files in groups.items():
        fill_case(layout, cases[key], files, stacked)
        if len(key) > 1 and is_session(key[-1], key[-2]):
            layout.patients[cases[key]] = key[-2]
        if part := next((part for folder in reversed(key[:-1]) if (part := part_of(folder))), None):
            layout.parts[cases[key]] = part
    for name in alone:
        if is_label(name):
            put(layout, LABEL, label_core(name.stem) or name.stem, "", name)
        else:
            layout.left_out[name.path] = "beside the folders of cases"
    return layout


def _name_folders(keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Name each case after its last folder. A folder above is added for a visit, or if two names would be equal."""
    keys = set(keys)
    names = {}
    for key in keys:
        length = 1
        while length < len(key) and (
            (length == 1 and is_session(*key[:-3:-1])) or sum(other[-length:] == key[-length:] for other in keys) > 1
        ):
            length += 1
        names[key] = "_".join(key[-length:])
    return names


def _several_pairs(groups: Mapping[tuple[str, ...], Sequence[Name]]) -> bool:
    """Whether a folder has several labels, each with the name of an image or the beginning of such a name."""
    pairs = []
    for files in groups.values():
        stems = [name.stem for name in files if not is_label(name) and name.ending != SERIES]
        known = {stem[: end.start()] for stem in stems for end in re.finditer(r"[_-]|$", stem)} | set(map(core, stems))
        own = [label_core(name.stem) or name.stem for name in files if is_label(name)]
        pairs.append(len({label for label in own if label in known}))
    return max(pairs, default=0) > 1


# ------------------------------------------------------------------------------------------------- one folder for all


def _one_folder(names: Sequence[Name], channels: Sequence[str] | None) -> Layout:
    """Recognise one folder for all cases.

    Examples: `c1.nii.gz` and `c1_seg.nii.gz`; `volume-1.nii` and `segmentation-1.nii`; or images alone.
    """
    layout = Layout("one folder for images and labels" if any(is_label(n) for n in names) else "a folder of images")
    fill_flat(layout, names, channels)
    return layout
