"""Liver and its tumours in CT: LiTS 2017."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from nnunet_semiseg.raw_datasets import About, Case, Source, by_name, convert_dataset, find_files, seeded_split

ABOUT = About(
    name="LiTS2017",
    title="Liver and liver tumour CT, LiTS 2017 (131 volumes)",
    url="https://competitions.codalab.org/competitions/17094",
    licence="CC BY-NC-ND 4.0",
    citation="Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 84 (2023)",
    layout="volume-0.nii, segmentation-0.nii, ..., in one folder or in two (Training Batch 1, 2)",
    protocol="none is published for semi-supervised training: a fixed random list, a fifth of the volumes for testing, "
    "10 % of the others labelled",
    channels=("CT",),
    labels={"background": 0, "liver": 1, "liver tumor": 2},
    prompts={
        "background": "the abdomen around the liver",
        "liver": "the liver in a computed tomography",
        "liver tumor": "a tumor in the liver in a computed tomography",
    },
    file_ending=".nii",
    num_labeled=0.1,
)


def find_cases(folder: Path) -> Source:
    """One case for each `volume-N.nii`. A fixed random fifth is for testing."""
    found = ((re.fullmatch(r"volume-(\d+)\.nii", p.name), p) for p in find_files(folder, "volume-*.nii"))
    volumes = by_name((f"liver_{int(match[1]):03d}", p) for match, p in found if match)  # no `volume-1 (copy).nii`
    labels = by_name((p.name.replace("segmentation", "volume"), p) for p in find_files(folder, "segmentation-*.nii"))
    # a mask need not lie beside its volume; if it is missing, the path says what was looked for
    cases = {
        name: Case(name, (p,), labels.get(p.name, p.with_name(p.name.replace("volume", "segmentation"))))
        for name, p in volumes.items()
    }
    train, test = seeded_split(cases, test=0.2)
    return Source(ABOUT, cases, train, test=test)


convert = partial(convert_dataset, find_cases)
