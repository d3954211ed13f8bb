"""Lung tumours in CT: Medical Segmentation Decathlon, Task06."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nnunet_semiseg.raw_datasets import About, Case, Source, by_name, convert_dataset, find_files, seeded_split

ABOUT = About(
    name="MSDLung",
    title="Lung tumour CT, Medical Segmentation Decathlon Task06 (63 volumes)",
    url="http://medicaldecathlon.com",
    licence="CC BY-SA 4.0",
    citation="Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13 (2022)",
    layout="Task06_Lung/imagesTr/lung_001.nii.gz\nTask06_Lung/labelsTr/lung_001.nii.gz",
    protocol="48 training and 15 test volumes; the list of the papers is not public, so this is a fixed random one; "
    "20 % labelled",
    channels=("CT",),
    labels={"background": 0, "lung tumor": 1},
    prompts={"background": "the chest without a tumor", "lung tumor": "a tumor in the lung in a computed tomography"},
    num_labeled=0.2,
)


def find_cases(folder: Path) -> Source:
    """The labelled volumes. 15 of 63, chosen at random once, are for testing."""
    files = find_files(folder, "imagesTr/lung_*.nii.gz")
    images = by_name((path.name.removesuffix(".nii.gz"), path) for path in files)
    cases = {n: Case(n, (path,), path.parent.with_name("labelsTr") / path.name) for n, path in images.items()}
    train, test = seeded_split(cases, test=15 / 63)
    return Source(ABOUT, cases, train, test=test)


convert = partial(convert_dataset, find_cases)
