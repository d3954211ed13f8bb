"""If the files of all cases are in one folder, find out which belong together, and which channels there are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.names import Name, core, label_core, natural, some

Placed = list[tuple[str, str, Name]]
"""A list of files, each with its case and its channel or class."""


def pair(images: Sequence[Name], labels: Sequence[Name], suffixes: Sequence[str]) -> tuple[Placed, Placed]:
    """Find the case of each image and each label in a folder.

    The suffixes of channels (see `find_suffixes`) and the common parts of names show which files belong together.
    """
    placed_images: Placed = []
    for name in images:
        match = re.fullmatch(rf"(.+?)[_-]({'|'.join(map(re.escape, suffixes))})", name.stem, re.IGNORECASE)
        case, channel = (match[1], match[2]) if suffixes and match else (name.stem, "")
        if suffixes == ["0000"]:
            channel = ""  # one file with all of its channels
        placed_images.append((case, _as_written(channel, suffixes), name))
    cases = {case for case, _, _ in placed_images}
    cores = {core(case): case for case in cases}
    placed_labels: Placed = []
    for name in labels:
        stem = name.stem.removesuffix("_0000") if name.stem not in cases else name.stem
        own = label_core(stem)
        ways = (stem, own or stem, cores.get(core(own or stem)), cores.get(core(stem)))
        placed_labels.append((next((way for way in ways if way in cases), own or stem), "", name))
    return placed_images, placed_labels


def find_suffixes(images: Sequence[Name], labels: Sequence[Name], channels: Sequence[str] | None) -> list[str]:
    """The suffixes of names that stand for channels.

    They are numbers (`_0000`), or the names of the wanted channels after `_` or `-`. If the user names no channels, a
    suffix is what the name of an image has in addition to the name of its label.
    """
    stems = [name.stem for name in images]
    if stems and all(stem.endswith("_0000") for stem in stems):
        return ["0000"]
    if channels:
        for suffixes in ([f"{i:04d}" for i in range(len(channels))], list(channels)):
            ends = tuple(f"{sep}{suffix.casefold()}" for suffix in suffixes for sep in "_-")
            fitting = sum(stem.casefold().endswith(ends) for stem in stems)
            if fitting == len(stems) or (len(channels) > 1 and fitting * 2 >= len(stems)):
                return suffixes
        return []
    found: Counter[str] = Counter()
    known = set(stems)
    cases = [label_core(label.stem) or label.stem for label in labels]
    if not known.isdisjoint(cases) or any(label.stem in known for label in labels):
        return []
    for case in cases:
        begins = re.compile(rf"{re.escape(case)}[_-](.+)", re.IGNORECASE)
        found.update(match[1] for stem in stems if (match := begins.fullmatch(stem)))
    return sorted((suffix for suffix, n in found.items() if n * 2 > len(cases)), key=natural)


def _as_written(channel: str, suffixes: Sequence[str]) -> str:
    return next((suffix for suffix in suffixes if suffix.casefold() == channel.casefold()), channel)


def choose_channels(
    images: dict[str, dict[str, str]], labels: Mapping[str, object], wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Choose the channels and their order. `images` is reduced to these channels.

    Returns the channels, and the files of other channels with the reason why they are not used.

    Args:
        wanted: the names of the channels. None: the channels that every labelled case has.

    Raises:
        UserError: a name fits no channel of the files, or several; or there is no channel that all labelled cases have.
    """
    found = Counter(channel for files in images.values() for channel in files)
    if not images or found.keys() <= {""}:
        return tuple(wanted or ()), {}
    if all(len(files) == 1 for files in images.values()) and len(wanted or ("",)) == 1:
        if len(found) > 1 or wanted:  # if there is one image for each case, its name does not matter
            for case, files in images.items():
                images[case] = {(wanted or ("",))[0]: next(iter(files.values()))}
            return tuple(wanted or ()), {}
    keys = _match(list(found), wanted) if wanted else _shared(images, labels, found)
    left_out = {}
    for case, files in images.items():
        why = "is not named with --channels" if wanted else "is missing in some labelled case"
        left_out |= {
            path: f"channel {name} {why}" for name, path in files.items() if name and name not in keys.values()
        }
        chosen = {channel: files[key] for channel, key in keys.items() if key in files}
        images[case] = chosen or {"": next(iter(files.values()))}
    return tuple(keys), left_out


def _shared(images: Mapping, labels: Mapping, found: Mapping[str, int]) -> dict[str, str]:
    labelled = [set(files) for case, files in images.items() if case in labels] or [set(f) for f in images.values()]
    shared = set.intersection(*labelled) - {""}
    if not shared:
        names = [f"{name} ({n} cases)" for name, n in found.items() if name]
        raise UserError(
            f"no channel is in every labelled case: choose channels with --channels, from {some(names, 10)}"
        )
    return {name: name for name in sorted(shared, key=natural)}


def _match(found: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """For each wanted channel, the name in the files.

    The name is the same word, or ends with this word, or is the number of the channel.
    """
    keys = {}
    for i, channel in enumerate(wanted):
        same = [name for name in found if name.casefold() == channel.casefold()]
        same = same or [name for name in found if re.split(r"[_-]", name.casefold())[-1] == channel.casefold()]
        same = same or [name for name in found if name == f"{i:04d}"]
        if len(same) != 1:
            known = some([name for name in found if name], 10)
            what = f"fits {' and '.join(same)}" if same else "is not the name of a channel"
            raise UserError(f"--channels {channel}: {what}: use names of the channels in the files: {known}")
        keys[channel] = same[0]
    return keys
