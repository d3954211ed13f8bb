"""Turn what the user has downloaded into a raw dataset for nnU-Net, with `imagesUn`.

A module in `dataset_conversion/` describes one data set and finds its cases (`ABOUT`, `find_cases`). All the rest is
here and is the same for all data sets: choosing labelled, unlabelled and test cases, checking and writing them, and
continuing after an interruption. The `convert` of such a module calls `convert_dataset` with the
module's `find_cases`.

While a dataset is being made, the folder `.conversion` in it holds the options and a record of every complete case. If
a case failed, the folder stays, so that the same command continues. `dataset.json` is written last.
"""

from nnunet_semiseg.raw_datasets.dataset import convert_dataset
from nnunet_semiseg.raw_datasets.description import About, Case, Crop, Read, Source
from nnunet_semiseg.raw_datasets.parts import assign
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
