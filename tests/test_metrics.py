"""Metrics worked out by hand on cubes, with anisotropic spacing."""

import math
import os
import signal

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.metrics import METRICS, evaluate_folder, segmentation_metrics

SPACING = (3.0, 1.0, 0.5)


def cube(start, size=4, label=1, shape=(12, 12, 12)):
    image = np.zeros(shape, np.uint8)
    image[tuple(slice(s, s + size) for s in start)] = label
    return image


def metrics_of(prediction, reference, spacing=SPACING, **kwargs):
    return segmentation_metrics(prediction, reference, {"background": 0, "cube": 1}, spacing, **kwargs)["cube"]


@pytest.mark.parametrize(("axis", "millimetres"), list(enumerate(SPACING)))
def test_a_shifted_cube(axis, millimetres):
    start = [4, 4, 4]
    start[axis] += 1
    # 3 of the cube's 4 layers overlap. 16 of its 56 surface voxels, more than 5 %, lie one voxel outside the other. Of
    # the 16 on the opposite side 4 lie inside the other, next to its surface: 0.5 mm sideways, if no shorter way
    assert metrics_of(cube(start), cube((4, 4, 4)), tolerance=1.5) == pytest.approx({
        "dice": 2 * 48 / 128,
        "jaccard": 48 / 80,
        "hd95_mm": millimetres,
        "hd95_voxels": 1,
        "asd_mm": (16 * millimetres + 4 * 0.5) / 56,
        "asd_voxels": (16 + 4) / 56,
        "nsd": 40 / 56 if millimetres > 1.5 else 1,
    })  # fmt: skip


def test_surface_distance_is_that_of_the_predictions_surface():
    """As in the papers: what the prediction lacks is not in it."""
    one, two = cube((0, 4, 4)), cube((0, 4, 4)) + cube((8, 4, 4))
    assert metrics_of(one, two)["asd_mm"] == 0
    # the second cube's layers of 16, 12, 12 and 16 surface voxels are 5 to 8 voxels away
    expected = (16 * 5 + 12 * 6 + 12 * 7 + 16 * 8) / 112
    assert metrics_of(two, one)["asd_voxels"] == pytest.approx(expected)
    assert metrics_of(two, one)["asd_mm"] == pytest.approx(3 * expected)


def test_dice_is_nnunets():
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics

    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 3, (6, 7, 8), np.uint8) for _ in range(2)]

    class Reader:
        def read_seg(self, file):
            return maps[int(file)][None], {}

    theirs = compute_metrics("0", "1", Reader(), [1, 2])["metrics"]
    ours = segmentation_metrics(maps[1], maps[0], {"a": 1, "b": 2}, (1, 1, 1))
    for name, label in (("a", 1), ("b", 2)):
        assert ours[name]["dice"] == pytest.approx(theirs[label]["Dice"])
        assert ours[name]["jaccard"] == pytest.approx(theirs[label]["IoU"])


def test_distance_is_the_95th_percentile():
    """One stray voxel of 57 is beyond it, four of 60 are not."""
    reference = cube((4, 4, 4))
    stray = reference.copy()
    stray[0, 4, 4] = 1
    metrics = metrics_of(stray, reference)
    assert metrics["dice"] == pytest.approx(128 / 129) and metrics["hd95_mm"] == 0
    stray[0, 4:6, 4:6] = 1
    assert metrics_of(stray, reference)["hd95_mm"] == pytest.approx(12)


def test_both_directions_count():
    """What the prediction lacks is as far away as what it has too much."""
    one, two = cube((0, 4, 4)), cube((0, 4, 4)) + cube((8, 4, 4))
    for prediction, reference in ((one, two), (two, one)):
        metrics = metrics_of(prediction, reference)
        # the second cube's layers lie 5 to 8 voxels of 3 mm from the first one; more than 5 % of the voxels in the 8th
        assert metrics["dice"] == pytest.approx(2 * 64 / 192) and metrics["hd95_mm"] == pytest.approx(24)


def test_empty_prediction_or_reference():
    empty, full = np.zeros((12, 12, 12), np.uint8), cube((4, 4, 4))
    mm, voxels = math.hypot(36, 12, 6), math.hypot(12, 12, 12)
    worst = {"hd95_mm": mm, "asd_mm": mm, "hd95_voxels": voxels, "asd_voxels": voxels}
    for prediction, reference in ((empty, full), (full, empty)):
        assert metrics_of(prediction, reference) == pytest.approx({"dice": 0, "jaccard": 0, "nsd": 0, **worst})
    perfect = {"dice": 1, "jaccard": 1, "nsd": 1}
    assert metrics_of(empty, empty) == {metric: perfect.get(metric, 0) for metric in METRICS}


def test_regions_and_ignored_voxels():
    reference = cube((0, 0, 0)) + cube((4, 4, 4), label=2) + cube((8, 8, 8), label=3)
    prediction = cube((0, 0, 0)) + cube((4, 4, 4), label=1) + cube((8, 8, 8), label=1)
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    metrics = segmentation_metrics(prediction, reference, labels, SPACING)
    assert metrics["whole"]["dice"] == 1 and metrics["whole"]["hd95_mm"] == 0
    assert metrics["core"]["dice"] == 0


def test_two_dimensions():
    """A slice has a contour, not a surface: as (1, H, W) every voxel of it would be one."""
    prediction, reference = cube((4, 5, 4))[4:5], cube((4, 4, 4))[4:5]
    metrics = segmentation_metrics(prediction, reference, {"square": 1}, (999, 2.0, 0.5))["square"]
    # 4 of the 12 pixels on the prediction's contour, the row that lies outside, are one pixel of 2 mm off
    assert metrics["dice"] == pytest.approx(0.75) and metrics["hd95_mm"] == pytest.approx(2)


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
    rows = evaluate_folder(predictions, references, {"background": 0, "cube": 1})
    assert [row.keys() for row in rows] == 2 * [{"case": 0, "label": 0, **METRICS}.keys()]
    assert [(row["case"], row["label"], row["dice"], row["hd95_mm"]) for row in rows] == [
        ("a", "cube", pytest.approx(0.75), pytest.approx(3)),
        ("b", "cube", 1, 0),
    ]


class Deadly(SimpleITKIO):
    def read_seg(self, seg_fname):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(tmp_path):
    for part in ("predictions", "references"):
        write(tmp_path / part, "a.nii.gz", cube((4, 4, 4)))
    with pytest.raises(UserError, match=r"^\S*/predictions: a worker was killed, probably because memory .* -np$"):
        evaluate_folder(tmp_path / "predictions", tmp_path / "references", {"cube": 1}, reader=Deadly, num_processes=1)


def test_folder_refuses_what_does_not_fit(tmp_path):
    predictions, references, labels = tmp_path / "predictions", tmp_path / "references", {"cube": 1}
    with pytest.raises(UserError, match="no .*nii.gz"):
        evaluate_folder(predictions, references, labels)
    write(references, "a.nii.gz", cube((4, 4, 4)))
    with pytest.raises(UserError, match="a.nii.gz: no such prediction"):
        evaluate_folder(predictions, references, labels)
    write(predictions, "a.nii.gz", cube((4, 4, 4)), spacing=(1, 1, 1))
    with pytest.raises(UserError, match="spacing"):
        evaluate_folder(predictions, references, labels)
