"""Labels as DICOM has them: segmentations (DICOM-SEG) and structure sets of radiotherapy (RTSTRUCT).

They need `pip install nnunet-semiseg[dicom]`: highdicom, and pydicom, which comes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from skimage.draw import polygon

from nnunet_semiseg.conversion.names import some
from nnunet_semiseg.errors import UserError

INSTALL = "pip install 'nnunet-semiseg[dicom]'"


def classes_in(path: Path) -> list[str]:
    """The names of the segments, or of the regions of interest, in a file.

    Raises:
        UserError: the packages that read it are not installed, or it cannot be read.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: a DICOM segmentation or structure set: to read it, {INSTALL}") from None
    data = pydicom.dcmread(path, stop_before_pixels=True)
    segments = [str(item.SegmentLabel) for item in data.get("SegmentSequence", ())]
    return segments or [str(item.ROIName) for item in data.get("StructureSetROISequence", ())]


def read_segmentation(path: Path, grid: Path, names: Sequence[str], read_image: Callable[..., sitk.Image]):
    """A DICOM-SEG on its image's grid, with the values 1, 2, ... of the named segments.

    Returns:
        The label, uint8, and a note: what was not named, what is not there, what overlaps.
    """
    note = _compare(path, names)
    import highdicom

    image = read_image(grid)
    file = highdicom.seg.segread(path)
    label, overlap = np.zeros(image.GetSize()[::-1], np.uint8), 0
    for value, name in enumerate(names, 1):
        numbers = [n for n in file.segment_numbers if _same(file.get_segment_description(n).segment_label, name)]
        if not numbers:
            continue
        volume = file.get_volume(segment_numbers=numbers, combine_segments=True, relabel=True, skip_overlap_checks=True)
        segment = sitk.Cast(volume.to_simpleitk(), sitk.sitkUInt8)
        if not _on_lattice(segment, image):
            note.append(f"{name} is on another grid than the image: the nearest voxels are taken")
        mask = sitk.GetArrayFromImage(sitk.Resample(segment, image, sitk.Transform(), sitk.sitkNearestNeighbor)) > 0
        overlap += np.count_nonzero(label[mask])
        label[mask] = value
    return _finished(label, image, note, overlap)


def read_structure_set(path: Path, grid: Path, names: Sequence[str], read_image: Callable[..., sitk.Image]):
    """An RTSTRUCT on its image's grid: the pixels within the outlines of each slice; an outline within one is a hole.

    Returns:
        The label, uint8, and a note: what was not named, what is not there, what overlaps.
    """
    note = _compare(path, names)
    import pydicom

    image = read_image(grid)
    data = pydicom.dcmread(path)
    numbers = {int(item.ROINumber): str(item.ROIName) for item in data.StructureSetROISequence}
    label, overlap = np.zeros(image.GetSize()[::-1], np.uint8), 0
    for value, name in enumerate(names, 1):
        mask = np.zeros(label.shape, bool)
        for roi in data.ROIContourSequence:
            if not _same(numbers[int(roi.ReferencedROINumber)], name):
                continue
            for contour in roi.get("ContourSequence", ()):
                points = np.reshape([float(v) for v in contour.ContourData], (-1, 3))
                index = np.array([image.TransformPhysicalPointToContinuousIndex(point) for point in points.tolist()])
                z = round(index[:, 2].mean())
                if not 0 <= z < len(mask) or np.ptp(index[:, 2]) > 0.5:
                    raise UserError(f"{path}: an outline of {name} lies in no slice of {grid}: is it its image?")
                rows, columns = polygon(index[:, 1], index[:, 0], mask.shape[1:])
                mask[z, rows, columns] ^= True
        overlap += np.count_nonzero(label[mask])
        label[mask] = value
    return _finished(label, image, note, overlap)


def _compare(path: Path, names: Sequence[str]) -> list[str]:
    there = classes_in(path)
    missing = [name for name in names if not any(_same(name, other) for other in there)]
    unused = [other for other in there if not any(_same(name, other) for name in names)]
    if len(missing) == len(names):
        raise UserError(f"{path}: none of --labels {' '.join(names)} is there: it has {some(there, 20)}")
    notes = [f"{path.name} has no {some(missing)}"] if missing else []
    return notes + ([f"{some(unused)} of {path.name} is not named with --labels and left out"] if unused else [])


def _same(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()


def _on_lattice(segment: sitk.Image, image: sitk.Image) -> bool:
    """Whether voxels lie on voxels, though one may reach further than the other."""
    ends = ([0, 0, 0], [n - 1 for n in segment.GetSize()])
    points = [image.TransformPhysicalPointToContinuousIndex(segment.TransformIndexToPhysicalPoint(e)) for e in ends]
    steps = np.subtract(*points[::-1])
    same_size = np.allclose(np.abs(steps), np.subtract(segment.GetSize(), 1), atol=0.1)
    return same_size and np.allclose(points, np.round(points), atol=0.1)


def _finished(label: np.ndarray, image: sitk.Image, notes: Sequence[str], overlap: int) -> tuple[sitk.Image, str]:
    result = sitk.GetImageFromArray(label)
    result.CopyInformation(image)
    overlaps = [f"{overlap} voxels are in several classes: they are of the later one"] if overlap else []
    return result, "; ".join([*notes, *overlaps])
