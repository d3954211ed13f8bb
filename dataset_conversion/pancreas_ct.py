"""Pancreas in CT: NIH Pancreas-CT from TCIA."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.conversion import (
    About,
    Case,
    Crop,
    Read,
    Source,
    by_name,
    convert_dataset,
    published_split,
    read_dicom_series,
)
from nnunet_semiseg.errors import UserError

ABOUT = About(
    name="PancreasCT",
    title="Pancreas CT, NIH Pancreas-CT (80 volumes)",
    url="https://www.cancerimagingarchive.net/collection/pancreas-ct/",
    licence="CC BY 3.0",
    citation="Roth et al., Data From Pancreas-CT, The Cancer Imaging Archive (2016), doi 10.7937/K9/TCIA.2016.tNB1kqBU",
    layout="PANCREAS_0001/.../*.dcm, one DICOM series a patient\nlabel0001.nii.gz, at any depth",
    protocol="62 training and 20 test volumes, the list of MC-Net; 6 or 12 labelled. 0025 and 0070 were withdrawn as "
    "duplicates, which leaves 61 and 19",
    channels=("CT",),
    labels={"background": 0, "pancreas": 1},
    prompts={"background": "the abdomen around the pancreas", "pancreas": "the pancreas in a computed tomography"},
    labeled=12,
    crop=Crop((25, 25, 25), (96, 96, 96), "CoraNet's margin of 25 voxels, here of the original grid"),
)


def find_cases(folder: Path) -> Source:
    scans = by_name((p.name, p) for p in folder.rglob("PANCREAS_*") if re.fullmatch(r"PANCREAS_\d{4}", p.name))
    labels = by_name((p.name, p) for p in folder.rglob("label*.nii.gz"))
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
    """The label on the scan's grid, flipped along y where it lies on the pancreas only then.

    The files disagree on it, and the labels' headers cannot be trusted. What decides is measured: an organ is
    homogeneous soft tissue, what a misplaced label covers is a mixture. The Hounsfield units under the label must
    spread less in one orientation than in the other, their mean must be that of soft tissue, and the label's centroid
    must lie in the body.

    Raises:
        UserError: another shape than the scan's, or neither orientation will do.
    """
    image, label = read_dicom_series(scan), sitk.ReadImage(path)
    if image.GetSize() != label.GetSize():
        raise UserError(f"{path}: shape {label.GetSize()} differs from {image.GetSize()} of {scan}")
    units, given = sitk.GetArrayViewFromImage(image), sitk.GetArrayFromImage(label)
    if not given.any():
        raise UserError(f"{path}: the label is empty")
    candidates = {"as it is": given, "flipped along y": given[:, ::-1]}
    spreads = {way: units[voxels > 0].clip(-200, 400).std() for way, voxels in candidates.items()}
    way = min(spreads, key=spreads.get)
    chosen, mean = candidates[way], units[candidates[way] > 0].mean()
    centroid = tuple(np.argwhere(chosen).mean(0).round().astype(int))
    if not -50 <= mean <= 300 or units[centroid] < -300:
        raise UserError(
            f"{path}: lies on no soft tissue of {scan} in either orientation (mean {mean:.0f} HU): is it its label?"
        )
    aligned = sitk.GetImageFromArray(np.ascontiguousarray(chosen))
    aligned.CopyInformation(image)
    found = ", ".join(f"{spread:.0f} HU {way}" for way, spread in spreads.items())
    return aligned, f"label {way} (spread under it: {found}; mean {mean:.0f} HU)"


convert = partial(convert_dataset, find_cases)
