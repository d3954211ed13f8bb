"""Find out which DICOM series belong to which case. A case is a patient, a visit, or a series with its own label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from nnunet_semiseg.raw_datasets.filling import is_label
from nnunet_semiseg.raw_datasets.names import SERIES, Name, is_visit, part_of, plain

Folders = tuple[str, ...]


def case_folders(names: Iterable[Name], channels: Sequence[str] | None) -> dict[Name, Folders]:
    """For each file, the folder of the case that it belongs to. Empty if it is in no such folder.

    The folder of a case is the uppermost folder below those of training and test, such as `P1`. But each folder in it
    is a case of its own

    - if the uppermost folder has the name of a wanted channel: `CT/1` and `CT/2` are two cases;
    - if several of the folders in it have their own label: `P1/T1` and `P1/T2` are two cases, and folders beside `P1`
      are divided, too;
    - if the folders in it are visits, and a case has several: `P1/2020-01-05` and `P1/2021-02-03` are two cases.

    A folder of a case is divided further by the same rules: `MR/2/T1`.
    """
    names = list(names)
    starts, places = {}, {}
    for name in names:
        path = (*name.folders, name.stem) if name.ending == SERIES else name.folders
        starts[name] = next((i for i, folder in enumerate(path) if not part_of(folder)), len(path))
        places[name] = path[starts[name] :]
    series = {places[name] for name in names if name.ending == SERIES}
    above_series = {place[:n] for place in series for n in range(len(place) + 1)}
    homes = {_longest(places[name], above_series) for name in names if is_label(name)}
    labelled = {home[:n] for home in homes for n in range(1, len(home) + 1)}
    keys = _split(series, labelled, {plain(channel) for channel in channels or ()})
    folders = {}
    for name in names:
        key = _longest(places[name], keys)
        if not (key or is_label(name) or (name.folder_kind and name.folder_kind[0] <= starts[name])):
            key = places[name][:1]  # an image in a folder without DICOM
        folders[name] = (*name.folders, name.stem)[: starts[name]] + key if key else ()
    return folders


def _longest(place: Folders, known: set[Folders]) -> Folders:
    return next((place[:n] for n in range(len(place), 0, -1) if place[:n] in known), ())


def _split(series: set[Folders], labelled: set[Folders], channels: set[str]) -> set[Folders]:
    """The folders of cases. The function begins with the uppermost folders, and divides them as often as necessary.

    Args:
        labelled: folders that contain a series and a label, at any depth.
        channels: the wanted channels, as `plain` spells them.
    """
    keys = {place[:1] for place in series}
    while True:
        inner: dict[Folders, set[Folders]] = defaultdict(set)
        for place in series:
            key = _longest(place, keys)
            if len(place) > len(key):
                inner[key].add(place[: len(key) + 1])
        visits = {key: sum(is_visit(folder[-1]) for folder in found) for key, found in inner.items()}
        brothers = {key[:-1] for key, found in inner.items() if len(found & labelled) > 1}
        several = max(visits.values(), default=0) > 1
        split = {key for key in inner if key[:-1] in brothers or (several and visits[key])}
        split |= {key for key, found in inner.items() if len(found) > 1 and plain(key[-1]) in channels}
        if not split:
            return keys
        keys = (keys - split).union(*(inner[key] for key in split))


def without_channels(groups: Mapping[Folders, Sequence[Name]], channels: Sequence[str] | None) -> list[Folders]:
    """The cases without a series of a wanted channel. Empty unless each of these channels is a folder (`CT`, `MR`)."""
    words = {
        key: {plain(folder) for name in names if name.ending == SERIES for folder in (*name.folders, name.stem)}
        for key, names in groups.items()
    }
    wanted = {plain(channel) for channel in channels or ()}
    if not wanted or not wanted <= set().union(*words.values()):
        return []
    return [key for key, own in words.items() if own and not any(w in word for w in wanted for word in own)]
