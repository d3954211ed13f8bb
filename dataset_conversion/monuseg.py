"""Nuclei in histology, with a text for each image: MoNuSeg."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import SimpleITK as sitk
from skimage.draw import polygon

from nnunet_semiseg.dataset_conversion.qata_cov19 import read_texts, text_notes
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets import About, Case, Read, Source, by_name, convert_dataset, find_files

ABOUT = About(
    name="MoNuSeg",
    title="Nuclei in H&E-stained tissue, MoNuSeg 2018 (37 training and 14 test images)",
    url="https://monuseg.grand-challenge.org/Data/",
    licence="CC BY-NC-SA 4.0; texts: LViT, MIT",
    citation="Kumar et al., A Multi-Organ Nucleus Segmentation Challenge, IEEE Transactions on Medical Imaging 39 "
    "(2020)",
    layout="Tissue Images/*.tif and Annotations/*.xml for training, *.tif beside *.xml (MoNuSegTestData) for testing;\n"
    "*.xlsx with the columns Image and Description (LViT's texts), if there are any",
    protocol="training and test images by folder; 25 % labelled",
    channels=("red", "green", "blue"),
    labels={"background": 0, "nucleus": 1},
    prompts={"background": "tissue between the nuclei", "nucleus": "a cell nucleus in a stained tissue section"},
    file_ending=".tif",
    num_labeled=0.25,
)


def find_cases(folder: Path) -> Source:
    """All images in `Tissue Images` and `MoNuSegTestData`, others with an annotation beside them, and their texts.

    The folder says what is for testing. A case without an annotation fails later.

    Raises:
        UserError: see `by_name` and `read_texts`.
    """
    cases, train, test, texts = {}, [], [], read_texts(folder)
    found = find_files(folder, "*.tif")
    places = ("Tissue Images", "MoNuSegTestData")
    images = [path for path in found if path.parent.name in places or path.with_suffix(".xml").exists()]
    for name, image in by_name((path.stem, path) for path in images).items():
        in_training = image.parent.name == "Tissue Images"
        (train if in_training else test).append(name)
        outlines = (image.parent.with_name("Annotations") if in_training else image.parent) / f"{name}.xml"
        cases[name] = Case(name, (image,), Read(rasterise, (outlines, image)), texts.get(name))
    notes = text_notes(cases, texts) if texts else []
    if others := sorted(set(found) - set(images)):
        some = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        notes.append(f"{len(others)} .tif without an annotation are left out: {some}")
    return Source(replace(ABOUT, notes=tuple(notes)), cases, train, test=test)


def rasterise(outlines: Path, image: Path) -> sitk.Image:
    """The union of the annotated polygons on the image's grid, as 0 and 1.

    Raises:
        UserError: `outlines` is not an annotation of Aperio ImageScope.
    """
    header = sitk.ReadImage(image)
    mask = np.zeros(header.GetSize()[::-1], np.uint8)
    try:
        regions = ElementTree.parse(outlines).iter("Region")
        for region in regions:
            points = np.array([(float(v.get("Y")), float(v.get("X"))) for v in region.iter("Vertex")]).reshape(-1, 2)
            if len(points):  # ImageScope may leave empty regions
                mask[polygon(*points.T, mask.shape)] = 1
    except (ElementTree.ParseError, TypeError, ValueError) as e:
        raise UserError(f"{outlines}: not an annotation of Aperio ImageScope ({e}): download it again") from None
    label = sitk.GetImageFromArray(mask)
    label.CopyInformation(header)
    return label


convert = partial(convert_dataset, find_cases)
