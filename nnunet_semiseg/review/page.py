"""The page of a review, which needs no other file, and its table `cases.csv`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnunet_semiseg.data.image_problems import IMAGES_FOLDER
from nnunet_semiseg.data.known_reviews import PAGE
from nnunet_semiseg.data.unlabeled_cases import find_unlabeled_cases
from nnunet_semiseg.evaluation.figures import COLORS, overlay
from nnunet_semiseg.evaluation.page import write_csv
from nnunet_semiseg.files import written_whole
from nnunet_semiseg.review.estimates import ESTIMATES, classes_of
from nnunet_semiseg.review.labels import MASKS, UNCERTAINTY
from nnunet_semiseg.review.request import Request
from nnunet_semiseg.review.table import Table

BRIGHT = [COLORS[i] for i in (5, 4, 3, 2, 1)]
"""Colours that can be seen on a grey image. From the sixth class on they repeat."""
PURPOSES = {
    "correction": "For correction: the cases that are most likely wrong come first.",
    "labelling": "For labelling: uncertain cases that differ from the labelled ones and from each other come first.",
    "random": "At random: the baseline for a list for labelling.",
}


def write_page(table: Table, request: Request, facts: Mapping[str, str], raw: Path, dataset_json: dict) -> Path:
    """Write `review.html` with the first cases of the list and their pictures, and `cases.csv` with all cases."""
    images, ending = find_unlabeled_cases(raw, dataset_json), dataset_json["file_ending"]
    output, rows = request.folder, table.rows
    for name, folder in (("mask", MASKS), ("uncertainty", UNCERTAINTY)):
        rows[name] = [str(output / folder / f"{case}{ending}") for case in rows["case"]]
    rows["image"] = [images[case][0] for case in rows["case"]]
    write_csv(rows.round(4), output / "cases.csv")

    colors = {name: BRIGHT[i % len(BRIGHT)] for i, name in enumerate(classes_of(dataset_json["labels"]))}
    cases = []
    for row in rows.head(request.length).to_dict("records"):
        dices = {name: row[f"dice {name}"] for name in table.classes}
        picture, caption = thumbnail(images[row["case"]][0], Path(row["mask"]), dataset_json, colors)
        cases.append(row | {"dices": dices, "picture": picture, "caption": caption, "why": _listed(row["reasons"])})
    page = {
        "title": f"Review of {request.run.dataset}",
        "purpose": PURPOSES[table.purpose],
        "facts": {**facts, "made with": " ".join(["nnunet_semiseg", *sys.argv[1:]])},
        "table": table,
        "cases": cases,
        "colors": colors,
        "count": len(rows),
        "estimates": {name: text for name, text in ESTIMATES.items() if name in rows},
        "folders": [output / MASKS, output / UNCERTAINTY, raw / IMAGES_FOLDER],
    }
    environment = Environment(loader=PackageLoader("nnunet_semiseg.review"), autoescape=True)
    html = environment.get_template("review.html").render(page)
    with written_whole(output / PAGE) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return output / PAGE


def _listed(reasons: str) -> list[str]:
    return [reason for reason in reasons.split("; ") if reason]


def thumbnail(image: str, mask: Path, dataset_json: dict, colors: Mapping[str, str]) -> tuple[str, str]:
    """Draw the slice with the largest prediction, with a contour for each class.

    Returns a data URI and the name of the slice.
    """
    reader = determine_reader_writer_from_dataset_json(dataset_json, image, verbose=False)()
    volume, properties = reader.read_images([image])
    predicted, spacing = reader.read_seg(str(mask))[0][0], properties["spacing"]
    axis = int(np.argmax(spacing)) if len(volume[0]) > 1 else 0  # the plane that radiologists look at
    if len(set(np.round(spacing, 3))) == 1:
        axis = 0
    volume, predicted = np.moveaxis(volume[0], axis, 0), np.moveaxis(predicted, axis, 0)
    index = int((predicted > 0).sum((1, 2)).argmax()) if (predicted > 0).any() else len(volume) // 2
    height, width = (s for i, s in enumerate(spacing) if i != axis)
    classes = classes_of(dataset_json["labels"])
    masks = {name: np.isin(predicted[index], label) for name, label in classes.items()}
    nothing = np.zeros_like(predicted[index])
    picture = overlay(volume[index], nothing, masks, [1], float(height / width), colors)
    return picture, f"slice {index}" if len(volume) > 1 else ""
