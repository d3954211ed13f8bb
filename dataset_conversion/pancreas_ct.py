"""Pancreas in CT: NIH Pancreas-CT from TCIA."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets import (
    About,
    Case,
    Crop,
    Read,
    Source,
    by_name,
    convert_dataset,
    find_files,
    published_split,
    read_dicom_series,
)

ABOUT = About(
    name="PancreasCT",
    title="Pancreas CT, NIH Pancreas-CT (80 volumes)",
    url="https://www.cancerimagingarchive.net/collection/pancreas-ct/",
    licence="CC BY 3.0",
    citation="Roth et al., Data From Pancreas-CT, The Cancer Imaging Archive (2016), doi 10.7937/K9/TCIA.2016.tNB1kqBU",
    layout="PANCREAS_0001/.../*.dcm, one DICOM series for each patient\nlabel0001.nii.gz, at any depth",
    protocol="62 training and 20 test volumes, the list of MC-Net; 6 or 12 labelled. 0025 and 0070 were withdrawn as "
    "duplicates, which leaves 61 and 19",
    channels=("CT",),
    labels={"background": 0, "pancreas": 1},
    prompts={"background": "the abdomen around the pancreas", "pancreas": "the pancreas in a computed tomography"},
    num_labeled=12,
    crop=Crop(
        size=(96, 96, 96),
        margin=(25, 25, 25),
        source="as CoraNet: a box of at least 96 voxels, with a margin of 25 around it, here on the original grid",
    ),
)
CLEAR_STEP = 20  # HU; in a wrong place the step is near 0; chosen on phantoms, because no real scan was available


def find_cases(folder: Path) -> Source:
    """DICOM series, each with its label on its own grid (`read_label`), in the published split."""
    scans = by_name((p.name, p) for p in find_files(folder, "PANCREAS_*") if re.fullmatch(r"PANCREAS_\d{4}", p.name))
    labels = by_name((p.name, p) for p in find_files(folder, "label*.nii.gz"))
    cases = {}
    for name, scan in scans.items():
        file = name.replace("PANCREAS_", "label") + ".nii.gz"
        label = Read(read_label, (labels.get(file, folder / file), scan))
        cases[name] = Case(name, (Read(read_dicom_series, (scan,)),), label)
    split = {
        part: [f"PANCREAS_{case.removeprefix('image')}" for case in published_split("pancreas_ct")[part]]
        for part in ("train", "test")
    }
    return Source(ABOUT, cases, split["train"], test=split["test"])


def read_label(path: Path, scan: Path) -> tuple[sitk.Image, str]:
    """The label on the grid of the scan. It is flipped along y if only the flipped label lies on the pancreas.

    Some files need the flip and some do not, and the headers of the labels do not say it. `choose_orientation` measures
    it.

    Raises:
        UserError: the label is empty, has another shape than the scan, or fits in neither orientation.
    """
    image, label = read_dicom_series(scan), sitk.ReadImage(path)
    if image.GetSize() != label.GetSize():
        raise UserError(
            f"{path}: its size is {label.GetSize()}, but that of {scan} is {image.GetSize()}: download it again"
        )
    units, given = sitk.GetArrayViewFromImage(image), sitk.GetArrayFromImage(label)
    if not given.any():
        raise UserError(f"{path}: the label is empty: download it again")
    chosen, note = choose_orientation(units, given)
    if chosen is None:
        raise UserError(
            f"{path}: this label does not lie on soft tissue of {scan} in either orientation ({note}): use the"
            f" label that belongs to this scan"
        )
    aligned = sitk.GetImageFromArray(np.ascontiguousarray(chosen))
    aligned.CopyInformation(image)
    return aligned, note


def choose_orientation(units: np.ndarray, label: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Choose the label as it is or flipped along y, whichever lies on the pancreas. Returns also what was measured.

    An orientation is possible if the label covers soft tissue in the body (`_is_soft_tissue`). If both are possible,
    the one with the larger step at the label's border is taken (`_border_step`): there is fat around the pancreas,
    while at the border of a label in a wrong place the tissue goes on. If the step is less than `CLEAR_STEP` HU above
    0, or above that of the other orientation, the note begins with a warning.

    Args:
        units: Hounsfield units, z y x.
        label: on the same grid, not empty.

    Returns:
        The label (None if neither orientation is possible), and the note.
    """
    ways = {"as it is": label, "flipped along y": label[:, ::-1]}
    steps, measured = {}, []
    for way, voxels in ways.items():
        mask = voxels > 0
        measured.append(f"mean {units[mask].mean():.0f} HU {way}")
        if _is_soft_tissue(units, mask):
            steps[way] = _border_step(units, mask)
            measured[-1] += f" with a step of {steps[way]:.0f} HU at the border"
    if not steps:
        return None, ", ".join(measured)
    way = max(steps, key=steps.get)
    rival = max([0.0, *(step for other, step in steps.items() if other != way)])
    note = f"label {way} ({', '.join(measured)})"
    if steps[way] - rival < CLEAR_STEP:
        note = f"WARNING: it is not clear whether the label must be flipped, look at it: {note}"
    return ways[way], note


def _is_soft_tissue(units: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a label lies on soft tissue: by its mean, with hardly any air in it, and with its centre in the body."""
    covered = units[mask]
    z, y, x = (int(round(indices.mean())) for indices in np.nonzero(mask))
    body = ndimage.binary_fill_holes(units[z] > -300)  # including the air in it
    return bool(-50 <= covered.mean() <= 300 and (covered < -300).mean() < 0.05 and body[y, x])


def _border_step(units: np.ndarray, mask: np.ndarray) -> float:
    """Mean HU in the two voxels inside a label's border minus that in the two outside. Air and bone are clipped."""
    box = tuple(slice(max(int(i.min()) - 2, 0), int(i.max()) + 3) for i in np.nonzero(mask))
    units, mask = units[box].clip(-200, 200), mask[box]
    inside = mask & ~ndimage.binary_erosion(mask, iterations=2)
    outside = ndimage.binary_dilation(mask, iterations=2) & ~mask
    return float(units[inside].mean() - units[outside].mean())


convert = partial(convert_dataset, find_cases)
