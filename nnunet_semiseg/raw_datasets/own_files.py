"""Choose how to read each file in the user's own folders, and describe the data set."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import SimpleITK as sitk

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.case import load
from nnunet_semiseg.raw_datasets.description import About, Case, Read
from nnunet_semiseg.raw_datasets.dicom_labels import classes_in, read_dicom_labels
from nnunet_semiseg.raw_datasets.filling import Layout
from nnunet_semiseg.raw_datasets.label_values import LabelValues, count, found_text, offer
from nnunet_semiseg.raw_datasets.names import DICOM_SEG, PICTURES, RTSTRUCT, SERIES, STACK, Name, some
from nnunet_semiseg.raw_datasets.pictures import mode_of, read_colour_mask, read_colours, read_jpeg, read_mask
from nnunet_semiseg.raw_datasets.readers import (
    find_modalities,
    find_series,
    one_channel,
    read_dicom_channel,
    read_dicom_picture,
    read_dicom_series,
    read_gray,
    read_grid,
)
from nnunet_semiseg.raw_datasets.repair import Repair
from nnunet_semiseg.raw_datasets.volumes import (
    read_channel,
    read_class_masks,
    read_mask_stack,
    read_stack,
    read_tiff_volume,
)

READABLE = (".nii.gz", ".nrrd", ".mha", ".gipl", ".nii", ".png", ".tif", ".bmp")  # by nnU-Net, as they are
FEW, MANY = 3, 50
"""How many labels are read before anything is made, and how many are counted if none of the first ones fits."""


def refuse(path: Path, why: str) -> NoReturn:
    """Raise an error in place of reading an image, so that this case fails and the others continue."""
    raise UserError(f"{path}: {why}")


@dataclass
class Files:
    """How to read the files of a layout.

    Args:
        place: a function that takes a name in the layout and returns its file or folder.
        values: what the user says about label values. None: they are 0, 1, 2, ...
        chosen: whether the user has named the channels.
    """

    channels: tuple[str, ...]
    spacing: tuple[float, ...] | None
    repair: Repair
    values: LabelValues | None
    place: Callable[[str], Path]
    chosen: bool = False
    dims: int = 3
    sizes: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    names: list[str] = field(default_factory=list)
    named: bool = False

    def describe(
        self,
        layout: Layout,
        labels: Sequence[str] | None,
        given: Mapping[str, int | tuple[int, ...]] | None,
        folder: Path,
    ) -> About:
        """Describe the dataset as far as it depends on the files.

        Raises:
            UserError: labels or channels need names. The message says what was found.
        """
        self.sizes = _sizes(self.place(name) for files in layout.images.values() for name in files.values())
        self._leave_out_4d(layout)
        images = [self.place(name) for files in layout.images.values() for name in files.values()]
        self.named = len(self.channels) > 1 and any("" not in files for files in layout.images.values())
        dims = Counter(min(len(self.sizes[path]), 3) for path in images if path in self.sizes)
        self.dims = dims.most_common(1)[0][0] if dims else 3
        self._check_channels(layout)
        names = self._classes(layout, labels, given, folder)
        ending = _file_ending(images, self.dims)
        return About(
            name="", title="Your own images", url="", licence="", citation="", layout="",
            protocol="cases with a label are labelled; --split or folders say which are for validation or a test",
            channels=self.channels,
            labels=names,
            prompts={name: name for name in names},
            file_ending=ending,
            dims=self.dims,
            label_values=self._label_values(names),
            repair=self.repair,
            notes=tuple(self._notes(layout, labels, ending)),
        )  # fmt: skip

    def _notes(self, layout: Layout, labels: Sequence[str] | None, ending: str) -> Iterable[str]:
        """Notes for the user: which files are written in another format, and how their names were understood."""
        images = [name for files in layout.images.values() for name in files.values()]
        plain = [name for files in layout.labels.values() if set(files) == {""} for name in files.values()]
        plain = [
            name for name in plain if Name(name).ending not in (SERIES, STACK, DICOM_SEG, RTSTRUCT)
        ]  # say so alone
        kinds = {SERIES: "DICOM series", STACK: "folders of pictures"}
        for what, found in (("", images), (" labels", plain)):
            other = Counter(name[-len(Name(name).ending) :] for name in found if not name.endswith(ending))
            for kind, n in other.items():
                yield f"{n} {kinds.get(kind, kind)}{what} are written as {ending}, voxel by voxel"
        if self.classes and not labels:
            yield f"each class has a mask of its own: choose some of them with --labels {_words(self.classes)}"
        if layout.joined:
            yield f"labels with different names are taken for the same: {some(layout.joined)}{_if_classes(layout)}"

    def case(self, case: str, layout: Layout) -> Case:
        """Describe a case, with a reader for each file that nnU-Net cannot read."""
        files = layout.images[case]
        images = tuple(self._images(files))
        label = layout.labels.get(case)
        return Case(case, images, self._label(label, files) if label else None)

    def _refuse_colours(self, layout: Layout) -> None:
        """Raise UserError if the first pictures are all in colour.

        If only one of them is in colour, its case fails later.
        """
        first = [self.place(next(iter(files.values()))) for files in list(layout.images.values())[:FEW]]
        for path in first:
            if mode_of(path) not in ("RGB", "RGBA"):
                return
            with contextlib.suppress(Exception):  # readers raise of many kinds
                read_gray(path)
                return
        raise UserError(
            f"{first[0]}: is a colour image: name its channels with --channels red green blue, or save it in grey"
        )

    def _leave_out_4d(self, layout: Layout) -> None:
        """Leave out images with four dimensions if most images have three.

        Such an image is a film whose frames are the cases, or an fMRI.
        """
        four = {path for path, size in self.sizes.items() if len(size) == 4 and size[3] > 1}
        if len(four) * 2 > len(self.sizes):
            return
        films = Counter(
            channel for files in layout.images.values() for channel, name in files.items() if self.place(name) in four
        )
        if not self.chosen and 0 < len(films) < len(self.channels):
            self.channels = layout.channels = tuple(channel for channel in self.channels if channel not in films)
            for files in layout.images.values():
                layout.left_out |= {files.pop(c): f"channel {c} has four dimensions" for c in films if c in files}
        if len(self.channels) > 1:
            return
        for case, files in list(layout.images.items()):
            if case not in layout.labels and any(self.place(name) in four for name in files.values()):
                why = "of four dimensions, and most images have three"
                layout.left_out |= dict.fromkeys(layout.images.pop(case).values(), why)
                layout.parts.pop(case, None)

    # -------------------------------------------------------------------------------------------------------- images

    def _images(self, files: Mapping[str, str]) -> Iterable[Path | Read]:
        if "" in files and self.named:
            why = f"its name ends with none of {', '.join(f'_{channel}' for channel in self.channels)}: rename it"
            yield Read(refuse, (self.place(files[""]),), {"why": f"{why}, or name all channels with --channels"})
            return
        if "" in files or len(self.channels) == 1:
            yield from self._of_one_file(next(iter(files.values())))
            return
        for channel in self.channels:
            if channel in files:
                yield self._image(files[channel], channel)
            else:
                path = self.place(next(iter(files.values())))
                yield Read(refuse, (path,), {"why": f"its case has no channel {channel}: rename or add the file"})

    def _of_one_file(self, name: str) -> Iterable[Path | Read]:
        """Yield a path or a reader for each channel of a file or of a DICOM folder."""
        path, n = self.place(name), len(self.channels)
        size = self.sizes.get(path, ())
        if len(size) == 4:
            if size[3] != n:
                why = f"is 4D, of {size[3]} volumes, but {n} channels are named: name as many with --channels"
                yield Read(refuse, (path,), {"why": why})
                return
            yield from (Read(read_channel, (path,), {"channel": i, "repair": self.repair}, True) for i in range(n))
        elif Name(name).ending == SERIES and n > 1:
            yield from (self._image(name, channel) for channel in self.channels)
        elif n > 1 and any(len(others) == 4 for others in self.sizes.values()) and len(size) == 3:
            yield Read(refuse, (path,), {"why": f"is 3D, but {n} channels are named: rename it, or remove it"})
        else:
            yield self._image(name, self.channels[0])

    def _image(self, name: str, channel: str) -> Path | Read:
        path, ending = self.place(name), Name(name).ending
        if ending == SERIES:
            return (
                Read(read_dicom_channel, (path,), {"channel": channel, "channels": self.channels})
                if path.is_dir()
                else Read(read_dicom_picture, (path,))
            )
        if ending == STACK:
            return Read(read_stack, (path,), {"spacing": self.spacing})
        if self.dims == 3 and ending in (".tif", ".tiff"):
            return Read(read_tiff_volume, (path,), {"spacing": self.spacing})
        if ending in (".jpg", ".jpeg"):
            return Read(read_jpeg, (path,), {"channels": len(self.channels)})
        mode = mode_of(path)
        if len(self.channels) > 1 or mode in (None, "L", "I;16", "I;16B", "I", "F") and ending != ".bmp":
            return path  # a grey BMP has a palette, which SimpleITK reads as colours
        return Read(read_mask if mode == "LA" else read_gray, (path,))

    def _check_channels(self, layout: Layout) -> None:
        """Raise UserError if channels need names. This is checked before anything is made."""
        if len(self.channels) > 1:
            return
        path = next(iter(next(iter(layout.images.values())).values()))
        place = self.place(path)
        several = sum(len(size) == 4 and size[3] > 1 for size in self.sizes.values())
        if several * 2 > len(self.sizes):
            file, size = next((file, size) for file, size in self.sizes.items() if len(size) == 4 and size[3] > 1)
            words = " ".join(f"NAME{i + 1}" for i in range(size[3]))
            raise UserError(
                f"{file}: is a 4D image of {size[3]} volumes: if they are channels, name them with --channels {words}"
            )
        self._refuse_colours(layout)
        if Name(path).ending == SERIES and place.is_dir() and not layout.channels and len(find_series(place)) > 1:
            read_dicom_series(place)  # says which there are
        series = {name: self.place(name) for files in layout.images.values() for name in files.values()}
        folders = [path for name, path in series.items() if Name(name).ending == SERIES and path.is_dir()]
        if not folders:
            return
        kinds = {path: find_modalities(path) for path in folders}
        if not set.intersection(*kinds.values()) and all(kinds.values()):
            cases = Counter(kind for found in kinds.values() for kind in found)
            text = " and ".join(f"{kind} ({n} cases)" for kind, n in sorted(cases.items()))
            raise UserError(
                f"{Path(os.path.commonpath(folders))}: holds DICOM images of different kinds, {text}: give the folder"
                f" of one kind with -i, or the names of its folders with --channels"
            )

    # -------------------------------------------------------------------------------------------------------- labels

    def _label(self, files: Mapping[str, str], images: Mapping[str, str]) -> Path | Read:
        grid = self.place(next(iter(images.values())))
        if all(Name(name).ending in (DICOM_SEG, RTSTRUCT) for name in files.values()):
            options = {"names": self.names, "read_image": partial(read_grid, channel=self.channels[0])}
            return Read(read_dicom_labels, (*map(self.place, files.values()), grid), options)
        if set(files) != {""} or self.classes:
            by_name = {name.casefold(): path for name, path in files.items()}
            there = [(name, by_name[name.casefold()]) for name in self.classes if name.casefold() in by_name]
            if not there:
                why = f"no mask of {some(self.classes)} beside it: rename it, or remove it"
                return Read(refuse, (self.place(next(iter(files.values()))),), {"why": why})
            values = [self.classes.index(name) + 1 for name, _ in there]
            missing = [name for name in self.classes if name.casefold() not in by_name]
            options = {"values": values, "names": [name for name, _ in there], "missing": missing}
            options["repair"] = self.repair
            return Read(read_class_masks, tuple(self.place(path) for _, path in there), options, True)
        name = files[""]
        path, ending = self.place(name), Name(name).ending
        if ending == SERIES:
            return Read(read_dicom_series, (path,)) if path.is_dir() else Read(read_dicom_picture, (path,))
        if ending == STACK:
            options = {"read_slice": self._read_picture, "channel": self.channels[0]}
            if Name(next(iter(images.values()))).ending == STACK:
                options["spacing"] = self.spacing
            return Read(read_mask_stack, (path, grid), options)
        if self.dims == 3 and ending in (".tif", ".tiff"):
            return Read(read_tiff_volume, (path,), {"spacing": self.spacing})
        reader = self._picture_reader(path)
        return Read(reader, (path,)) if reader else path

    @property
    def _read_picture(self) -> Callable[[Path], sitk.Image]:
        return partial(read_any_mask, colours=self.values.colours if self.values else {}, labels=tuple(self.names))

    def _picture_reader(self, path: Path) -> Callable[[Path], sitk.Image] | None:
        """Choose the reader for a picture. None if SimpleITK can read it."""
        return self._read_picture if mode_of(path) in ("P", "1", "LA", "PA", "RGB", "RGBA") else None

    def _classes(self, layout: Layout, labels, given, folder: Path) -> dict[str, int | tuple[int, ...]]:
        """Find the value of each class. If each class has its own mask, `classes` is set, too."""
        several = {name for files in layout.labels.values() if set(files) != {""} for name in files}
        several -= {name for name in several if Name(name).ending in (DICOM_SEG, RTSTRUCT)}
        if several and self.values:
            raise UserError("--label-values: each class has its own mask here: leave out this option, and use --labels")
        if several:
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
        file = next(path for files in layout.labels.values() for path in files.values())
        if Name(file).ending in (DICOM_SEG, RTSTRUCT):
            words = _words(classes_in(self.place(file)))
            raise UserError(f"{self.place(file)}: its classes have names: choose some of them with --labels {words}")
        plain = self._plain_labels(layout, layout.labels)[:FEW]
        found = self._count(plain)
        if not found and plain:
            self._loaded(plain[0])  # says what is wrong with it
        values = sorted(value for value in found if isinstance(value, (int, float)))
        if values == list(range(len(values))):
            words = " ".join(f"NAME{i}" for i in values[1:])
            raise UserError(
                f"{folder}: what do the label values mean? Found are {found_text(found)}: "
                f"name them with --labels {words}{_if_classes(layout)}"
            )
        raise UserError(f"{folder}: what do the label values mean? Found are {found_text(found)}: {offer(found)}")

    def _label_values(self, names: Mapping[str, int | tuple[int, ...]]) -> Mapping[int, int] | None:
        if self.values:
            known = {value: value for value in self.values.colours.values()}  # of colours that are read already
            return self.values.grey or known if not self.values.colours else {**known, **self.values.grey}
        return {0: 0, 1: 1, 255: 1} if len(names) == 2 and not self.classes else None

    def check_values(self, layout: Layout, about: About, cases: Sequence[str]) -> None:
        """Raise UserError if all of the first labels have unknown values.

        If only one label has unknown values, its case fails later.

        Args:
            cases: the cases whose labels are used. Other labels are not opened.
        """
        plain = self._plain_labels(layout, cases)
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
            raise UserError(
                f"{where}: label values found are {found_text(found)}, but --labels names {len(self.names)}:"
                f" give a name for each with --labels {names}{more}"
            )
        raise UserError(f"{where}: label values found are {found_text(found)}: {offer(found, self.names)}{more}")

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

    def _plain_labels(self, layout: Layout, cases: Iterable[str]) -> list[Path]:
        """The labels whose values can be read without another file."""
        labels = [layout.labels[case] for case in cases if case in layout.labels]
        names = (files[""] for files in labels if set(files) == {""})
        return [self.place(name) for name in names if Name(name).ending not in (SERIES, STACK, DICOM_SEG, RTSTRUCT)]

    def _count(self, paths: Iterable[Path]) -> Counter:
        """Count voxels by value over files. A file that cannot be read is skipped; its case reports it later."""
        total: Counter = Counter()
        for path in paths:
            with contextlib.suppress(Exception):  # readers raise of many kinds
                colour = mode_of(path) in ("RGB", "RGBA") or (
                    mode_of(path) == "P" and self.values and self.values.colours
                )
                counted = count(read_colours(path) if colour else self._loaded(path))
                if colour and all(len(set(value)) == 1 for value in counted):  # grey, in three channels
                    counted = Counter({value[0]: n for value, n in counted.items()})
                total.update(counted)
        return total

    def _loaded(self, path: Path) -> sitk.Image:
        reader = self._picture_reader(path)
        label = load(Read(reader, (path,)) if reader else path, [], self.repair)[0]
        return label if label.GetDimension() == 2 else one_channel(label, str(path))


def _words(names: Iterable[str]) -> str:
    """Join words as the user would type them in a shell."""
    return " ".join(f"'{name}'" if " " in name else name for name in names)


def _if_classes(layout: Layout) -> str:
    """A hint that says what to type if labels with different names belong to different classes."""
    named = [name for name in layout.joined if name and not any(c.isdecimal() for c in name)]
    return f"; if each is a class of its own, --labels {_words(named)}" if len(named) > 1 else ""


def read_any_mask(path: Path, colours: Mapping[tuple[int, int, int], int], labels: Sequence[str] = ()) -> sitk.Image:
    """Read a picture of labels. If it has colours, they decide which class a pixel has.

    The indices of a palette are read as values, unless the user names colours.
    """
    mode = mode_of(path)
    if mode in ("RGB", "RGBA") or (mode == "P" and colours):
        return read_colour_mask(path, colours, labels)
    return read_mask(path) if mode in ("P", "1", "LA", "PA") else sitk.ReadImage(path)


def _sizes(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """Read the sizes of images from their headers. Unreadable files are left out; their cases fail later.

    A folder counts as a volume.
    """
    sizes = {}
    for path in paths:
        if path.is_dir():
            sizes[path] = (0, 0, 0)
            continue
        header = sitk.ImageFileReader()
        header.SetFileName(str(path))
        with contextlib.suppress(RuntimeError):
            header.ReadImageInformation()
            size = header.GetSize()
            sizes[path] = size[:2] if len(size) == 3 and size[2] == 1 and path.suffix == ".dcm" else size
    return sizes


def _file_ending(paths: Sequence[Path], dims: int) -> str:
    """Choose a file ending for the dataset.

    It is the common ending of all images if nnU-Net reads it, else one that keeps every voxel.
    """
    pictures = all(path.name.lower().endswith(PICTURES) for path in paths)
    own = [e for e in READABLE if all(path.name.endswith(e) and not path.is_dir() for path in paths)]
    if dims == 2:
        has_tiff = any(path.name.lower().endswith((".tif", ".tiff")) for path in paths)
        return own[0] if own and pictures else ".tif" if has_tiff or not pictures else ".png"
    return own[0] if own and not pictures else ".nii.gz"
