"""Metrics worked out by hand on cubes, with anisotropic spacing."""

import math

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.metrics import evaluate_folder, segmentation_metrics

SPACING = (3.0, 1.0, 0.5)


def cube(start, size=4, label=1, shape=(12, 12, 12)):
    image = np.zeros(shape, np.uint8)
    image[tuple(slice(s, s + size) for s in start)] = label
    return image


@pytest.mark.parametrize(("axis", "millimetres"), list(enumerate(SPACING)))
def test_a_shifted_cube(axis, millimetres):
    start = [4, 4, 4]
    start[axis] += 1
    metrics = segmentation_metrics(cube(start), cube((4, 4, 4)), {"background": 0, "cube": 1}, SPACING)
    # 3 of the cube's 4 layers overlap. 16 of its 56 surface voxels, more than 5 %, lie one voxel outside the other
    assert metrics == {"cube": {"dice": pytest.approx(2 * 48 / 128), "hd95_mm": pytest.approx(millimetres)}}


def test_distance_is_the_95th_percentile():
    """One stray voxel of 57 is beyond it, four of 60 are not."""
    reference = cube((4, 4, 4))
    stray = reference.copy()
    stray[0, 4, 4] = 1
    assert segmentation_metrics(stray, reference, {"cube": 1}, SPACING)["cube"] == {
        "dice": pytest.approx(128 / 129),
        "hd95_mm": 0,
    }
    stray[0, 4:6, 4:6] = 1
    assert segmentation_metrics(stray, reference, {"cube": 1}, SPACING)["cube"]["hd95_mm"] == pytest.approx(
        12
    )


def test_both_directions_count():
    """What the prediction lacks is as far away as what it has too much."""
    one, two = cube((0, 4, 4)), cube((0, 4, 4)) + cube((8, 4, 4))
    for prediction, reference in ((one, two), (two, one)):
        metrics = segmentation_metrics(prediction, reference, {"cube": 1}, SPACING)["cube"]
        # the second cube's layers lie 5 to 8 voxels of 3 mm from the first one; more than 5 % of the voxels in the 8th
        assert metrics == {"dice": pytest.approx(2 * 64 / 192), "hd95_mm": pytest.approx(24)}


def test_empty_prediction_or_reference():
    labels, empty, full = {"cube": 1}, np.zeros((12, 12, 12), np.uint8), cube((4, 4, 4))
    diagonal = math.hypot(36, 12, 6)
    for prediction, reference in ((empty, full), (full, empty)):
        metrics = segmentation_metrics(prediction, reference, labels, SPACING)["cube"]
        assert metrics == {"dice": 0, "hd95_mm": pytest.approx(diagonal)}
    assert all(np.isnan(list(segmentation_metrics(empty, empty, labels, SPACING)["cube"].values())))


def test_regions_and_ignored_voxels():
    reference = cube((0, 0, 0)) + cube((4, 4, 4), label=2) + cube((8, 8, 8), label=3)
    prediction = cube((0, 0, 0)) + cube((4, 4, 4), label=1) + cube((8, 8, 8), label=1)
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    metrics = segmentation_metrics(prediction, reference, labels, SPACING)
    assert metrics["whole"] == {"dice": 1, "hd95_mm": 0}
    assert metrics["core"]["dice"] == 0


def test_two_dimensions():
    """A slice has a contour, not a surface: as (1, H, W) every voxel of it would be one."""
    prediction, reference = cube((4, 5, 4))[4:5], cube((4, 4, 4))[4:5]
    metrics = segmentation_metrics(prediction, reference, {"square": 1}, (999, 2.0, 0.5))["square"]
    # 4 of the 12 pixels on the prediction's contour, the row that lies outside, are one pixel of 2 mm off
    assert metrics == {"dice": pytest.approx(0.75), "hd95_mm": pytest.approx(2)}


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        segmentation_metrics(cube((0, 0, 0)), cube((0, 0, 0))[:6], {"cube": 1}, SPACING)


def write(folder, name, array, spacing=SPACING):
    folder.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, folder / name)


def test_folder(tmp_path):
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for name, start in (("b", (4, 4, 4)), ("a", (5, 4, 4))):
        write(predictions, f"{name}.nii.gz", cube(start))
        write(references, f"{name}.nii.gz", cube((4, 4, 4)))
    assert evaluate_folder(predictions, references, {"background": 0, "cube": 1}) == [
        {"case": "a", "label": "cube", "dice": pytest.approx(0.75), "hd95_mm": pytest.approx(3)},
        {"case": "b", "label": "cube", "dice": 1, "hd95_mm": 0},
    ]


def test_folder_refuses_what_does_not_fit(tmp_path):
    predictions, references, labels = tmp_path / "predictions", tmp_path / "references", {"cube": 1}
    with pytest.raises(UserError, match="no .*nii.gz"):
        evaluate_folder(predictions, references, labels)
    write(references, "a.nii.gz", cube((4, 4, 4)))
    with pytest.raises(UserError, match="a.nii.gz: missing"):
        evaluate_folder(predictions, references, labels)
    write(predictions, "a.nii.gz", cube((4, 4, 4)), spacing=(1, 1, 1))
    with pytest.raises(UserError, match="spacing"):
        evaluate_folder(predictions, references, labels)
