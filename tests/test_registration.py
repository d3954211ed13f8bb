"""Channels that do not lie upon each other: how far off they are, and back where they belong."""

from math import hypot

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_semiseg.dataset_conversion import folder as own
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.registration import align, find_rigid

SPACING = (2.0, 2.0, 3.0)


def phantom(bright: float, inner: float, shape=(24, 32, 32)) -> sitk.Image:
    """An ellipsoid (z y x) with another within it, off the middle; other values are another modality."""
    z, y, x = np.indices(shape)
    outer = ((z - 12) / 9) ** 2 + ((y - 16) / 13) ** 2 + ((x - 16) / 7) ** 2 < 1
    core = ((z - 10) / 4) ** 2 + ((y - 13) / 5) ** 2 + ((x - 18) / 4) ** 2 < 1
    voxels = bright * outer + (inner - bright) * core
    image = sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(voxels.astype(np.float32)), 1.0)
    image.SetSpacing(SPACING)
    return image


def shifted(image: sitk.Image, *mm: float) -> sitk.Image:
    """The same voxels, said to lie elsewhere, on the old grid."""
    elsewhere = sitk.Image(image)
    elsewhere.SetOrigin(mm)
    return sitk.Resample(elsewhere, image)


@pytest.fixture(scope="module")
def pair():
    """Two modalities; the second one was moved by 6, -4 and 3 mm, and so by 7.8 mm."""
    return phantom(100, 200), shifted(phantom(80, 20), 6.0, -4.0, 3.0)


def test_a_shift_is_found_and_taken_back(pair):
    fixed, moving = pair
    transform, mm = find_rigid(moving, fixed)
    assert mm == pytest.approx(hypot(6, 4, 3), abs=1)
    assert transform.TransformPoint((31, 31, 34.5)) == pytest.approx((37, 27, 37.5), abs=0.5)  # the middle
    moved, note = align(moving, fixed, "T2", "T1", "rigid")
    assert note == f"T2 was moved onto T1, by up to {mm:.1f} mm"
    difference = sitk.GetArrayFromImage(moved) - sitk.GetArrayFromImage(phantom(80, 20))
    before = sitk.GetArrayFromImage(moving) - sitk.GetArrayFromImage(phantom(80, 20))
    assert np.abs(difference).mean() < 0.2 * np.abs(before).mean()


def test_a_rotation_moves_the_corners(pair):
    """By 0.2 about the z axis through the middle: a corner, 31 mm off it along x and y, moves by 2 * 43.8 * sin 0.1."""
    fixed = pair[0]
    turn = sitk.Euler3DTransform((31, 31, 34.5), 0, 0, 0.2, (0, 0, 0))
    _, mm = find_rigid(sitk.Resample(phantom(80, 20), fixed, turn.GetInverse()), fixed)
    assert mm == pytest.approx(2 * hypot(31, 31) * np.sin(0.1), abs=1)


def test_checked_is_not_moved(pair):
    fixed, moving = pair
    same, note = align(moving, fixed, "T2", "T1", "check")
    assert same is moving and note.startswith("T2 lies ") and note.endswith(" mm off T1: move it with --register rigid")


@pytest.mark.parametrize("how", ["check", "rigid"])
def test_what_lies_right_stays(how):
    moving = phantom(80, 20)
    same, note = align(moving, phantom(100, 200), "T2", "T1", how)
    assert same is moving and "lies 0." in note and "--register" not in note


def test_another_grid_becomes_the_first_ones():
    fixed = phantom(100, 200)
    other = sitk.Resample(phantom(80, 20), (20, 20, 20), sitk.Transform(), sitk.sitkLinear, (0, 0, 0), (3.2, 3.2, 3.6))
    moved, _ = align(other, fixed, "T2", "T1", "rigid")
    assert moved.GetSize() == fixed.GetSize() and moved.GetSpacing() == SPACING


def test_an_empty_channel_is_left_alone():
    fixed = phantom(100, 200)
    same, note = align(0 * fixed, fixed, "T2", "T1", "rigid")
    assert note == "T2: not compared with T1: one of them is empty" and not sitk.GetArrayViewFromImage(same).any()


def test_no_overlap_is_refused(pair):
    far = phantom(80, 20)
    far.SetOrigin((1000, 0, 0))
    why = "All samples map outside moving image buffer"
    with pytest.raises(
        UserError,
        match=f"^cannot be aligned with the first channel .{why}.: remove this case, or align this channel by hand$",
    ):
        find_rigid(far, pair[0])


@pytest.fixture
def download(tmp_path, monkeypatch, pair):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    source = tmp_path / "download"
    for case, second in (("a", pair[1]), ("b", phantom(80, 20))):
        for name, image in (("T1", pair[0]), ("T2", second)):
            (source / "images").mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, source / "images" / f"{case}_{name}.nii.gz")
        (source / "labels").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.Cast(pair[0] > 50, sitk.sitkUInt8), source / "labels" / f"{case}.nii.gz")
    return source


@pytest.mark.parametrize("how", ["check", "rigid"])
def test_each_case_is_reported_when_it_is_converted(how, download, tmp_path, capsys):
    options = dict(labels=["organ"], channels=["T1", "T2"], num_processes=0, show_progress_bar=False)
    target = own.convert(download, 801, register=how, **options)
    printed = capsys.readouterr().out
    expected = {"check": r"case a: T2 lies ", "rigid": "case a: T2 was moved onto T1, by up to "}
    assert expected[how] in printed and "case b: T2 lies 0." in printed
    linked = [(target / "imagesTr" / f"{case}_0001.nii.gz").stat().st_nlink > 1 for case in "ab"]
    assert linked == [how == "check", True]


def test_register_is_for_several_channels(download):
    for case in "ab":
        (download / "images" / f"{case}_T1.nii.gz").rename(download / "images" / f"{case}.nii.gz")
        (download / "images" / f"{case}_T2.nii.gz").unlink()
    with pytest.raises(
        UserError, match="--register check: this option is for volumes of several channels: leave it out"
    ):
        own.convert(download, 801, labels=["organ"], register="check", num_processes=0, show_progress_bar=False)
