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
from nnunet_semiseg.raw_datasets.description import About, Case, Read
from nnunet_semiseg.raw_datasets.dicom_labels import read_dicom_labels
from nnunet_semiseg.raw_datasets.filling import Layout
from nnunet_semiseg.raw_datasets.names import DICOM_SEG, PICTURES, RTSTRUCT, SERIES, STACK, Name, some
from nnunet_semiseg.raw_datasets.own_labels import FEW, Labels, as_typed, hint_at_classes, plain_labels
from nnunet_semiseg.raw_datasets.pictures import mode_of, read_jpeg, read_mask
from nnunet_semiseg.raw_datasets.readers import (
    find_modalities,
    find_series,
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


def refuse(path: Path, why: str) -> NoReturn:
    """Raise an error in place of reading an image, so that this case fails and the others continue.

    `why` says what is wrong with the file, and how to fix it.
    """
    raise UserError(f"{path}: {why}")


@dataclass
class Files:
    """How to read the files of a layout.

    Args:
        spacing: x y z in mm, for files that do not say it. None: the user has not given it.
        repair: what may be changed in an image.
        labels: what the values of the labels mean.
        place: a function that takes a name in the layout and returns its file or folder.
        chosen: whether the user has named the channels.
    """

    channels: tuple[str, ...]
    spacing: tuple[float, ...] | None
    repair: Repair
    labels: Labels
    place: Callable[[str], Path]
    chosen: bool = False
    # found by `describe`: the dimensions of most images, the size of each, and whether file names say the channel
    dims: int = field(default=3, init=False)
    sizes: dict[Path, tuple[int, ...]] = field(default_factory=dict, init=False)
    named: bool = field(default=False, init=False)

    def describe(
        self,
        layout: Layout,
        labels: Sequence[str] | None,
        given: Mapping[str, int | tuple[int, ...]] | None,
        folder: Path,
    ) -> About:
        """Describe the dataset as far as it depends on the files. See `Labels.name_classes` for the arguments.

        Raises:
            UserError: there are no labels; labels or channels need names. The message says what was found.
        """
        self.sizes = _sizes(self.place(name) for files in layout.images.values() for name in files.values())
        self._leave_out_4d(layout)
        images = [self.place(name) for files in layout.images.values() for name in files.values()]
        self.named = len(self.channels) > 1 and any("" not in files for files in layout.images.values())
        dims = Counter(min(len(self.sizes[path]), 3) for path in images if path in self.sizes)
        self.dims = dims.most_common(1)[0][0] if dims else 3
        self._check_channels(layout)
        names = self.labels.name_classes(layout, labels, given, folder)
        ending = _file_ending(images, self.dims)
        return About(
            name="", title="Your own images", url="", licence="", citation="", layout="", protocol="",
            channels=self.channels,
            labels=names,
            prompts={name: name for name in names},
            file_ending=ending,
            dims=self.dims,
            label_values=self.labels.label_values(names),
            repair=self.repair,
            notes=tuple(self._notes(layout, labels, ending)),
        )  # fmt: skip

    def _notes(self, layout: Layout, labels: Sequence[str] | None, ending: str) -> Iterable[str]:
        """Notes for the user: which files are written in another format, and how labels were understood."""
        images = [name for files in layout.images.values() for name in files.values()]
        kinds = {SERIES: "DICOM series", STACK: "folders of pictures"}
        for what, found in (("", images), (" labels", plain_labels(layout, layout.labels))):
            other = Counter(name[-len(Name(name).ending) :] for name in found if not name.endswith(ending))
            for kind, n in other.items():
                yield f"{n} {kinds.get(kind, kind)}{what} are written as {ending}, voxel by voxel"
        classes = self.labels.classes
        if classes and not labels:
            yield f"each class has a mask of its own: choose some of them with --labels {as_typed(classes)}"
        if layout.joined:
            yield f"labels with different names are taken for the same: {some(layout.joined)}{hint_at_classes(layout)}"

    def case(self, case: str, layout: Layout) -> Case:
        """Describe a case, with a reader for each file that nnU-Net cannot read."""
        files = layout.images[case]
        images = tuple(self._images(files))
        label = layout.labels.get(case)
        return Case(case, images, self._label(label, files) if label else None)

    def _refuse_colours(self, layout: Layout) -> None:
        """Raise UserError if the first pictures are all in colour.

        If only some of them are in colour, their cases fail later.
        """
        first = [self.place(next(iter(files.values()))) for files in list(layout.images.values())[:FEW]]
        for path in first:
            if mode_of(path) not in ("RGB", "RGBA"):
                return
            with contextlib.suppress(Exception):  # readers raise errors of many kinds
                read_gray(path)
                return
        raise UserError(
            f"{first[0]}: is a colour image: name its channels with --channels red green blue, or save it in grey"
        )

    def _leave_out_4d(self, layout: Layout) -> None:
        """Leave out images with four dimensions, in a whole channel or in cases without a label, if most have three.

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
        """Raise UserError if channels need names, or if cases have different kinds of DICOM images.

        This is checked before anything is made.
        """
        if len(self.channels) > 1:
            return
        path = next(iter(next(iter(layout.images.values())).values()))
        place = self.place(path)
        several = sum(len(size) == 4 and size[3] > 1 for size in self.sizes.values())
        if several * 2 > len(self.sizes):
            file, size = next((file, size) for file, size in self.sizes.items() if len(size) == 4 and size[3] > 1)
            words = " ".join(f"NAME{i + 1}" for i in range(size[3]))
            raise UserError(
                f"{file}: is a 4D image of {size[3]} volumes: if they are channels, name them with --channels {words};"
                " if they are the frames of a film, save each frame as a 3D file"
            )
        self._refuse_colours(layout)
        if Name(path).ending == SERIES and place.is_dir() and not layout.channels and len(find_series(place)) > 1:
            read_dicom_series(place)  # raises an error that lists them
        series = {name: self.place(name) for files in layout.images.values() for name in files.values()}
        folders = [path for name, path in series.items() if Name(name).ending == SERIES and path.is_dir()]
        if not folders:
            return
        kinds = {path: find_modalities(path) for path in folders}
        if not set.intersection(*kinds.values()) and all(kinds.values()):
            cases = Counter(kind for found in kinds.values() for kind in found)
            text = " and ".join(f"{kind} ({n} cases)" for kind, n in sorted(cases.items()))
            raise UserError(
                f"{Path(os.path.commonpath(folders))}: holds DICOM images of different kinds, {text}: choose one kind:"
                " give its folder with -i, or the name of its folder with --channels"
            )

    # -------------------------------------------------------------------------------------------------------- labels

    def _label(self, files: Mapping[str, str], images: Mapping[str, str]) -> Path | Read:
        grid = self.place(next(iter(images.values())))
        if all(Name(name).ending in (DICOM_SEG, RTSTRUCT) for name in files.values()):
            options = {"names": self.labels.names, "read_image": partial(read_grid, channel=self.channels[0])}
            return Read(read_dicom_labels, (*map(self.place, files.values()), grid), options)
        if set(files) != {""} or self.labels.classes:
            return self._class_masks(files)
        name = files[""]
        path, ending = self.place(name), Name(name).ending
        if ending == SERIES:
            return Read(read_dicom_series, (path,)) if path.is_dir() else Read(read_dicom_picture, (path,))
        if ending == STACK:
            options = {"read_slice": self.labels.read_picture, "channel": self.channels[0]}
            if Name(next(iter(images.values()))).ending == STACK:
                options["spacing"] = self.spacing
            return Read(read_mask_stack, (path, grid), options)
        if self.dims == 3 and ending in (".tif", ".tiff"):
            return Read(read_tiff_volume, (path,), {"spacing": self.spacing})
        return self.labels.reader(path)

    def _class_masks(self, files: Mapping[str, str]) -> Read:
        """The reader of a label whose classes have a mask each."""
        classes = self.labels.classes
        by_name = {name.casefold(): path for name, path in files.items()}
        there = [(name, by_name[name.casefold()]) for name in classes if name.casefold() in by_name]
        if not there:
            why = f"no mask of {some(classes)} beside it: rename it, or remove it"
            return Read(refuse, (self.place(next(iter(files.values()))),), {"why": why})
        options = {
            "values": [classes.index(name) + 1 for name, _ in there],
            "names": [name for name, _ in there],
            "missing": [name for name in classes if name.casefold() not in by_name],
            "repair": self.repair,
        }
        return Read(read_class_masks, tuple(self.place(path) for _, path in there), options, True)


def _sizes(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """Read the sizes of images from their headers. Unreadable files are skipped; their cases fail later.

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

    It is the common ending of all images if nnU-Net reads it, and if it is that of a picture for 2d and of a volume for
    3d. Else it is one that keeps every voxel.
    """
    pictures = all(path.name.lower().endswith(PICTURES) for path in paths)
    own = [e for e in READABLE if all(path.name.endswith(e) and not path.is_dir() for path in paths)]
    if dims == 2:
        has_tiff = any(path.name.lower().endswith((".tif", ".tiff")) for path in paths)
        return own[0] if own and pictures else ".tif" if has_tiff or not pictures else ".png"
    return own[0] if own and not pictures else ".nii.gz"
