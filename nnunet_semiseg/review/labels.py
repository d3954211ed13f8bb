"""Labels that the user gives to `accept`: which cases they belong to, whether they fit, and where they come from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_semiseg.data.image_problems import label_problems, nifti_damage, one_line_of
from nnunet_semiseg.data.labeled_cases import label_values
from nnunet_semiseg.data.written_images import write_image
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json
from nnunet_semiseg.raw_datasets.names import ENDINGS
from nnunet_semiseg.raw_datasets.repair import grid_difference

NIFTI = (".nii", ".nii.gz")
MASKS, UNCERTAINTY, CASES = "masks", "uncertainty", "cases"
"""Folders of a review: the predicted masks, the uncertainty maps, and a record for each case."""


@dataclass(frozen=True)
class NewLabel:
    """A label to accept.

    Attributes:
        origin: `human`: there is no prediction. `corrected`: the label differs from all predictions of the case.
            `prediction`: it equals one of them.
        review: the name of the review that predicted the case. None if there is no prediction.
    """

    case: str
    file: Path
    origin: str
    review: str | None = None

    @property
    def about(self) -> dict:
        """The entry for this label in dataset.json."""
        return {"from": self.origin} | ({"review": self.review} if self.review else {})


@dataclass(frozen=True)
class Predicted:
    """The prediction of a case by a review.

    Attributes:
        digest: a hash of the voxels of the mask, see `digest_of`.
    """

    review: Path
    mask: Path
    digest: str


def digest_of(mask: np.ndarray) -> str:
    """A hash of a label map's shape and values. It does not depend on the type of the numbers."""
    values = np.ascontiguousarray(mask, dtype=np.int32)
    return hashlib.blake2b(repr(values.shape).encode() + values.tobytes(), digest_size=16).hexdigest()


def predictions_of(reviews: Iterable[Path], file_ending: str) -> dict[str, list[Predicted]]:
    """The predictions of these reviews, by case. Raises UserError if the record of a case is damaged."""
    found: dict[str, list[Predicted]] = {}
    for review in reviews:
        for record in sorted((review / CASES).glob("*.json")):
            content = read_json(record, "remove it and run nnunet_semiseg review again")
            mask = review / MASKS / f"{record.stem}{file_ending}"
            found.setdefault(record.stem, []).append(Predicted(review, mask, str(content.get("mask"))))
    return found


def choose(
    given: Path | None,
    all_of: Path | None,
    known: Mapping[str, list[Predicted]],
    unlabeled: Collection[str],
    dataset_json: dict,
    reader: Any,
) -> tuple[list[NewLabel], list[str]]:
    """Choose the labels to accept: those in a folder and, with `all_of`, the other masks of a review.

    Args:
        known: the predictions of all reviews, including those of `all_of`.
        unlabeled: the unlabelled cases. Masks of other cases in `all_of` are ignored; they may have been accepted
            before.

    Returns:
        The labels; and one line for each file with another ending and, without `all_of`, for each label that equals a
        prediction.

    Raises:
        UserError: a folder is missing, or has no label.
    """
    ending, labels, problems = dataset_json["file_ending"], {}, []
    if all_of is not None:
        masks = [f for f in sorted((all_of / MASKS).glob(f"*{ending}")) if f.name[: -len(ending)] in unlabeled]
        if not masks:
            fix = f"name the folder of a review, which holds {MASKS}"
            raise UserError(f"{all_of / MASKS}: has no mask CASE{ending} of an unlabelled case: {fix}")
        for mask in masks:
            case = mask.name[: -len(ending)]
            own = [p for p in known.get(case, ()) if p.review == all_of]
            labels[case] = _label(case, mask, own, reader)
    if given is not None:
        if not given.is_dir():
            raise UserError(f"{given}: no such folder: name the right folder with -i")
        files = sorted(f for f in given.glob(f"*{ending}") if not f.name.startswith("."))
        problems += _other_endings(given, files, unlabeled, ending)
        if not files and not problems:
            raise UserError(f"{given}: has no label CASE{ending}: name the right folder with -i")
        for file in files:
            case = file.name[: -len(ending)]
            label = _label(case, file, known.get(case, []), reader)
            if label.origin == "prediction" and all_of is None:
                fix = f"correct it, or accept predictions as they are with --all-of {label_review(known[case])}"
                problems.append(f"{file}: is the unchanged prediction: {fix}")
            labels[case] = label
    return [labels[case] for case in sorted(labels)], problems


def _other_endings(given: Path, files: Collection[Path], unlabeled: Collection[str], ending: str) -> list[str]:
    """One line for each label of an unlabelled case in another format: Slicer saves CASE.seg.nrrd, for example.

    Such a file is ignored if the case also has a label in the right format.
    """
    there, problems = {file.name for file in files}, []
    for file in sorted(given.glob("*")):
        case = next((c for c in sorted(unlabeled, key=len, reverse=True) if file.name.startswith(f"{c}.")), None)
        if case and f"{case}{ending}" not in there and file.name.lower().endswith(ENDINGS):
            problems.append(f"{file}: its ending is not {ending}, that of the data set: save it as {case}{ending}")
    return problems


def label_review(predicted: list[Predicted]) -> Path:
    """The folder of the last review that predicted a case."""
    return predicted[-1].review


def _label(case: str, file: Path, predicted: list[Predicted], reader: Any) -> NewLabel:
    if not predicted:
        return NewLabel(case, file, "human")
    try:
        digest = digest_of(reader().read_seg(str(file))[0][0])
    except Exception:  # `problems_of` says what is wrong
        digest = ""
    same = [p for p in predicted if p.digest == digest]
    return NewLabel(case, file, "prediction" if same else "corrected", (same or predicted)[-1].review.name)


def problems_of(label: NewLabel, images: list[str], dataset_json: dict, reader: Any) -> list[str]:
    """Find what is wrong with a label for these images, one line each: unreadable, another grid, an unknown value."""
    file = str(label.file)
    if damage := nifti_damage(file):
        return [f"{file}: {damage}: save it again"]
    if difference := _grid(label.file, images[0], reader)[0]:
        return [f"{file}: {difference} in {images[0]}: draw the label on that image, or resample it to that grid"]
    try:
        seg, shape = reader().read_seg(file)[0], reader().read_images(images)[0].shape[1:]
    except Exception as e:  # the kind depends on the damage
        return [f"{file}: cannot be read ({one_line_of(e)}): save it again"]
    values = label_values(dataset_json)
    problems = label_problems(seg, file, shape, values)
    ignore = max(values) + 1  # the value of nnU-Net's ignore label, if dataset.json had one
    if problems and "ignore" not in dataset_json["labels"] and {*np.unique(seg).tolist()} - values == {ignore}:
        problems[0] += f'; if nobody looked at these voxels, add "ignore": {ignore} to its labels and plan again'
    return problems


def _grid(file: Path, image: str, reader: Any) -> tuple[str | None, str | None, sitk.Image | None]:
    """Compare the grids of a label and its image.

    Returns the difference if it is an error, else None; the difference if it is only rounding, else None; and the image
    if the grids were compared, else None. They are compared only if nnU-Net reads the files with SimpleITK or nibabel.
    """
    if not issubclass(reader, (SimpleITKIO, NibabelIO)):
        return None, None, None
    try:
        label, expected = sitk.ReadImage(file), sitk.ReadImage(image)
    except RuntimeError as e:
        return f"cannot be compared ({one_line_of(e)}) with the grid", None, None
    own, wanted = _dimensions(file, label), _dimensions(image, expected)
    if expected.GetDimension() == 4:  # all channels in one file
        expected = expected[..., 0]
    if own > wanted or label.GetDimension() != expected.GetDimension():
        return f"has {own} dimensions instead of the {expected.GetDimension()}", None, None
    return *grid_difference(label, expected), expected


def _dimensions(file: Path | str, image: sitk.Image) -> int:
    """The number of dimensions in a file. ITK leaves out the last ones of a NIfTI file if they have one voxel each."""
    return nibabel.load(file).ndim if str(file).lower().endswith(NIFTI) else image.GetDimension()


def write_label(label: NewLabel, image: str, target: Path, reader: Any) -> None:
    """Copy a label.

    If its header is rounded or its numbers are not integers, it is written with the header of the image.
    """
    _, rounded, expected = _grid(label.file, image, reader)
    if expected is not None:
        mask = sitk.ReadImage(label.file)
        voxels = sitk.GetArrayFromImage(mask)
        if rounded or not np.issubdtype(voxels.dtype, np.integer):
            written = sitk.GetImageFromArray(np.round(voxels).astype(np.uint8 if voxels.max() < 256 else np.int16))
            written.CopyInformation(expected)
            write_image(written, target)
            return
    shutil.copyfile(label.file, target)
