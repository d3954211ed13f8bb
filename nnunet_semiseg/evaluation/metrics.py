"""Metrics of segmentation files that nnU-Net has written. MONAI computes all of them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from tqdm import tqdm

from nnunet_semiseg.data.image_problems import one_line_of
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.parallel import killed_workers, run_jobs

Labels = Mapping[str, int | Sequence[int]]

METRICS = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "hd95_mm": "HD95, mm",
    "hd95_voxels": "HD95, voxels",
    "asd_mm": "ASD, mm",
    "asd_voxels": "ASD, voxels",
    "nsd": "NSD",
}
"""The key of each metric, and its heading in tables."""
HIGHER_IS_BETTER = {"dice", "jaccard", "nsd"}


def segmentation_metrics(
    prediction: np.ndarray, reference: np.ndarray, labels: Labels, spacing: Sequence[float], tolerance: float = 2.0
) -> dict[str, dict[str, float]]:
    """The metrics of every class or region, as MONAI defines them.

    - `dice`, `jaccard`: overlap of the voxels, 0 to 1;
    - `hd95`: 95 % Hausdorff distance, the larger of the two directed ones. Each is the 95th percentile of the distances
      from the voxels of one surface to the other surface. MedPy, used in papers, takes one percentile over both;
    - `asd`: average surface distance, from the surface voxels of the prediction to the surface of the reference, as in
      the papers of the field (MedPy's `asd`);
    - `nsd`: normalised surface distance (surface Dice), the share of both surfaces within `tolerance` of the other.

    Distances are in mm or, with `_voxels`, in voxels of the image. If nothing is segmented:

    - prediction and reference are both empty: overlaps and `nsd` are 1, distances 0, as in the BraTS challenges.
      nnU-Net's own evaluation has nan there. With nan, the means of two methods would be over different cases. A
      case in which only one method segments something would not be compared;
    - one of them is empty: overlaps and `nsd` are 0, and a distance is the image's diagonal, which no distance exceeds.
      With nan the case would not count in the mean; with infinity nothing else would.

    Args:
        prediction, reference: label maps (*S).
        labels: as in dataset.json: a name with its label or, for regions, several labels. `background` is ignored.
            Voxels that have the label `ignore` in the reference count in neither map.
        spacing: the voxel spacing along each axis, in mm.
        tolerance: the tolerance of `nsd`, in mm.

    Returns:
        {name: {metric: value}}, with the keys of `METRICS`.

    Raises:
        ValueError: prediction and reference have different shapes.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    if reference.ndim == 3 and len(reference) == 1:  # a 2d image, as nnU-Net reads it: it has no surface along axis 0
        prediction, reference, spacing = prediction[0], reference[0], spacing[1:]
    spacing = [float(s) for s in spacing]
    counted = reference != labels["ignore"] if "ignore" in labels else True

    metrics = {}
    for name, label in labels.items():
        if name not in ("background", "ignore"):
            p, r = (torch.from_numpy(np.isin(x, label) & counted)[None, None] for x in (prediction, reference))
            metrics[name] = _of_masks(p, r, spacing, tolerance)
    return metrics


def _of_masks(p: torch.Tensor, r: torch.Tensor, spacing: list[float], tolerance: float) -> dict[str, float]:
    voxel = [1.0] * len(spacing)
    if not (p.any() or r.any()):
        return {metric: float(metric in HIGHER_IS_BETTER) for metric in METRICS}
    if not (p.any() and r.any()):
        mm, voxels = (float(np.linalg.norm(np.multiply(p.shape[2:], unit))) for unit in (spacing, voxel))
        worst = {"hd95_mm": mm, "asd_mm": mm, "hd95_voxels": voxels, "asd_voxels": voxels}
        return {metric: worst.get(metric, 0.0) for metric in METRICS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls itself with a deprecated argument
        values = {
            "dice": compute_dice(p, r),
            "jaccard": compute_iou(p, r),
            "hd95_mm": compute_hausdorff_distance(p, r, True, percentile=95, spacing=spacing),
            "hd95_voxels": compute_hausdorff_distance(p, r, True, percentile=95, spacing=voxel),
            "asd_mm": compute_average_surface_distance(p, r, True, spacing=spacing),
            "asd_voxels": compute_average_surface_distance(p, r, True, spacing=voxel),
            "nsd": compute_surface_dice(p, r, [tolerance], True, spacing=spacing),
        }
    return {metric: value.item() for metric, value in values.items()}


def evaluate_case(
    prediction_file: Path, reference_file: Path, labels: Labels, reader: type[BaseReaderWriter], tolerance: float = 2.0
) -> dict[str, dict[str, float]]:
    """Compute `segmentation_metrics` of two files.

    Raises:
        UserError: the prediction is missing; a file cannot be read; the grid of the prediction is not that of the
            reference (shape, spacing, origin, axes).
    """
    if not prediction_file.is_file():
        raise UserError(f"{prediction_file}: no such prediction: predict this case, or remove its reference")
    prediction, p = _read(prediction_file, reader, "predict this case again")
    reference, r = _read(reference_file, reader, "replace it")
    if prediction.shape != reference.shape or not np.allclose(p["spacing"], r["spacing"]):
        raise UserError(
            f"{prediction_file}: shape {prediction.shape[1:]} and spacing {_listed(p)} mm, but {reference_file} has"
            f" {reference.shape[1:]} and {_listed(r)}: predict from the images that belong to the references"
        )
    if not _same_place(p, r):
        raise UserError(
            f"{prediction_file}: has another origin or other axes than {reference_file}, so they do not"
            " overlap: give images and references the same header"
        )
    return segmentation_metrics(prediction[0], reference[0], labels, r["spacing"], tolerance)


def _read(file: Path, reader: type[BaseReaderWriter], fix: str) -> tuple[np.ndarray, dict]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net's readers print what is wrong
            return reader().read_seg(str(file))
    except Exception as e:  # the kind depends on the damage
        raise UserError(f"{file}: cannot be read ({one_line_of(e)}): {fix}") from None


def _same_place(a: dict, b: dict) -> bool:
    """Whether two images have the same origin (within half a voxel) and axes (within about half a degree).

    True if nnU-Net's reader gives no origins and axes, as for PNG.
    """
    if "sitk_stuff" in a and "sitk_stuff" in b:
        a, b = a["sitk_stuff"], b["sitk_stuff"]
        return np.allclose(a["origin"], b["origin"], rtol=0, atol=min(b["spacing"]) / 2) and np.allclose(
            a["direction"], b["direction"], atol=0.01
        )
    if "nibabel_stuff" in a and "nibabel_stuff" in b:
        a, b = a["nibabel_stuff"]["original_affine"], b["nibabel_stuff"]["original_affine"]
        voxel = np.linalg.norm(b[:3, :3], axis=0)
        same_axes = np.allclose(a[:3, :3] / voxel, b[:3, :3] / voxel, atol=0.01)
        return same_axes and np.allclose(a[:3, 3], b[:3, 3], rtol=0, atol=voxel.min() / 2)
    return True


def evaluate_folder(
    predictions_folder: str | Path,
    references_folder: str | Path,
    labels: Labels,
    file_ending: str = ".nii.gz",
    reader: type[BaseReaderWriter] = SimpleITKIO,
    tolerance: float = 2.0,
    cases: Collection[str] | None = None,
    num_processes: int = 0,
) -> list[dict]:
    """Compute `segmentation_metrics` of every case that has a reference.

    Args:
        cases: only these cases are evaluated. None: all that have a reference.
        num_processes: with 0 this process does the work.

    Returns:
        A row {"case": ..., "label": ..., METRIC: value, ...} for every case and label, sorted by case.

    Raises:
        UserError: there are no references; a process was killed; see also `evaluate_case`.
    """
    references = sorted(Path(references_folder).glob(f"*{file_ending}"))
    if not references:
        raise UserError(f"{references_folder}: has no file *{file_ending}: put the reference labels there")
    if cases is not None:
        references = [r for r in references if r.name[: -len(file_ending)] in cases]
    jobs = [(Path(predictions_folder, r.name), r, labels, reader, tolerance) for r in references]
    rows = []
    done = run_jobs(_evaluate_job, jobs, num_processes)
    with killed_workers(predictions_folder):
        for reference, metrics in tqdm(done, "Evaluation", len(jobs), delay=10, disable=None, leave=False):
            case = reference.name[: -len(file_ending)]
            rows += [{"case": case, "label": name, **values} for name, values in metrics.items()]
    return sorted(rows, key=lambda row: row["case"])


def _evaluate_job(prediction: Path, reference: Path, *args) -> tuple[Path, dict[str, dict[str, float]]]:
    return reference, evaluate_case(prediction, reference, *args)


def _listed(properties: dict) -> str:
    return "x".join(f"{s:g}" for s in properties["spacing"])
