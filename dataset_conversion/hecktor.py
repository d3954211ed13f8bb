"""Head and neck tumours in PET/CT: HECKTOR 2022."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import SimpleITK as sitk

from nnunet_semiseg.raw_datasets import About, Case, Read, Source, by_name, convert_dataset, find_files, seeded_split

ABOUT = About(
    name="HECKTOR2022",
    title="Head and neck tumour PET/CT, HECKTOR 2022 (524 cases)",
    url="https://hecktor.grand-challenge.org",
    licence="for research, after signing the challenge's agreement; see the source",
    citation="Andrearczyk et al., Overview of the HECKTOR Challenge at MICCAI 2022, Lecture Notes in Computer Science "
    "13626 (2023)",
    layout="imagesTr/CHUM-001__CT.nii.gz, imagesTr/CHUM-001__PT.nii.gz, labelsTr/CHUM-001.nii.gz,\n"
    "or, since 2025, the three in one folder CHUM-001",
    protocol="none is published for semi-supervised training: a fixed random list, a fifth of the cases for testing, "
    "10 % of the others labelled",
    channels=("CT", "PET"),
    labels={"background": 0, "primary tumor": 1, "lymph nodes": 2},
    prompts={
        "background": "head and neck without a tumor",
        "primary tumor": "the primary tumor of the head and neck in a PET and computed tomography",
        "lymph nodes": "lymph nodes with metastases of the head and neck in a PET and computed tomography",
    },
    num_labeled=0.1,
    notes=("PET is resampled to the CT's grid, linearly",),
)


def find_cases(folder: Path) -> Source:
    """Cases with two channels: CT, and the PET on the grid of the CT. A fixed random fifth is for testing."""
    names = ((p.name.removesuffix("__CT.nii.gz"), p) for p in find_files(folder, "*__CT.nii.gz"))
    scans = by_name((name, p) for name, p in names if p.parent.name in ("imagesTr", name))  # those with a label
    cases = {}
    for name, ct in scans.items():
        pet = Read(resample_to, (ct.with_name(f"{name}__PT.nii.gz"), ct))
        labels = ct.parent if ct.parent.name == name else ct.parent.with_name("labelsTr")
        cases[name] = Case(name, (ct, pet), labels / f"{name}.nii.gz")
    train, test = seeded_split(cases, test=0.2)
    return Source(ABOUT, cases, train, test=test)


def resample_to(moving: Path, fixed: Path) -> sitk.Image:
    """Resample the first image to the grid of the second one, linearly. Outside of the first one the result is 0."""
    return sitk.Resample(sitk.ReadImage(moving), sitk.ReadImage(fixed))


convert = partial(convert_dataset, find_cases)
