"""Brain tumours in four MR sequences: BraTS 2020."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_semiseg.dataset_conversion import brats2019
from nnunet_semiseg.raw_datasets import Source, convert_dataset, seeded_split

ABOUT = replace(
    brats2019.ABOUT,
    name="BraTS2020",
    title="Brain tumour MRI, BraTS 2020 (369 cases)",
    url="https://www.med.upenn.edu/cbica/brats2020/data.html",
    layout="MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz, ..._t1.nii.gz,\n"
    "  ..._t1ce.nii.gz, ..._t2.nii.gz, ..._seg.nii.gz; .nii is read as well; beside it, if it is there,\n"
    "MICCAI_BraTS2020_ValidationData/BraTS20_Validation_001/..., without labels",
    protocol="none is published for semi-supervised training: a fixed random list, a fifth of the training data for "
    "testing, 10 % of the rest labelled; the challenge's validation data, which have no labels, are unlabelled "
    "training images",
    num_labeled=0.1,
    **brats2019.REGIONS,
)
ODD_LABELS = {"BraTS20_Training_355": "W39_1998.09.19_Segm.nii"}  # its name in the official download


def find_cases(folder: Path) -> Source:
    """The training cases, a fixed random fifth of them for testing. The challenge's validation cases are unlabelled."""
    cases = brats2019.find_sequences(folder, ABOUT, ODD_LABELS)
    own = [name for name in cases if name.startswith("BraTS20_Training_")]
    others = sorted(cases.keys() - set(own))
    train, test = seeded_split(own, test=0.2)
    # a number, so that the labelled cases are the same with and without the others
    about = replace(brats2019.with_own_ending(ABOUT, cases), num_labeled=max(1, round(ABOUT.num_labeled * len(train))))
    cases |= {name: replace(cases[name], label=None) for name in others}
    return Source(about, cases, [*train, *others], test=test)


convert = partial(convert_dataset, find_cases)
