"""Masks that another model made of a dataset's images: check them, convert their values, compare them with labels."""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.data.headers import header_problem, read_header
from nnunet_semiseg.data.image_problems import IMAGES_FOLDER, geometry_difference, one_line_of, take_out
from nnunet_semiseg.data.labeled_cases import label_values, labeled_files
from nnunet_semiseg.data.prepared_masks import EXTERNAL, RECORD, weigh
from nnunet_semiseg.data.stamps import digest
from nnunet_semiseg.data.unlabeled_cases import find_unlabeled_cases
from nnunet_semiseg.data.written_images import write_image
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, disk_errors, only_one, write_json
from nnunet_semiseg.parallel import killed_workers, run_jobs
from nnunet_semiseg.schema import check_name, read_dataset_json

ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd", ".png", ".tif", ".tiff", ".bmp")


def add_masks(
    dataset: int | str, name: str, folder: str | Path, assignments: Sequence[str] = (), num_processes: int = 0
) -> dict[str, dict]:
    """Write a label file for each case that has a mask into `external/NAME/imagesTr|imagesUn` of the raw dataset.

    The file `external/NAME/masks.json` has what was measured, and a hash of each of these files. Older masks of this
    name are replaced only after all new masks have passed the checks.

    Args:
        name: the name of the other model.
        folder: has a mask for each case, named CASE.nii.gz or similar. It may have subfolders. Cases may be missing,
            but not all labelled ones.
        assignments: `VALUE=CLASS`, for the values in these files; other values become background. If empty, the values
            are those of dataset.json.

    Returns:
        For each class its `dice`, the number of `cases` that were measured, and its `weight`; see
        `prepared_masks.weigh`.

    Raises:
        UserError: a name or a value is wrong; a file belongs to no case; no labelled case has a mask; a mask or a label
            cannot be read or has another grid than its image (one line for each bad mask or label); a worker was
            killed.
        BusyError: another process adds masks to this dataset.
        DiskError: the disk is full or read-only.
    """
    check_name("--name", name)
    raw, folder = dataset_folder("nnUNet_raw", dataset), Path(folder)
    dataset_json = read_dataset_json(raw)
    classes = classes_of(dataset_json)
    values = parse_map(assignments, classes)
    labels = labeled_files(raw, dataset_json)
    images = {case: Path(files[0]) for case, files in labels.items()}
    if any((raw / IMAGES_FOLDER).glob("[!.]*")):  # labelled cases can be measured without unlabelled ones
        images |= {case: Path(files[0]) for case, files in find_unlabeled_cases(raw, dataset_json).items()}
    files = find_masks(folder, images, raw)
    if not files.keys() & labels.keys():
        raise UserError(
            f"{folder}: has no mask of a labelled case: run the other model on imagesTr, too, to measure it"
        )

    output = raw / EXTERNAL / name
    unfinished = output.with_name(f".{name}.{os.getpid()}.tmp")
    ending, ignore = dataset_json["file_ending"], dataset_json["labels"].get("ignore")
    jobs = []
    for case, file in files.items():
        label = Path(labels[case][-1]) if case in labels else None
        target = unfinished / ("imagesTr" if label else IMAGES_FOLDER) / f"{case}{ending}"
        known = sorted(label_values(dataset_json) - {ignore})
        jobs.append((case, file, images[case], label, target, values, known, classes, ignore))
    with disk_errors(raw), only_one(raw / f"{EXTERNAL}.lock", "adds masks"), killed_workers(folder):
        try:
            for part in ("imagesTr", IMAGES_FOLDER):
                (unfinished / part).mkdir(parents=True)
            found = list(run_jobs(_add_case, jobs, num_processes, "Masks"))
            if problems := sorted(problem for _, problem, _ in found if problem):
                raise UserError("\n".join(problems))
            measured = {case: dice for case, _, dice in sorted(found, key=lambda x: x[0]) if case in labels}
            result = weigh(measured, classes)
            masks = {f.name.removesuffix(ending): digest(f) for f in sorted(unfinished.glob(f"images*/*{ending}"))}
            record = {"map": list(assignments), "classes": result, "dice": measured, "masks": masks}
            write_json(record, unfinished / RECORD)
            shutil.rmtree(output, ignore_errors=True)
            unfinished.rename(output)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return result


def classes_of(dataset_json: dict) -> dict[str, list[int]]:
    """Each foreground class or region of dataset.json, with its values."""
    labels = {k: v if isinstance(v, list) else [v] for k, v in dataset_json["labels"].items() if k != "ignore"}
    return {name: values for name, values in labels.items() if set(values) != {0}}


def parse_map(assignments: Sequence[str], classes: Mapping[str, Sequence[int]]) -> dict[int, int]:
    """Turn `["5=liver"]` into a dictionary from values in the files to values in the dataset.

    Raises:
        UserError: an assignment has another form, a value appears twice, or a class does not exist in the dataset or
            is a region of several values.
    """
    values: dict[int, int] = {}
    for word in assignments:
        value, equals, name = word.partition("=")
        if not (equals and name and value.strip().isdecimal()):
            raise UserError(f"--map {word}: write VALUE=CLASS, for example --map 5=liver")
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its classes are {', '.join(classes)}"
            raise UserError(f'--map {word}: the dataset has no class "{name}": {hint}')
        if len(classes[name]) > 1:
            raise UserError(f"--map {word}: {name} is a region of several values: name a class that has one value")
        if int(value) in values:
            raise UserError(f"--map: the value {int(value)} is named twice: remove one of them")
        values[int(value)] = classes[name][0]
    return values


def find_masks(folder: Path, images: Mapping[str, Path], raw: Path) -> dict[str, Path]:
    """Find the mask file of each case.

    Masks of test cases are ignored, because nothing may be learnt from them.

    Raises:
        UserError: the folder is missing, or has no mask of these cases; a file belongs to no case; a case has two
            files.
    """
    if not folder.is_dir():
        raise UserError(f"-i {folder}: no such folder: name the folder that holds the masks of the other model")
    test = {file.name.rpartition("_0000")[0] for file in (raw / "imagesTs").glob("*_0000.*")}
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        ending = next((e for e in ENDINGS if file.name.endswith(e)), None)
        if ending is None or file.name.startswith("."):
            continue
        case = file.name.removesuffix(ending)
        if case in test and case not in images:
            continue
        if case not in images:
            near = difflib.get_close_matches(case, images, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? rename it" if near else "name it as a case of imagesTr or imagesUn"
            raise UserError(f"{file}: there is no case {case}: {hint}, or remove it")
        if case in found:
            raise UserError(f"{file}: {found[case]} belongs to the same case: remove one of them")
        found[case] = file
    if not found:
        raise UserError(
            f"-i {folder}: has no mask of a case in imagesTr or imagesUn: put a label file there for each case, such"
            f" as {next(iter(images))}.nii.gz"
        )
    return found


def table(result: Mapping[str, Mapping]) -> str:
    """The result of `add_masks` as a table, one line for each class."""
    width = max(len("class"), *map(len, result))
    lines = [f"{'class':{width}}  labelled cases   Dice  weight"]
    for name, row in result.items():
        dice = "     –" if row["dice"] is None else f"{row['dice']:6.3f}"
        lines.append(f"{name:{width}}  {row['cases']:14d} {dice}  {row['weight']:6.3f}")
    return "\n".join(lines)


def _add_case(
    case: str, file: Path, image: Path, label: Path | None, target: Path, values: Mapping[int, int],
    known: Sequence[int], classes: Mapping[str, Sequence[int]], ignore: int | None,
) -> tuple[str, str | None, dict[str, float | None]]:  # fmt: skip
    """Check, convert, write and measure one mask. Returns the case, what is wrong, and the Dice of each class."""
    try:
        mask, array = read_mask(file, image)
        mapped = map_values(file, array, values, known)
        reference = None if label is None else _read_label(label, mapped.shape)
    except UserError as error:
        return case, str(error), {}
    written = sitk.GetImageFromArray(mapped)
    written.CopyInformation(mask)
    write_image(written, target)
    if reference is None:
        return case, None, {}
    counted = np.ones_like(reference, bool) if ignore is None else reference != ignore
    a, b = mapped[counted], reference[counted]
    return case, None, {name: dice(np.isin(a, v), np.isin(b, v)) for name, v in classes.items()}


def _read_label(label: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        reference = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
    except RuntimeError as error:
        raise UserError(f"{label}: cannot be read ({one_line_of(error)}): {take_out(str(label))}") from None
    if reference.shape != shape:
        raise UserError(f"{label}: its size differs from that of the image: {take_out(str(label))}")
    return reference


def read_mask(file: Path, image: Path) -> tuple[sitk.Image, np.ndarray]:
    """Read a mask and its values.

    Raises:
        UserError: the mask cannot be read or trusted, has colours, or has another grid than its image.
    """
    if problem := header_problem(file, file.parent):
        raise UserError(f"{file}: {problem}")
    try:
        mask = sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise UserError(f"{file}: cannot be read ({one_line_of(error)}): write it again, or remove it") from None
    if mask.GetNumberOfComponentsPerPixel() > 1:
        raise UserError(f"{file}: has colours: save one value for each class")
    expected = read_header(image)
    if expected is not None and (difference := geometry_difference(mask, expected)):
        raise UserError(f"{file}: {difference} in {image}: resample the mask to the grid of its image")
    return mask, sitk.GetArrayFromImage(mask)


def map_values(file: Path, array: np.ndarray, values: Mapping[int, int], known: Sequence[int]) -> np.ndarray:
    """Convert a mask's values to those of dataset.json, (*S) uint16.

    Raises:
        UserError: a value is not a whole number; or, without a map, no class of dataset.json has it.
    """
    found = np.unique(array)
    if not np.isfinite(found).all() or (found != np.round(found)).any():
        raise UserError(f"{file}: has values that are not whole numbers: save one value for each class")
    unknown = [int(v) for v in found if v not in known]
    if unknown and not values:
        named = ", ".join(map(str, known))
        raise UserError(
            f"{file}: has the value {unknown[0]}, but the classes of dataset.json have {named}: name the value of each"
            " class with --map (all other values become background)"
        )
    if not values:
        return array.astype(np.uint16)
    mapped = np.zeros(array.shape, np.uint16)
    for value, own in values.items():
        mapped[array == value] = own
    return mapped


def dice(a: np.ndarray, b: np.ndarray) -> float | None:
    """The Dice 2 |a and b| / (|a| + |b|) of two bool arrays. None if both are empty."""
    size = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / size if size else None
