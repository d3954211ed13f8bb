"""Ventricles and myocardium in cine MRI: ACDC."""

from __future__ import annotations

import configparser
from functools import partial
from pathlib import Path

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets import (
    About,
    Case,
    Read,
    Source,
    by_name,
    convert_dataset,
    find_files,
    published_split,
)

ABOUT = About(
    name="ACDC",
    title="Cardiac cine MRI at end diastole and end systole, ACDC (100 patients, 200 volumes)",
    url="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html",
    licence="CC BY-NC-SA 4.0",
    citation="Bernard et al., Deep Learning Techniques for Automatic MRI Cardiac Multi-Structures Segmentation and "
    "Diagnosis, IEEE Transactions on Medical Imaging 37 (2018)",
    layout="patient001/Info.cfg, patient001/patient001_frame01.nii.gz, patient001/patient001_frame01_gt.nii.gz, ...",
    protocol="140 training, 20 validation and 40 test volumes, the list of SSL4MIS, which calls end diastole frame01 "
    "and end systole frame02; 7 patients (14 volumes) labelled",
    channels=("MRI",),
    labels={"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3},
    prompts={
        "background": "tissue around the ventricles of the heart",
        "right ventricle": "the right ventricle of the heart in a magnetic resonance image",
        "myocardium": "the myocardium of the left ventricle in a magnetic resonance image",
        "left ventricle": "the left ventricle of the heart in a magnetic resonance image",
    },
    num_labeled=14,
)


def find_cases(folder: Path) -> Source:
    """Two cases for each patient, at end diastole and end systole: `Info.cfg` says which frames these are."""
    cases = {}
    infos = by_name((path.parent.name, path) for path in find_files(folder, "patient*/Info.cfg"))
    for patient, info in infos.items():
        for frame, phase in (("frame01", "ED"), ("frame02", "ES")):
            name = f"{patient}_{frame}"
            try:
                image = info.with_name(f"{patient}_frame{_number(info, phase):02d}.nii.gz")
            except UserError:  # the worker will raise it again, as the problem of this case
                cases[name] = Case(name, (Read(_number, (info,), {"phase": phase}),), info)
            else:
                cases[name] = Case(name, (image,), image.with_name(image.name.replace(".nii.gz", "_gt.nii.gz")))
    split = published_split("acdc")
    return Source(ABOUT, cases, split["train"], split["val"], split["test"])


def _number(info: Path, phase: str) -> int:
    parser = configparser.ConfigParser()
    try:
        parser.read_string("[info]\n" + info.read_text(encoding="utf-8"))
        return parser.getint("info", phase)
    except (configparser.Error, ValueError):
        raise UserError(f"{info}: has no line `{phase}: NUMBER`: download it again") from None


convert = partial(convert_dataset, find_cases)
