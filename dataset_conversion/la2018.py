"""Left atrium in gadolinium-enhanced MRI: the 2018 Atrial Segmentation Challenge."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nnunet_semiseg.raw_datasets import About, Case, Crop, Source, by_name, convert_dataset, find_files, published_split

ABOUT = About(
    name="LA2018",
    title="Left atrium MRI, 2018 Atrial Segmentation Challenge (100 volumes)",
    url="https://www.cardiacatlas.org/atriaseg2018-challenge/",
    licence="for research, after registration with the Cardiac Atlas Project; see the source",
    citation="Xiong et al., A global benchmark of algorithms for segmenting the left atrium from late "
    "gadolinium-enhanced cardiac magnetic resonance imaging, Medical Image Analysis 67 (2021)",
    layout="one folder for each patient, at any depth: 06SR5RBREL16DQ6M8LWS/lgemri.nrrd, "
    "06SR5RBREL16DQ6M8LWS/laendo.nrrd",
    protocol="80 training and 20 test volumes, the list of UA-MT, DTC and followers; 4, 8 or 16 labelled",
    channels=("MRI",),
    labels={"background": 0, "left atrium": 1},
    prompts={
        "background": "tissue around the left atrium",
        "left atrium": "the left atrium in a gadolinium-enhanced magnetic resonance image of the heart",
    },
    file_ending=".nrrd",
    label_values={0: 0, 255: 1},
    num_labeled=8,
    crop=Crop(
        size=(112, 112, None),
        margin=(15, 15, None),
        source="as UA-MT: a box of at least 112 x 112 voxels, with a margin of 15 around it (UA-MT draws 10 to 20); "
        "z is not cropped",
    ),
)


def find_cases(folder: Path) -> Source:
    """One case for each folder with `lgemri.nrrd`. Training and test cases are those of the published split."""
    images = by_name((path.parent.name, path) for path in find_files(folder, "lgemri.nrrd"))
    cases = {name: Case(name, (path,), path.with_name("laendo.nrrd")) for name, path in images.items()}
    split = published_split("la2018")
    return Source(ABOUT, cases, split["train"], test=split["test"])


convert = partial(convert_dataset, find_cases)
