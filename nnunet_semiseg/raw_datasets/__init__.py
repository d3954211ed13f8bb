"""From what the user has downloaded to a raw dataset of nnU-Net's, with `imagesUn`.

A module in `dataset_conversion/` describes one data set and finds its cases (`ABOUT`, `find_cases`); assigning them
to labelled, unlabelled and test, checking, writing and going on after an interruption is here, the same for all:
a module's `convert` is `convert_dataset` with its `find_cases`.

While a dataset is being made, a folder `.conversion` in it holds what was asked for and a record of every case that
is whole. It stays where a case failed, so that the same command goes on; `dataset.json` comes last.
"""

from nnunet_semiseg.raw_datasets.dataset import assign, convert_dataset
from nnunet_semiseg.raw_datasets.description import About, Case, Crop, Read, Source
from nnunet_semiseg.raw_datasets.readers import one_channel, read_dicom_series, read_gray
from nnunet_semiseg.raw_datasets.sources import JUNK, by_name, find_files, published_split, seeded_split

__all__ = [
    "JUNK",
    "About",
    "Case",
    "Crop",
    "Read",
    "Source",
    "assign",
    "by_name",
    "convert_dataset",
    "find_files",
    "one_channel",
    "published_split",
    "read_dicom_series",
    "read_gray",
    "seeded_split",
]
