"""Labels in DICOM: segmentations (DICOM-SEG) and structure sets of radiotherapy (RTSTRUCT).

They need `pip install nnunet-semiseg[dicom]`: highdicom and pydicom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from skimage.draw import polygon

from nnunet_semiseg.data.image_problems import one_line_of
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.names import some

INSTALL = "pip install 'nnunet-semiseg[dicom]'"


def classes_in(*paths: Path) -> list[str]:
    """The names of the segments, or of the regions of interest, in these files.

    Raises:
        UserError: no file has a class; a file cannot be read; or the packages that read it are not installed.
    """
    if names := [name for path in paths for name in _classes_in_one(path)]:
        return names
    raise UserError(f"{paths[0]}: has no class, perhaps because it is cut off: save or download it again")


def _classes_in_one(path: Path) -> list[str]:
    try:
        import pydicom
    except ImportError:
        raise _not_installed(path) from None
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as e:  # the kind depends on the damage
        raise UserError(f"{path}: cannot be read ({one_line_of(e)}): save it again") from None
    segments = [str(item.SegmentLabel) for item in data.get("SegmentSequence", ())]
    return segments or [str(item.ROIName) for item in data.get("StructureSetROISequence", ())]


def read_dicom_labels(*paths: Path, names: Sequence[str], read_image: Callable[..., sitk.Image]):
    """Read DICOM segmentations and structure sets on the grid of their image. The named classes become 1, 2, ...

    A voxel in several classes belongs to the one that is named last.

    Args:
        paths: one or more label files, and then the image.
        names: the names of the classes, in the order of their values.
        read_image: a function that reads the image from the last path.

    Returns:
        The label, uint8; and a note about classes that are not named or missing, other grids, and overlaps.

    Raises:
        UserError: none of the classes is in any file; a file cannot be read, or the packages that read it are not
            installed; an outline lies in no slice of the image.
    """
    *files, grid = paths
    note = _compare(files, names)
    image = read_image(grid)
    opened = [(file, _open(file)) for file in files]
    label, overlap = np.zeros(image.GetSize()[::-1], np.uint8), 0
    for value, name in enumerate(names, 1):
        mask = np.zeros(label.shape, bool)
        for file, data in opened:
            if "SegmentSequence" in data:
                mask |= _segment(data, name, image, note)
            else:
                mask |= _outlined(data, name, image, file, grid)
        overlap += np.count_nonzero(label[mask])
        label[mask] = value
    result = sitk.GetImageFromArray(label)
    result.CopyInformation(image)
    overlaps = [f"{overlap} voxels are in several classes: they get the one that is named last"] if overlap else []
    return result, "; ".join([*note, *overlaps])


def _open(file: Path):
    import pydicom

    data = pydicom.dcmread(file)
    if "SegmentSequence" not in data:
        return data
    try:
        import highdicom
    except ImportError:
        raise _not_installed(file) from None
    return highdicom.seg.Segmentation.from_dataset(data, copy=False)


def _not_installed(path: Path) -> UserError:
    return UserError(f"{path}: is a DICOM segmentation or structure set: to read it, {INSTALL}")


def _segment(data, name: str, image: sitk.Image, note: list[str]) -> np.ndarray:
    """Where a segment is: a bool array z, y, x."""
    numbers = [n for n in data.segment_numbers if _same(data.get_segment_description(n).segment_label, name)]
    if not numbers:
        return np.zeros(image.GetSize()[::-1], bool)
    volume = data.get_volume(segment_numbers=numbers, combine_segments=True, relabel=True, skip_overlap_checks=True)
    segment = sitk.Cast(volume.to_simpleitk(), sitk.sitkUInt8)
    if not _on_lattice(segment, image):
        note.append(f"{name} is on another grid than the image: the nearest voxels are taken")
    return sitk.GetArrayFromImage(sitk.Resample(segment, image, sitk.Transform(), sitk.sitkNearestNeighbor)) > 0


def _outlined(data, name: str, image: sitk.Image, file: Path, grid: Path) -> np.ndarray:
    """The pixels inside the outlines of each slice, as an array z, y, x. An outline inside another one is a hole."""
    numbers = {int(item.ROINumber): str(item.ROIName) for item in data.StructureSetROISequence}
    mask = np.zeros(image.GetSize()[::-1], bool)
    for roi in data.ROIContourSequence:
        if not _same(numbers[int(roi.ReferencedROINumber)], name):
            continue
        for contour in roi.get("ContourSequence", ()):
            points = np.reshape([float(v) for v in contour.ContourData], (-1, 3))
            index = np.array([image.TransformPhysicalPointToContinuousIndex(point) for point in points.tolist()])
            z = round(index[:, 2].mean())
            if not 0 <= z < len(mask) or np.ptp(index[:, 2]) > 0.5:
                raise UserError(
                    f"{file}: an outline of {name} lies in no slice of {grid}: use the label that belongs to this image"
                )
            rows, columns = polygon(index[:, 1], index[:, 0], mask.shape[1:])
            mask[z, rows, columns] ^= True
    return mask


def _compare(files: Sequence[Path], names: Sequence[str]) -> list[str]:
    there = classes_in(*files)
    missing = [name for name in names if not any(_same(name, other) for other in there)]
    unused = [other for other in there if not any(_same(name, other) for name in names)]
    where = " and ".join(file.name for file in files)
    if len(missing) == len(names):
        raise UserError(
            f"{files[0]}: has no class of --labels {' '.join(names)}: name classes that {where} has: {some(there, 20)}"
        )
    notes = [f"{where} has no {some(missing)}"] if missing else []
    return notes + ([f"{some(unused)} of {where} is left out, because --labels does not name it"] if unused else [])


def _same(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()


def _on_lattice(segment: sitk.Image, image: sitk.Image) -> bool:
    """Whether the voxels of both grids coincide. The sizes and the order of the axes may differ."""
    ends = np.diag(segment.GetSize()) - np.eye(3, dtype=int)  # the last voxel along each axis
    places = [segment.TransformIndexToPhysicalPoint(end.tolist()) for end in (np.zeros(3, int), *ends)]
    first, *last = (np.array(image.TransformPhysicalPointToContinuousIndex(place)) for place in places)
    steps = [end - first for end in last]
    lengths = np.subtract(segment.GetSize(), 1)
    straight = all(np.allclose(np.sort(np.abs(s)), (0, 0, n), atol=0.1) for s, n in zip(steps, lengths, strict=True))
    return straight and np.allclose([first, *last], np.round([first, *last]), atol=0.1)
