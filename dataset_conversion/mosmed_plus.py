"""COVID-19 infection in slices of chest CT, with a text for each: MosMedData+ in the version of LViT."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_semiseg.dataset_conversion import qata_cov19
from nnunet_semiseg.raw_datasets import Source, convert_dataset

ABOUT = replace(
    qata_cov19.ABOUT,
    name="MosMedPlus",
    title="COVID-19 infection in slices of chest CT, MosMedData+ with LViT's texts (2729 slices)",
    url="https://github.com/HUANGLIZI/LViT",
    licence="CC BY-NC-ND 3.0 (MosMedData); texts: LViT, MIT",
    citation="Morozov et al., MosMedData: Chest CT Scans with COVID-19 Related Findings, medRxiv (2020); Hofmanninger "
    "et al., Automatic lung segmentation in routine imaging is primarily a data diversity problem, European Radiology "
    "Experimental 4 (2020); texts: Li et al., LViT, IEEE Transactions on Medical Imaging 43 (2024)",
    protocol="training, validation and test slices by folder, as LViT passes them on; 25 % labelled",
    channels=("CT slice",),  # 8-bit windows, not Hounsfield units, so nnU-Net's CT normalisation does not fit
    prompts={"background": "a slice of the chest without infection", "infection": "a COVID-19 infection of the lung"},
    notes=("the split is by slice: slices of one study are in training and test, which flatters every method",),
)


def find_cases(folder: Path) -> Source:
    """The images, masks and texts of LViT's folders; see `qata_cov19.find_images`."""
    return qata_cov19.find_images(folder, ABOUT)


convert = partial(convert_dataset, find_cases)
