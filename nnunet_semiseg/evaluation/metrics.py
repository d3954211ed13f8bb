"""Dice and 95 % Hausdorff distance, from MONAI, of segmentations as nnU-Net writes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_semiseg.errors import UserError

Labels = Mapping[str, int | Sequence[int]]


def segmentation_metrics(
    prediction: np.ndarray, reference: np.ndarray, labels: Labels, spacing: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Dice and 95 % Hausdorff distance of every class or region.

    The distance is the larger of the two directed ones, each the 95th percentile over the voxels on a surface of
    their distance to the other surface. What happens where nothing is segmented:

    - prediction and reference both empty: both metrics are nan, as in nnU-Net's own evaluation;
    - one of them empty: Dice is 0, the distance is the image's diagonal in mm, which no distance exceeds. With
      nan or infinity a method that finds nothing would leave the mean, or be all of it.

    Args:
        prediction, reference: label maps (*S).
        labels: as in dataset.json, name to label or, for regions, to several. `background` is passed over, and
            voxels that the reference marks with `ignore` count in neither map.
        spacing: of a voxel, in mm, along each axis.

    Returns:
        {name: {"dice": 0 to 1, "hd95_mm": mm}}

    Raises:
        ValueError: prediction and reference differ in shape.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    if reference.ndim == 3 and len(reference) == 1:  # a 2d image, as nnU-Net reads it: no surface along axis 0
        prediction, reference, spacing = prediction[0], reference[0], spacing[1:]
    diagonal = float(np.linalg.norm(np.multiply(reference.shape, spacing)))
    counted = reference != labels["ignore"] if "ignore" in labels else True

    metrics = {}
    for name, label in labels.items():
        if name in ("background", "ignore"):
            continue
        p, r = (torch.from_numpy(np.isin(x, label) & counted)[None, None] for x in (prediction, reference))
        if p.any() and r.any():
            dice = compute_dice(p, r).item()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 passes itself a deprecated argument
                hd95 = compute_hausdorff_distance(p, r, True, percentile=95, spacing=list(spacing)).item()
        else:
            dice, hd95 = (0.0, diagonal) if p.any() or r.any() else (np.nan, np.nan)
        metrics[name] = {"dice": dice, "hd95_mm": hd95}
    return metrics


def evaluate_folder(
    predictions_folder: str | Path,
    references_folder: str | Path,
    labels: Labels,
    file_ending: str = ".nii.gz",
    reader: type[BaseReaderWriter] = SimpleITKIO,
) -> list[dict]:
    """`segmentation_metrics` of every case that has a reference.

    Returns:
        A row {"case", "label", "dice", "hd95_mm"} for every case and label, sorted by case.

    Raises:
        UserError: no references; a reference whose prediction is missing or has another shape or spacing.
    """
    references = sorted(Path(references_folder).glob(f"*{file_ending}"))
    if not references:
        raise UserError(f"{references_folder}: no *{file_ending}: name the folder that holds the reference labels")
    rows = []
    for reference_file in references:
        prediction_file = Path(predictions_folder, reference_file.name)
        if not prediction_file.is_file():
            raise UserError(f"{prediction_file}: missing: predict this case, or take its reference out")
        (prediction, p), (reference, r) = (reader().read_seg(str(f)) for f in (prediction_file, reference_file))
        if prediction.shape != reference.shape or not np.allclose(p["spacing"], r["spacing"]):
            raise UserError(
                f"{prediction_file}: shape {prediction.shape[1:]} and spacing {p['spacing']} mm, but the reference has"
                f" {reference.shape[1:]} and {r['spacing']}: predict from the images that belong to the references"
            )
        metrics = segmentation_metrics(prediction[0], reference[0], labels, r["spacing"])
        case = reference_file.name[: -len(file_ending)]
        rows += [{"case": case, "label": name, **values} for name, values in metrics.items()]
    return rows
