"""Find out what the values of the user's own labels mean, and choose how a label is read."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import SimpleITK as sitk

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.case import load
from nnunet_semiseg.raw_datasets.description import About, Read
from nnunet_semiseg.raw_datasets.dicom_labels import classes_in
from nnunet_semiseg.raw_datasets.filling import Layout
from nnunet_semiseg.raw_datasets.label_values import LabelValues, count, found_text, offer, values_text
from nnunet_semiseg.raw_datasets.names import DICOM_SEG, RTSTRUCT, SERIES, STACK, Name, some
from nnunet_semiseg.raw_datasets.pictures import mode_of, read_colour_mask, read_colours, read_mask
from nnunet_semiseg.raw_datasets.readers import one_channel
from nnunet_semiseg.raw_datasets.repair import Repair

FEW, MANY = 3, 50
"""How many labels are read before anything is made, and how many are counted if none of the first ones fits."""


class Labels:
    """What the values of the labels mean.

    Args:
        place: a function that takes a name in the layout and returns its file or folder.
        values: what the user says about label values. None: they are 0, 1, 2, ..., or as in a `dataset.json`.
        repair: what may be changed in a label.

    Attributes:
        classes: the classes that have a mask each. Empty: a label holds all classes.
        names: the names of the classes, in the order of their values, without the background. `name_classes` sets
            them. Empty if a `dataset.json` names the classes.
    """

    def __init__(self, place: Callable[[str], Path], values: LabelValues | None, repair: Repair):
        self.place, self.values, self.repair = place, values, repair
        self.classes: tuple[str, ...] = ()
        self.names: list[str] = []

    def name_classes(
        self,
        layout: Layout,
        labels: Sequence[str] | None,
        given: Mapping[str, int | tuple[int, ...]] | None,
        folder: Path,
    ) -> dict[str, int | tuple[int, ...]]:
        """Find the value of each class. `classes` and `names` are set, too.

        Args:
            labels: the names that the user gives.
            given: the labels of a `dataset.json` beside the images.
            folder: the folder of the user, for messages.

        Raises:
            UserError: there are no labels, or nothing says what their values mean, or options do not fit them.
        """
        self._choose_masks(layout, labels)
        if not layout.labels:
            raise UserError(
                f"{folder}: no file is a label: name label files CASE_seg, or put them into a folder labels"
            )
        if self.values:
            self.names = [name for name in self.values.names if self.values.names[name]]
            return dict(self.values.names)
        self.names = list(labels or self.classes)
        if self.names:
            return {"background": 0, **{name: i for i, name in enumerate(self.names, 1)}}
        if given:
            return dict(given)
        self._ask_for_names(layout, folder)

    def _choose_masks(self, layout: Layout, labels: Sequence[str] | None) -> None:
        """If each class has its own mask, set `classes`: to the names in `labels`, or else to those of all masks.

        The masks of other classes stay in `layout.labels`, and are also listed in `layout.left_out`.

        Raises:
            UserError: a name in `labels` has no mask; or `values` are given, which fit only labels with all classes.
        """
        several = {name for files in layout.labels.values() if set(files) != {""} for name in files}
        several -= {name for name in several if Name(name).ending in (DICOM_SEG, RTSTRUCT)}
        if not several:
            return
        if self.values:
            raise UserError("--label-values: each class has its own mask here: leave out this option, and use --labels")
        lacking = [name for name in labels or () if name.casefold() not in {n.casefold() for n in several}]
        if lacking:
            raise UserError(
                f"--labels {lacking[0]}: no mask has this name: use names of these: {some(sorted(several), 20)}"
            )
        self.classes = tuple(labels or sorted(several))
        chosen = {name.casefold() for name in self.classes}
        for files in layout.labels.values():
            others = (path for name, path in files.items() if name.casefold() not in chosen)
            layout.left_out |= dict.fromkeys(others, "a mask of a class that is not named with --labels")

    def _ask_for_names(self, layout: Layout, folder: Path) -> NoReturn:
        """Raise UserError, which shows the values of the first labels and asks what they mean."""
        file = next(path for files in layout.labels.values() for path in files.values())
        if Name(file).ending in (DICOM_SEG, RTSTRUCT):
            names = as_typed(classes_in(self.place(file)))
            raise UserError(f"{self.place(file)}: its classes have names: choose some of them with --labels {names}")
        plain = self._plain(layout, layout.labels)[:FEW]
        found = self._count(plain)
        if not found:  # pictures of slices and DICOM series are not counted
            if plain:
                self._loaded(plain[0])  # raises an error that says what is wrong with it
            raise UserError(f"{folder}: what do the label values mean? Name 1, 2, ... with --labels NAME1 NAME2 ...")
        if set(found) == set(range(len(found))):
            words = " ".join(f"NAME{i}" for i in range(1, len(found))) or "NAME1 NAME2 ..."
            raise UserError(
                f"{folder}: what do the label values mean? Found are {found_text(found)}: "
                f"name them with --labels {words}{hint_at_classes(layout)}"
            )
        raise UserError(f"{folder}: what do the label values mean? Found are {found_text(found)}: {offer(found)}")

    def label_values(self, names: Mapping[str, int | tuple[int, ...]]) -> Mapping[int, int] | None:
        """Which value in the files becomes which value of the dataset. None: they stay as they are.

        Args:
            names: the result of `name_classes`.
        """
        if self.values:
            mapped = {value: value for value in self.values.colours.values()}  # by the reader of colours
            return {**mapped, **self.values.grey}
        return {0: 0, 1: 1, 255: 1} if len(names) == 2 and not self.classes else None

    def check_values(self, layout: Layout, about: About, cases: Sequence[str]) -> None:
        """Raise UserError if all of the first labels have unknown values.

        If only some of them have unknown values, their cases fail later.

        Args:
            cases: the cases whose labels are used. Other labels are not opened.
        """
        plain = self._plain(layout, cases)
        known = set(about.label_map) | (set(self.values.colours) if self.values else set())
        counts = [counted for path in plain[:FEW] if (counted := self._count([path]))]
        if not self.values and about.label_map.get(255) == 1 and any(255 in counted for counted in counts):
            print("note: label value 255 is written as 1")
        if not counts or any(counted.keys() <= known for counted in counts):
            self._say_what_is_missing(plain, counts)
            return
        by_path = {path: self._count([path]) for path in plain[:MANY]}
        usual = sorted(len(counted) for counted in by_path.values())[len(by_path) // 2]
        smoothed = [path for path, counted in by_path.items() if len(counted) > max(10, 3 * usual)]
        found = sum((counted for path, counted in by_path.items() if path not in smoothed), Counter())
        where = plain[0].parent if len(plain) > 1 else plain[0]
        more = f"; {some(map(str, smoothed))} was smoothed and has more: save it again" if smoothed else ""
        if not self.values and self.names and set(found) == set(range(len(found))):
            names = " ".join(f"NAME{i}" for i in range(1, len(found)))
            plural = "s" if len(self.names) > 1 else ""
            raise UserError(
                f"{where}: label values found are {found_text(found)}, but --labels has {len(self.names)} name{plural}:"
                f" give a name for each with --labels {names}{more}"
            )
        raise UserError(
            f"{where}: label values found are {found_text(found)}, but there are names only for"
            f" {values_text(known)}: {offer(found, self.names)}{more}"
        )

    def _say_what_is_missing(self, plain: Sequence[Path], counts: Sequence[Counter]) -> None:
        """Print a line for each class of `--labels` that no label has, because users often give a name too many."""
        wanted = {value: name for value, name in enumerate(self.names, 1) if name != "ignore"}
        if self.values or self.classes or len(wanted) < 2:
            return
        found = set().union(*counts)
        for path in plain[FEW:MANY]:
            if found >= wanted.keys():
                break
            found |= self._count([path]).keys()
        looked = f"none of the first {MANY} labels" if len(plain) > MANY else "no label"
        for value in sorted(wanted.keys() - found):
            print(f"note: {looked} has a voxel of {wanted[value]} (value {value}): check --labels")

    def _plain(self, layout: Layout, cases: Iterable[str]) -> list[Path]:
        return [self.place(name) for name in plain_labels(layout, cases)]

    def _count(self, paths: Iterable[Path]) -> Counter:
        """Count voxels by value over files. A file that cannot be read is skipped; its case reports it later."""
        total: Counter = Counter()
        for path in paths:
            with contextlib.suppress(Exception):  # readers raise errors of many kinds
                colour = mode_of(path) in ("RGB", "RGBA") or (
                    mode_of(path) == "P" and self.values and self.values.colours
                )
                counted = count(read_colours(path) if colour else self._loaded(path))
                if colour and all(len(set(value)) == 1 for value in counted):  # grey, in three channels
                    counted = Counter({value[0]: n for value, n in counted.items()})
                total.update(counted)
        return total

    def _loaded(self, path: Path) -> sitk.Image:
        label = load(self.reader(path), [], self.repair)[0]
        return label if label.GetDimension() == 2 else one_channel(label, str(path))

    @property
    def read_picture(self) -> Callable[[Path], sitk.Image]:
        """A function that reads a picture of labels; see `read_any_mask`."""
        return partial(read_any_mask, colours=self.values.colours if self.values else {}, labels=tuple(self.names))

    def reader(self, path: Path) -> Path | Read:
        """The reader for a label. The path if SimpleITK can read it."""
        return Read(self.read_picture, (path,)) if mode_of(path) in ("P", "1", "LA", "PA", "RGB", "RGBA") else path


def plain_labels(layout: Layout, cases: Iterable[str]) -> list[str]:
    """The names of the labels that are one file with all classes, and neither DICOM nor a folder of slices."""
    labels = [layout.labels[case] for case in cases if case in layout.labels]
    names = (files[""] for files in labels if set(files) == {""})
    return [name for name in names if Name(name).ending not in (SERIES, STACK, DICOM_SEG, RTSTRUCT)]


def as_typed(names: Iterable[str]) -> str:
    """Join words as the user would type them in a shell."""
    return " ".join(f"'{name}'" if " " in name else name for name in names)


def hint_at_classes(layout: Layout) -> str:
    """A hint that says what to type if labels with different names belong to different classes.

    Empty if fewer than two of these names can be names of classes. A name with a digit is not taken for one.
    """
    named = [name for name in layout.joined if name and not any(c.isdecimal() for c in name)]
    return f"; if each is a class of its own, --labels {as_typed(named)}" if len(named) > 1 else ""


def read_any_mask(path: Path, colours: Mapping[tuple[int, int, int], int], labels: Sequence[str] = ()) -> sitk.Image:
    """Read a picture of labels. If it has colours, they decide which class a pixel has.

    The indices of a palette are read as values, unless the user names colours.

    Args:
        colours: the value of each colour. Empty: the user names none.
        labels: the names of the classes, for the message about an unknown colour.
    """
    mode = mode_of(path)
    if mode in ("RGB", "RGBA") or (mode == "P" and colours):
        return read_colour_mask(path, colours, labels)
    return read_mask(path) if mode in ("P", "1", "LA", "PA") else sitk.ReadImage(path)
