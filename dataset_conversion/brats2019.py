"""BraTS 2019: the whole brain tumour in FLAIR or, with `--task regions`, three regions of it in four MR sequences."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_semiseg.raw_datasets import About, Case, Source, by_name, convert_dataset, find_files, published_split

ABOUT = About(
    name="BraTS2019",
    title="Brain tumour MRI, BraTS 2019 (335 cases)",
    url="https://www.med.upenn.edu/cbica/brats2019/data.html",
    licence="for research, after registration with CBICA; see the source",
    citation="Menze et al., The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS), IEEE Transactions on "
    "Medical Imaging 34 (2015); Bakas et al., Advancing the Cancer Genome Atlas glioma MRI collections, Scientific "
    "Data 4 (2017)",
    layout="HGG/BraTS19_CBICA_AAB_1/BraTS19_CBICA_AAB_1_flair.nii.gz, ..._t1.nii.gz, ..._t1ce.nii.gz, ..._t2.nii.gz,\n"
    "  ..._seg.nii.gz, and LGG/ alike; .nii is read as well",
    protocol="250 training, 25 validation and 60 test cases, the list of SSL4MIS; 25 or 50 labelled",
    channels=("FLAIR",),
    labels={"background": 0, "whole tumor": 1},
    prompts={
        "background": "brain tissue without a tumor",
        "whole tumor": "a brain tumor with its edema in a FLAIR magnetic resonance image",
    },
    label_values={0: 0, 1: 1, 2: 1, 4: 1},
    num_labeled=25,
)

SEQUENCES = {"FLAIR": "flair", "T1": "t1", "T1CE": "t1ce", "T2": "t2"}
REGIONS = {
    # as in nnU-Net's own conversion of BraTS: 1 edema, 2 necrosis, 3 enhancing, so that the values are consecutive
    "channels": tuple(SEQUENCES),
    "labels": {"background": 0, "whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)},
    "label_values": {0: 0, 2: 1, 1: 2, 4: 3},
    "regions_class_order": (1, 2, 3),
    "prompts": {
        "background": "brain tissue without a tumor",
        "whole tumor": "a brain tumor with its edema",
        "tumor core": "the core of a brain tumor, enhancing or necrotic",
        "enhancing tumor": "the part of a brain tumor that enhances with contrast agent",
    },
}
TASKS = {"whole_tumor": {}, "regions": REGIONS}


def find_sequences(folder: Path, about: About, odd_labels: Mapping[str, str] | None = None) -> dict[str, Case]:
    """The cases by the names of their folders. `odd_labels` has the label files of cases with other file names."""
    found = (p for p in find_files(folder, "*_flair.nii*") if p.name.endswith((".nii", ".nii.gz")))
    cases = {}
    for name, flair in by_name((path.parent.name, path) for path in found).items():
        prefix, ending = flair.name.split("_flair.")
        images = tuple(flair.with_name(f"{prefix}_{SEQUENCES[c]}.{ending}") for c in about.channels)
        label = (odd_labels or {}).get(name, f"{prefix}_seg.{ending}")
        regular = flair.with_name(f"{prefix}_seg.{ending}")
        cases[name] = Case(name, images, regular if regular.exists() else flair.with_name(label))
    return cases


def with_own_ending(about: About, cases: Mapping[str, Case]) -> About:
    """Use `.nii` if all images have it: then they are linked and need not be compressed."""
    names = [path.name for case in cases.values() for path in case.images]
    return replace(about, file_ending=".nii") if names and all(name.endswith(".nii") for name in names) else about


def find_cases(folder: Path, task: str = "whole_tumor") -> Source:
    """The published split, with the channels and the labels of a task.

    Args:
        task: `whole_tumor`, the semi-supervised protocol (FLAIR only), or `regions`, nnU-Net's, with four channels.
    """
    about = replace(ABOUT, **TASKS[task])
    cases, split = find_sequences(folder, about), published_split("brats2019")
    return Source(with_own_ending(about, cases), cases, split["train"], split["val"], split["test"])


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's options, which are arguments of `find_cases`."""
    parser.add_argument(
        "--task", choices=TASKS, default="whole_tumor",
        help="whole_tumor: only FLAIR and one class, as in the literature; regions: all four channels, and"
            " classes that overlap (nnU-Net's regions);"
        " default: %(default)s",
    )  # fmt: skip


convert = partial(convert_dataset, find_cases)
