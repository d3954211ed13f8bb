"""COVID-19 infection in chest X-rays, with a text for each: QaTa-COV19-v2 and LViT's texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import SimpleITK as sitk
from PIL import Image

from nnunet_semiseg.data.image_problems import one_line_of
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets import About, Case, Read, Source, by_name, convert_dataset, find_files, read_gray

ABOUT = About(
    name="QaTaCOV19",
    title="COVID-19 infection in chest X-rays, QaTa-COV19-v2 with LViT's texts (9258 images)",
    url="https://www.kaggle.com/datasets/aysendegerli/qatacov19-dataset",
    licence="for research; see the source. Texts: LViT, MIT",
    citation="Degerli et al., OSegNet: Operational Segmentation Network for COVID-19 Detection using Chest X-ray "
    "Images, ICIP 2022; texts: Li et al., LViT: Language meets Vision Transformer in Medical Image Segmentation, IEEE "
    "Transactions on Medical Imaging 43 (2024)",
    layout="Train Set/Images/*.png, Train Set/Ground-truths/mask_*.png, Test Set/ alike (LViT's Train Folder/img,\n"
    "labelcol and Val Folder are read as well), and *.xlsx with the columns Image and Description",
    protocol="7145 training and 2113 test images, by folder; 25 % labelled",
    channels=("X-ray",),
    labels={"background": 0, "infection": 1},
    prompts={"background": "the chest without infection", "infection": "a COVID-19 infection of the lung"},
    file_ending=".png",
    label_values={0: 0, 1: 1, 255: 1},
    num_labeled=0.25,
)

PARTS = {"Train Set": "train", "Train Folder": "train", "Val Set": "val", "Val Folder": "val"}
PARTS |= {"Test Set": "test", "Test Folder": "test"}
IMAGES, MASKS = ("Images", "img"), ("Ground-truths", "labelcol")


def find_images(folder: Path, about: About) -> Source:
    """The cases of each part, by the names of folders. Their texts are from all tables below the folder.

    Raises:
        UserError: see `by_name` and `read_texts`.
    """
    images, masks, parts = [], [], {}
    for path in find_files(folder, "*.png"):
        kind, part = path.parent.name, PARTS.get(path.parent.parent.name)
        if part and kind in IMAGES:
            images.append((_key(path.name), path))
            parts[_key(path.name)] = part
        elif part and kind in MASKS:
            masks.append((_key(path.name), path))
    masks, texts = by_name(masks), read_texts(folder)
    cases = {}
    for name, path in by_name(images).items():
        mask = masks.get(name, path.parent.parent / MASKS[0] / f"mask_{path.name}")
        cases[name] = Case(name, (_one_channel(path),), Read(read_mask, (mask,)), texts.get(name))
    by_part = {part: [n for n in cases if parts[n] == part] for part in ("train", "val", "test")}
    about = replace(about, notes=(*about.notes, *text_notes(cases, texts)))
    return Source(about, cases, by_part["train"], by_part["val"], by_part["test"])


def _one_channel(path: Path) -> Path | Read:
    """The file itself if it has one channel, so that it can be linked. Else a `Read` that takes one of equal channels.

    Only the header of the file is read here.
    """
    try:
        with Image.open(path) as image:
            return path if image.mode in ("L", "I;16") else Read(read_gray, (path,))
    except OSError:
        return path  # damaged: the worker will report it as the problem of this case


def read_mask(path: Path) -> sitk.Image | tuple[sitk.Image, str]:
    """Read a mask of 0 and 255, or of 0 and 1.

    Lossy compression leaves values between 0 and 255. They are set to 0 or 255, and a note on that is returned, too.
    """
    mask = read_gray(path)
    voxels = sitk.GetArrayViewFromImage(mask)
    if voxels.max() < 128 or np.isin(voxels, (0, 255)).all():
        return mask
    clean = sitk.GetImageFromArray(np.where(voxels >= 128, 255, 0).astype(np.uint8))
    return clean, f"the mask has values other than 0 and 255: cut at 128 ({path.name})"


def text_notes(cases: Collection[str], texts: Mapping[str, str]) -> list[str]:
    """Lines that tell the user how many images have no text, and how many texts have no image."""
    bare, alone = ([name for name in a if name not in b] for a, b in ((cases, texts), (texts, cases)))
    notes = []
    if bare:
        notes.append(f"{len(bare)} of {len(cases)} images have no text: {', '.join(bare[:5])}")
    if alone:
        notes.append(f"{len(alone)} of {len(texts)} texts have no image: {', '.join(alone[:5])}")
    return notes


def read_texts(folder: Path) -> dict[str, str]:
    """Read the text of each image from every .xlsx. Names of images may have `mask_` before them and an ending.

    Returns:
        Texts by the names of images, without `mask_` and ending.

    Raises:
        UserError: a table cannot be read, or has no column Image or Description.
    """
    texts: dict[str, str] = {}
    for file in find_files(folder, "*.xlsx"):
        try:
            table = pandas.read_excel(file, dtype=str)
        except Exception as e:  # of many kinds: it is a zip archive of XML files
            raise UserError(f"{file}: cannot be read ({one_line_of(e)}): download it again") from None
        table.columns = [str(column).strip() for column in table.columns]
        if missing := {"Image", "Description"} - set(table.columns):
            raise UserError(f"{file}: no column {' and '.join(sorted(missing))}: use the table that LViT publishes")
        table = table.dropna(subset=["Image", "Description"])
        pairs = zip(table["Image"], table["Description"], strict=True)
        texts |= {_key(image.strip()): text.strip() for image, text in pairs}
    return texts


def _key(name: str) -> str:
    return re.sub(r"\.(png|jpg|jpeg|tif|tiff|bmp)$", "", name.removeprefix("mask_"), flags=re.IGNORECASE)


def find_cases(folder: Path) -> Source:
    """The images, masks and texts of LViT's folders; see `find_images`."""
    return find_images(folder, ABOUT)


convert = partial(convert_dataset, find_cases)
