"""The description of a data set and its cases, which modules of `dataset_conversion/` fill in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.planning_request import PICTURES
from nnunet_semiseg.raw_datasets.repair import Repair


@dataclass(frozen=True)
class Crop:
    """A published crop: the bounding box of the label, enlarged to at least `size`, plus a margin.

    Args:
        size, margin: numbers of voxels along x, y and z. None: the axis is not cropped.
        source: who published it.
    """

    size: tuple[int | None, ...]
    margin: tuple[int | None, ...]
    source: str

    def __call__(self, label: sitk.Image) -> tuple[slice, ...]:
        """The part of an image to keep, as slices x y z on the label's grid. Raises UserError if the label is empty."""
        foreground = np.nonzero(sitk.GetArrayViewFromImage(label))[::-1]  # z y x to x y z
        if not len(foreground[0]):
            raise UserError("the label is empty, so there is nothing to crop around: use --crop none")
        slices = []
        for indices, size, margin, extent in zip(foreground, self.size, self.margin, label.GetSize(), strict=True):
            if size is None:
                slices.append(slice(0, extent))
                continue
            first, end = int(indices.min()), int(indices.max()) + 1
            missing = max(size - (end - first), 0)
            first, end = first - missing // 2 - margin, end + missing - missing // 2 + margin
            slices.append(slice(max(first, 0), min(end, extent)))
        return tuple(slices)


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known about a data set before its files are looked at.

    Args:
        name: the part of the dataset's name that follows the number.
        layout: what the download looks like; shown if no case is found.
        protocol: the published split, in words.
        labels, regions_class_order, file_ending: as in `dataset.json`.
        prompts: one or more texts about each class.
        dims: the number of dimensions of every image. None: 2 for pictures, else 3.
        label_values: a map from values in the source to values in the dataset. None: both have the values of `labels`.
        num_labeled: the default number of labelled cases, or their share of the training cases. None: all that have a
            label.
        value_hint: how to fix an unknown label value.
        repair: what may be changed in headers and voxels.
        notes: what a user must know before using the data set.
    """

    name: str
    title: str
    url: str
    licence: str
    citation: str
    layout: str
    protocol: str
    channels: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    prompts: Mapping[str, str | list[str]]
    regions_class_order: tuple[int, ...] | None = None
    file_ending: str = ".nii.gz"
    dims: int | None = None
    label_values: Mapping[int, int] | None = None
    num_labeled: int | float | None = None
    crop: Crop | None = None
    value_hint: str = "correct it, or download the label again"
    repair: Repair = Repair()
    notes: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        return self.dims or (2 if self.file_ending in PICTURES else 3)

    @property
    def label_map(self) -> dict[int, int]:
        if self.label_values is not None:
            return dict(self.label_values)
        values = (
            v for label in self.labels.values() for v in (label if isinstance(label, (list, tuple)) else (label,))
        )
        return {int(v): int(v) for v in values}


@dataclass(frozen=True)
class Read:
    """An image that nnU-Net cannot read directly. `function(*paths, **options)` reads it.

    The function returns a SimpleITK image, or an image and a note for the user, which may be empty. Worker processes
    call the function, so it must not be a lambda.

    Args:
        repairs: whether the function itself refuses or repairs damaged files. If not, `load` refuses them first.
    """

    function: Callable[..., sitk.Image | tuple[sitk.Image, str]]
    paths: tuple[Path, ...]
    options: Mapping = field(default_factory=dict)
    repairs: bool = False


@dataclass(frozen=True)
class Case:
    """The files of a case in the source.

    The file of a plain path is linked into the dataset if it has the dataset's ending and nothing in it must change.
    Otherwise a new file is written. The text goes into `texts.json`.
    """

    name: str
    images: tuple[Path | Read, ...]
    label: Path | Read | None = None
    text: str | None = None


@dataclass(frozen=True)
class Source:
    """The cases of a download, and its lists of training, validation and test cases.

    Args:
        train: the training cases. If only some keep their labels, these are the first. Like the other two lists, it
            may name cases that are missing in `cases`.
        left_out: files of the download that belong to no case, with the reason.
        patients: the patient of each case, if the scans of one patient must stay together; otherwise empty.
        check: a function that checks the cases whose labels are used, before anything is written. It raises UserError.
    """

    about: About
    cases: Mapping[str, Case]
    train: Sequence[str]
    val: Sequence[str] = ()
    test: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    patients: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Sequence[str]], None] = lambda cases: None
