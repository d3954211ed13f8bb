"""`convert folder` on files as people have them: other values, damaged headers, masks in colour, DICOM."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from test_cli import write_plans

from nnunet_semiseg import cli
from nnunet_semiseg.dataset_conversion import folder as own
from nnunet_semiseg.raw_datasets import label_values, own_labels
from nnunet_semiseg.raw_datasets.volumes import read_stack

SHAPE = (5, 6, 7)  # x y z


@pytest.fixture(autouse=True)
def raw(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "raw" / "Dataset801_MyData"


def convert(source: Path, **options) -> Path:
    options = {"labels": ["organ"], "num_processes": 0, "show_progress_bar": False} | options
    return own.convert(source, 801, **options)


def nii(array: np.ndarray, file: Path, affine=None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 1.5, 1]) if affine is None else affine), file)


def image(i: int = 0, dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(i).integers(1, 100, SHAPE).astype(dtype)


LABEL = np.zeros(SHAPE, np.uint8)
LABEL[1:3, 1:4, 1:4] = 1  # 18 voxels
LABEL[3, 1:3, 1:4] = 2  # 6 voxels
ORGAN = (LABEL > 0).astype(np.uint8)  # 24 of 210


@pytest.fixture
def source(tmp_path) -> Path:
    """c0 to c3; the first two have a label."""
    for i in range(4):
        nii(image(i), tmp_path / "d" / "images" / f"c{i}.nii.gz")
        if i < 2:
            nii(ORGAN, tmp_path / "d" / "labels" / f"c{i}.nii.gz")
    return tmp_path / "d"


def voxels(file: Path) -> np.ndarray:
    """x y z, as they are in the tests."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file))).T


def about(raw: Path) -> dict:
    return json.loads((raw / "dataset.json").read_text())


# --------------------------------------------------------------------------------------------------------- label values


def gaps(folder: Path) -> None:
    for i in range(2):
        nii(np.choose(LABEL, [0, 205, 420]).astype(np.uint16), folder / "labels" / f"c{i}.nii.gz")


def test_too_few_names_are_asked_for_and_one_too_many_is_said(source, raw, capsys):
    for i in range(2):
        nii(LABEL.astype(np.uint8), source / "labels" / f"c{i}.nii.gz")
    with pytest.raises(ValueError, match="but --labels has 1 name: give a name for each with --labels NAME1 NAME2$"):
        convert(source, labels=["kidney"])
    convert(source, labels=["kidney", "tumour", "cyst"])
    assert "note: no label has a voxel of cyst (value 3): check --labels" in capsys.readouterr().out
    convert(source, labels=["kidney", "tumour"], overwrite=True)
    assert "has a voxel of" not in capsys.readouterr().out


def test_the_layout_is_said_before_names_are_asked_for(source, raw, capsys):
    with pytest.raises(ValueError, match="what do the label values mean"):
        convert(source, labels=None, dry_run=True)
    assert capsys.readouterr().out.startswith("taken for ")


def test_values_with_gaps_are_offered_and_mapped(source, raw):
    gaps(source)
    with pytest.raises(ValueError) as error:
        convert(source, labels=["kidney", "tumour"])
    assert str(error.value) == (
        f"{source}/labels: label values found are 0 (372 voxels), 205 (36), 420 (12), but there are names only for 0,"
        " 1, 2: give them names with --label-values 0=background 205=kidney 420=tumour"
    )
    with pytest.raises(ValueError, match=r"420 \(12\), but there are names only for 205: give them names"):
        convert(source, labels=None, label_values=["205=kidney"])
    assert not raw.exists()
    convert(source, labels=None, label_values=["0=background", "420=tumour", "205=kidney"])
    assert np.array_equal(voxels(raw / "labelsTr" / "c0.nii.gz"), np.choose(LABEL, [0, 2, 1]))
    assert about(raw)["labels"] == {"background": 0, "tumour": 1, "kidney": 2}
    convert(source, label_values=["0,205=background", "420=organ"], overwrite=True)
    assert np.array_equal(voxels(raw / "labelsTr" / "c1.nii.gz"), LABEL == 2)


def test_values_below_0_are_offered_so_that_they_can_be_typed(source, raw):
    for i in range(2):
        nii(ORGAN.astype(np.int16) - 1, source / "labels" / f"c{i}.nii.gz")
    with pytest.raises(ValueError, match="--label-values 0=background ' -1=organ'$"):
        convert(source)
    convert(source, labels=None, label_values=["0=organ", " -1=background"])
    assert np.array_equal(voxels(raw / "labelsTr" / "c0.nii.gz"), ORGAN)


def test_labels_that_nobody_named(source):
    with pytest.raises(
        ValueError, match=r"d: what do the label values mean\? .* 0 \(372 voxels\), 1 \(48\): .*--labels NAME1$"
    ):
        convert(source, labels=None)
    gaps(source)
    with pytest.raises(ValueError, match="0=background 205=NAME1 420=NAME2$"):
        convert(source, labels=None)


def pictures(folder: Path, label: np.ndarray, mode=None, palette=None) -> Path:
    for name in ("a", "b"):
        write(Image.fromarray(image()[:, :, 0].astype(np.uint8)), folder / "images" / f"{name}.png")
    mask = Image.fromarray(label, mode)
    if palette:
        mask.putpalette(palette)
    write(mask, folder / "labels" / "a.png")
    return folder


def write(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


FLAT = LABEL[:, :, 3]  # 21 times 0 (of 30), 6 times 1, 2 times 2... counted below
RED_BLUE = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)


def test_grey_masks_of_127_and_255(tmp_path, raw):
    n = np.bincount(FLAT.ravel())
    assert n.tolist() == [22, 6, 2]
    folder = pictures(tmp_path / "d", np.choose(FLAT, [0, 127, 255]).astype(np.uint8))
    with pytest.raises(ValueError) as error:
        convert(folder, labels=["a", "b"])
    assert str(error.value) == (
        f"{folder}/labels/a.png: label values found are 0 (22 voxels), 127 (6), 255 (2), but there are names"
        " only for 0, 1, 2: give them names with --label-values 0=background 127=a 255=b"
    )
    convert(folder, labels=None, label_values=["0=background", "127=a", "255=b"])
    assert np.array_equal(voxels(raw / "labelsTr" / "a.png").T, FLAT)

    for name in ("b", "c"):  # a smoothed one among them spoils nothing
        write(Image.fromarray(image()[:, :, 0].astype(np.uint8)), folder / "images" / f"{name}.png")
    write(Image.fromarray(np.choose(FLAT, [0, 127, 255]).astype(np.uint8)), folder / "labels" / "b.png")
    write(Image.fromarray(np.arange(30, dtype=np.uint8).reshape(FLAT.shape) * 7), folder / "labels" / "c.png")
    with pytest.raises(ValueError) as error:
        convert(folder, labels=["a", "b"], overwrite=True)
    assert str(error.value) == (
        f"{folder}/labels: label values found are 0 (44 voxels), 127 (12), 255 (4), but there are names"
        " only for 0, 1, 2: give them names with --label-values 0=background 127=a 255=b;"
        f" {folder}/labels/c.png was smoothed and has more: save it again"
    )


@pytest.mark.parametrize("kind", ["RGB", "palette", "RGBA"])
def test_masks_in_colour(kind, tmp_path, raw):
    rgb = RED_BLUE[FLAT]
    if kind == "RGBA":
        rgb = np.concatenate([rgb, np.full((*FLAT.shape, 1), 255, np.uint8)], -1)
    palette = RED_BLUE.ravel().tolist() if kind == "palette" else None
    folder = pictures(tmp_path / "d", FLAT if palette else rgb, "P" if palette else None, palette)
    if kind != "palette":
        with pytest.raises(ValueError) as error:
            convert(folder, labels=["heart", "lung"])
        assert str(error.value).endswith(
            "labels/a.png: label values found are 0/0/0 (22 voxels), 0/0/255 (2), 255/0/0 (6), but there are"
            " names only for 0, 1, 2: give them names with --label-values 0/0/0=background 0/0/255=heart 255/0/0=lung"
        )
        with pytest.raises(ValueError, match="--label-values 0/0/0=background 0/0/255=NAME1 255/0/0=NAME2$"):
            convert(folder, labels=None)
        with pytest.raises(ValueError, match="names only for 0, 1, 0/0/0, 255/0/0: give them names"):
            convert(folder, labels=None, label_values=["255/0/0=heart"])
    values = ["255/0/0=heart", "0/0/255=lung"]
    assert pickle.dumps(own.find_cases(folder, label_values=values).cases)  # workers get them
    convert(folder, labels=None, label_values=values)
    assert np.array_equal(voxels(raw / "labelsTr" / "a.png").T, FLAT)


def test_an_empty_mask_among_masks_in_colour_is_background(tmp_path, raw):
    folder = pictures(tmp_path / "d", RED_BLUE[FLAT])
    write(Image.fromarray(RED_BLUE[np.zeros_like(FLAT)]), folder / "labels" / "b.png")
    values = ["0=background", "0/0/0=background", "0/0/255=lung", "255/0/0=heart"]
    offered = " ".join(values).replace("lung", "NAME1").replace("heart", "NAME2")
    with pytest.raises(ValueError, match=f"--label-values {offered}$"):
        convert(folder, labels=None)
    convert(folder, labels=None, label_values=values)
    assert not voxels(raw / "labelsTr" / "b.png").any()


def test_images_in_colour_ask_for_channels_at_once(tmp_path):
    folder = pictures(tmp_path / "d", FLAT)
    for name in ("a", "b"):
        write(Image.fromarray(RED_BLUE[FLAT]), folder / "images" / f"{name}.png")
    with pytest.raises(
        ValueError, match="images/a.png: is a colour image: name its channels with --channels red green blue"
    ):
        own.find_cases(folder, labels=["a", "b"])
    write(Image.fromarray(np.stack([FLAT] * 3, -1)), folder / "images" / "b.png")  # grey, in three channels
    with pytest.raises(
        ValueError, match="^case a: .*images/a.png: is a colour image instead of a grey one: .*--channels"
    ):
        convert(folder, labels=["a", "b"])


def test_a_link_to_nowhere_is_said_to_be_one(source):
    (source / "images" / "c9.nii.gz").symlink_to("/nowhere.nii.gz")
    with pytest.raises(ValueError, match="^case c9: .*c9.nii.gz: is a link to /nowhere.nii.gz, which does not exist"):
        convert(source)


def test_a_colour_that_one_mask_alone_has_is_said_of_this_label(tmp_path, raw):
    folder = pictures(tmp_path / "d", RED_BLUE[(FLAT > 0).astype(int)])
    for name in ("b", "c"):
        write(Image.fromarray(image()[:, :, 0].astype(np.uint8)), folder / "images" / f"{name}.png")
        write(Image.fromarray((FLAT > 0).astype(np.uint8)), folder / "labels" / f"{name}.png")
    with pytest.raises(
        ValueError,
        match=r"^case a: .*/a.png: is a label in colour, with 0/0/0 \(22 voxels\), 255/0/0 \(8\): .*255/0/0=organ",
    ):
        convert(folder)
    assert len(list((raw / "labelsTr").iterdir())) == 2
    convert(folder, label_values=["255/0/0=organ"], overwrite=True)
    for name in "abc":
        assert np.array_equal(voxels(raw / "labelsTr" / f"{name}.png").T, FLAT > 0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["205"], "--label-values 205: write VALUE=NAME"),
        (["x=kidney"], "--label-values x=kidney: write VALUE=NAME"),
        (["1/2/300=kidney"], "1/2/300=kidney: write VALUE=NAME"),
        (["1=a", "1=b"], "--label-values: 1 is named twice"),
        (["1=a", "2=organ"], "a is not among --labels organ"),
    ],
)
def test_values_that_make_no_sense(words, message, source):
    with pytest.raises(ValueError, match=message):
        convert(source, label_values=words)


def test_smoothed_masks_are_not_offered_a_hundred_values():
    counts = dict.fromkeys(range(100), 2)
    assert label_values.offer(counts).startswith("save masks as whole numbers, without smoothing")
    assert label_values.found_text(counts).endswith("and 90 more")


# ------------------------------------------------------------------------------------------- headers and voxel values


def test_a_rounded_header_is_the_same_grid_and_a_flip_is_not(source, raw, capsys):
    affine = np.diag([1.0, 1, 1.5, 1])
    rounded, spacing, lost, flipped = (affine.copy() for _ in range(4))
    rounded[0, 3], spacing[2, 2], lost[:3, 3] = 2e-3, 1.50001, (3, -5, 7)
    flipped[0, 0], flipped[0, 3] = -1, SHAPE[0] - 1
    nii(ORGAN, source / "labels" / "c0.nii.gz", rounded)
    nii(ORGAN, source / "labels" / "c1.nii.gz", spacing)
    convert(source)
    printed = capsys.readouterr().out
    assert re.search(
        r"case c0: origin \(-0.002, -?0, 0\) differs from .*: a rounding error of .* mm, so the grid of the", printed
    )
    assert sitk.ReadImage(str(raw / "labelsTr" / "c0.nii.gz")).GetOrigin() == (0, 0, 0)
    for wrong, word in ((lost, "origin"), (flipped, "origin|direction")):
        nii(ORGAN, source / "labels" / "c0.nii.gz", wrong)
        with pytest.raises(ValueError, match=f"^case c0: .*labels/c0.nii.gz: ({word}) .* differs from"):
            convert(source, overwrite=True)


def spoil_spacing(file: Path, value: float) -> None:
    plain = nibabel.Nifti1Image(image(), None)
    plain.header.set_sform(None, code=0)
    plain.header.set_qform(None, code=0)
    data = bytearray(plain.to_bytes())
    data[88:92] = np.float32(value).tobytes()  # pixdim[3]
    file.write_bytes(gzip.compress(bytes(data)))


@pytest.mark.parametrize("value", [0.0, -1.5, np.nan, 1e-30])
def test_a_spacing_that_is_none(value, source, raw, capsys):
    spoil_spacing(source / "images" / "c3.nii.gz", value)
    with pytest.raises(
        ValueError, match=f"images/c3.nii.gz: the header's spacing is 1 1 {value:g}: give it with --spacing"
    ):
        convert(source)
    convert(source, spacing=(1, 1, 2.5), overwrite=True)
    written = sitk.ReadImage(str(raw / "imagesUn" / "c3_0000.nii.gz"))
    assert written.GetSpacing() == (1, 1, 2.5)
    assert f"case c3: the header's spacing 1 1 {value:g} is now 1 1 2.5" in capsys.readouterr().out
    assert sitk.ReadImage(str(raw / "imagesUn" / "c2_0000.nii.gz")).GetSpacing() == (1, 1, 1.5)  # it has one


NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 5 6 7\nencoding: raw\nendian: little\n"
META = "NDims = 3\nDimSize = 5 6 7\nElementType = MET_SHORT\n{}ElementDataFile = LOCAL\n"


@pytest.mark.parametrize(
    "name, header, message",
    [
        ("c3.nrrd", NRRD + "\n", "the header has no spacing: give it with --spacing"),
        ("c3.nrrd", NRRD + "spacings: nan nan nan\n\n", "the header's spacing is nan nan nan: give it with --spacing"),
        ("c3.mha", META.format(""), "the header has no spacing: give it with --spacing"),
        ("c3.mha", META.format("ElementSpacing = 1 1 0\n"), "spacing is 1 1 0: correct its line ElementSpacing"),
    ],
)
def test_headers_as_text_without_a_spacing(name, header, message, source, raw, capsys):
    (source / "images" / "c3.nii.gz").unlink()
    (source / "images" / name).write_bytes(header.encode() + image(3).tobytes("F"))
    with pytest.raises(ValueError, match=f"images/{name}: .*{message}"):
        convert(source)
    if "give" in message:
        convert(source, spacing=(1, 1, 2.5), overwrite=True)
        written = sitk.ReadImage(str(raw / "imagesUn" / "c3_0000.nii.gz"))
        assert written.GetSpacing() == (1, 1, 2.5) and np.array_equal(sitk.GetArrayFromImage(written).T, image(3))
        assert re.search("case c3: .*spacing .* is now 1 1 2.5", capsys.readouterr().out)


@pytest.mark.parametrize("ending, data", [(".nrrd", "data file: {}.raw"), (".mha", "ElementDataFile = {}.raw")])
def test_an_image_whose_voxels_are_in_another_file_is_whole_without_it(ending, data, tmp_path, raw, capsys):
    header = NRRD + "spacings: 1 1 2\n" if ending == ".nrrd" else META.format("ElementSpacing = 1 1 2\n")
    header = header.replace("ElementDataFile = LOCAL\n", "")
    for name, array in (("images/a", image()), ("images/b", image(1)), ("labels/a", ORGAN.astype(np.int16))):
        file = tmp_path / "d" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(ending).write_text(header + data.format(file.name) + "\n\n")
        file.with_suffix(".raw").write_bytes(array.tobytes("F"))
    assert set(own.find_cases(tmp_path / "d", labels=["organ"]).left_out) == set()
    convert(tmp_path / "d")
    assert f"case b: b{ending} and the file with its voxels are written as one" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "d")
    assert np.array_equal(voxels(raw / "imagesTr" / f"a_0000{ending}"), image())
    assert np.array_equal(voxels(raw / "labelsTr" / f"a{ending}"), ORGAN)


@pytest.mark.parametrize("layers", [2, 4])
def test_layers_of_a_segmentation_are_not_dropped(layers, source):
    (source / "labels" / "c0.nii.gz").unlink()
    array = np.stack([ORGAN.T] + [0 * ORGAN.T] * (layers - 1), -1)
    label = sitk.GetImageFromArray(array, isVector=True)
    label.SetSpacing((1, 1, 1.5))
    sitk.WriteImage(label, str(source / "labels" / "c0.seg.nrrd"))
    with pytest.raises(
        ValueError, match=f"^case c0: .*c0.seg.nrrd: has {layers} values in each voxel instead of one: save it"
    ):
        convert(source)


def test_nan_is_filled_on_demand(source, raw, capsys):
    for i in (1, 3):
        array = image(i, np.float32)
        array[:2] = np.nan
        nii(array, source / "images" / f"c{i}.nii.gz")
    with pytest.raises(ValueError) as error:
        convert(source)
    assert "images/c1.nii.gz: 84 voxels are NaN or infinite: choose a value for them with --nan fill" in str(
        error.value
    )
    convert(source, nan="fill", overwrite=True)
    expected = image(3, np.float32)
    expected[:2] = expected[2:].min()
    assert np.array_equal(voxels(raw / "imagesUn" / "c3_0000.nii.gz"), expected)
    assert "case c3: 84 voxels that were NaN or infinite are now" in capsys.readouterr().out
    convert(source, nan=-5.0, overwrite=True)
    assert (voxels(raw / "imagesTr" / "c1_0000.nii.gz")[:2] == -5).all()
    array = sitk.GetImageFromArray(image(1, np.float32).T)
    array[0, 0, 0] = np.inf
    sitk.WriteImage(array, str(source / "images" / "c4.nrrd"))
    for i in (1, 3):
        nii(image(i), source / "images" / f"c{i}.nii.gz")
    with pytest.raises(ValueError, match="^case c4: .*c4.nrrd: has voxels that are NaN .*: choose .* --nan fill"):
        convert(source, nan=None, overwrite=True)


def test_4d_files_and_files_with_a_fourth_dimension_of_1(source, raw, capsys):
    array = np.stack([image(3, np.float32), image(3, np.float32)], -1)
    array[0, 0, 0, 1] = np.nan
    for i in range(4):
        nii(array if i == 3 else np.stack([image(i)] * 2, -1), source / "images" / f"c{i}.nii.gz")
    nii(ORGAN[..., None], source / "labels" / "c0.nii.gz")
    convert(source, channels=["a", "b"], nan=7.0)
    assert voxels(raw / "imagesUn" / "c3_0001.nii.gz")[0, 0, 0] == 7
    assert np.array_equal(voxels(raw / "imagesUn" / "c3_0000.nii.gz"), image(3, np.float32))
    assert np.array_equal(voxels(raw / "labelsTr" / "c0.nii.gz"), ORGAN)
    assert "1 voxels that were NaN or infinite are now 7 (c3.nii.gz); channel 2 of 2" in capsys.readouterr().out


def test_sheared_axes_are_turned_on_demand(source, raw, capsys):
    affine = np.diag([1.0, 1, 1.5, 1])
    affine[0, 1] = 0.1
    nii(image(3), source / "images" / "c3.nii.gz", affine)
    with pytest.raises(ValueError, match=r"images/c3.nii.gz: its axes are not at right angles .*: with --reorient"):
        convert(source)
    convert(source, reorient=True, overwrite=True)
    written = sitk.ReadImage(str(raw / "imagesUn" / "c3_0000.nii.gz"))
    direction = np.reshape(written.GetDirection(), (3, 3))
    assert np.allclose(direction @ direction.T, np.eye(3), atol=1e-6)
    assert np.array_equal(sitk.GetArrayFromImage(written).T, image(3))
    assert "case c3: axes are now at right angles, the far corner is" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- files, channels, classes


def test_a_folder_a_patient_with_a_file_a_channel(source, raw, capsys):
    for file in list((source / "images").iterdir()):
        (source / "images" / file.name[:2]).mkdir()
        file.rename(source / "images" / file.name[:2] / "flair.nii.gz")
    convert(source)
    assert "with a folder for each case: 4 cases, 2 with a label, channels flair" in capsys.readouterr().out
    assert (raw / "imagesUn" / "c2_0000.nii.gz").samefile(source / "images" / "c2" / "flair.nii.gz")
    assert about(raw)["channel_names"] == {"0": "flair"}


def test_4d_files_are_split_into_channels(source, raw):
    for i in range(4):
        nii(np.stack([image(i), image(i) + 100], -1), source / "images" / f"c{i}.nii.gz")
    with pytest.raises(
        ValueError,
        match="c0.nii.gz: is a 4D image of 2 volumes: .* name them .*--channels NAME1 NAME2; if .* a film, save each",
    ):
        convert(source)
    nii(np.stack([image(3)] * 3, -1), source / "images" / "c3.nii.gz")
    with pytest.raises(ValueError, match="^case c3: .*c3.nii.gz: is 4D, of 3 volumes, but 2 channels are named"):
        convert(source, channels=["flair", "t1"])
    assert np.array_equal(voxels(raw / "imagesUn" / "c2_0001.nii.gz"), image(2) + 100)
    assert about(raw)["channel_names"] == {"0": "flair", "1": "t1"}


def test_films_of_frames_are_left_out(source, capsys):
    nii(np.stack([image()] * 3, -1), source / "images" / "c0_4d.nii.gz")
    found = own.find_cases(source, labels=["organ"])
    assert len(found.cases) == 4
    assert found.left_out == {"images/c0_4d.nii.gz": "of four dimensions, and most images have three"}


def test_a_channel_of_four_dimensions_is_left_out(tmp_path):
    for i in (1, 2):
        nii(image(), tmp_path / f"sub-{i}" / "anat" / f"sub-{i}_T1w.nii.gz")
        nii(image(), tmp_path / f"sub-{i}" / "anat" / f"sub-{i}_T2w.nii.gz")
        nii(np.stack([image()] * 3, -1), tmp_path / f"sub-{i}" / "func" / f"sub-{i}_bold.nii.gz")
    nii(ORGAN, tmp_path / "derivatives" / "sub-1_label-organ_mask.nii.gz")
    found = own.find_cases(tmp_path, labels=["organ"])
    assert found.about.channels == ("T1w", "T2w") and len(found.cases["sub-1"].images) == 2
    assert found.left_out["sub-2/func/sub-2_bold.nii.gz"] == "channel bold has four dimensions"


def test_labels_of_different_names_are_classes_where_these_are_named(tmp_path, raw, capsys):
    for i, name in enumerate(("liver", "spleen", "kidney")):
        nii(image(i), tmp_path / "d" / f"s{i}" / "ct.nii.gz")
        nii(ORGAN, tmp_path / "d" / f"s{i}" / "masks" / f"{name}.nii.gz")
    with pytest.raises(ValueError, match="NAME1; if each is a class of its own, --labels kidney liver spleen$"):
        convert(tmp_path / "d", labels=None)
    convert(tmp_path / "d", dry_run=True)
    assert "labels with different names are taken for the same: kidney, liver, spleen; if" in capsys.readouterr().out
    convert(tmp_path / "d", labels=["spleen", "liver", "kidney"])
    assert np.array_equal(voxels(raw / "labelsTr" / "s0.nii.gz"), 2 * ORGAN)


def test_a_folder_with_no_label_or_of_other_kinds(tmp_path):
    nii(image(), tmp_path / "a" / "c1.nii.gz")
    with pytest.raises(ValueError, match="/a: no file is a label: name label files CASE_seg"):
        convert(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c1.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"/b: has no image that can be read \(.*\): convert these files: 1 .npz$"):
        convert(tmp_path / "b")
    nii(ORGAN, tmp_path / "b" / "labels" / "c1.nii.gz")
    with pytest.raises(ValueError, match=r"no image of case c1: .* \(files of types that cannot be read: 1 .npz\)$"):
        convert(tmp_path / "b")


def test_masks_of_a_class_each(tmp_path, raw, capsys):
    for i in range(2):
        nii(image(i), tmp_path / "d" / f"s{i}" / "ct.nii.gz")
        nii((LABEL == 1).astype(np.uint8), tmp_path / "d" / f"s{i}" / "segmentations" / "liver.nii.gz")
        nii(ORGAN * 255, tmp_path / "d" / f"s{i}" / "segmentations" / "spleen.nii.gz")
    convert(tmp_path / "d", labels=None, channels=["CT"])
    assert about(raw)["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert (voxels(raw / "labelsTr" / "s0.nii.gz")[ORGAN > 0] == 2).all()
    assert "18 voxels of spleen are in another mask, too: they become spleen" in capsys.readouterr().out
    convert(tmp_path / "d", labels=["spleen", "Liver"], channels=["CT"], overwrite=True)
    assert np.array_equal(voxels(raw / "labelsTr" / "s0.nii.gz"), np.choose(LABEL, [0, 2, 1]))
    (tmp_path / "d" / "s1" / "segmentations" / "liver.nii.gz").unlink()
    convert(tmp_path / "d", labels=["liver", "spleen"], channels=["CT"], overwrite=True)
    assert np.array_equal(voxels(raw / "labelsTr" / "s1.nii.gz"), 2 * ORGAN)
    assert "case s1: there is no mask of liver, so it is taken to be empty" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--label-values: each class has its own mask here: leave out this option"):
        convert(tmp_path / "d", labels=None, label_values=["1=liver"], overwrite=True)
    left_out = own.find_cases(tmp_path / "d", labels=["spleen"]).left_out
    assert left_out == {"s0/segmentations/liver.nii.gz": "a mask of a class that is not named with --labels"}
    with pytest.raises(ValueError, match="--labels kidney: no mask has this name: use names of these: liver, spleen"):
        convert(tmp_path / "d", labels=["kidney"], overwrite=True)


@pytest.mark.parametrize("version", [1, 2])
def test_a_raw_dataset_of_nnunet(version, source, raw, tmp_path):
    for kind in ("images", "labels"):
        (source / kind).rename(source / f"{kind}Tr")
    nii(image(9), source / "imagesTs" / "t0.nii.gz")
    nii(ORGAN, source / "labelsTs" / "t0.nii.gz")
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "heart": 1}}
    if version == 1:
        content = {"modality": {"0": "T1"}, "labels": {"0": "background", "1": "heart"}}
    (source / "dataset.json").write_text(json.dumps(content))
    convert(source, labels=None)
    assert about(raw)["labels"] == {"background": 0, "heart": 1} and about(raw)["channel_names"] == {"0": "T1"}
    assert sorted(p.name for p in raw.rglob("t0*")) == ["t0.nii.gz", "t0_0000.nii.gz"]


def test_regions_of_a_raw_dataset(source, raw):
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "whole": [1, 2], "core": [2]}}
    (source / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="d/dataset.json: has regions, but no regions_class_order: add it"):
        convert(source, labels=None)
    (source / "dataset.json").write_text(json.dumps(content | {"regions_class_order": [2, 1]}))
    convert(source, labels=None)
    assert about(raw)["labels"] == content["labels"] and about(raw)["regions_class_order"] == [2, 1]


def test_labels_that_are_not_used_are_not_opened(source, monkeypatch):
    gaps(source)
    opened = []
    read = own_labels.load
    monkeypatch.setattr(own_labels, "load", lambda path, *args: opened.append(path.name) or read(path, *args))
    with pytest.raises(ValueError, match="label values found are"):
        convert(source, num_labeled=1)
    assert set(opened) == {"c0.nii.gz"}


def test_a_single_xray_a_file(tmp_path, raw):
    for name in ("a", "b"):
        dicom(tmp_path / "x" / name, image()[:, :, :1], "chest", f"1.2.{name == 'a':d}", "1.2.840.10008.5.1.4.1.1.1")
        (tmp_path / "d" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name / "IM1.dcm").rename(tmp_path / "d" / "images" / f"{name}.dcm")
    write(Image.fromarray(ORGAN[:, :, 3].T), tmp_path / "d" / "labels" / "a.png")
    convert(tmp_path / "d", channels=["X-ray"])
    assert np.array_equal(voxels(raw / "imagesUn" / "b_0000.tif"), image()[:, :, 0])


def test_a_test_folder_beside_images_is_the_test_set(source, raw):
    nii(image(9), source / "imagesTs" / "t0.nii.gz")
    nii(ORGAN, source / "labelsTs" / "t0.nii.gz")
    convert(source)
    assert (raw / "imagesTs" / "t0_0000.nii.gz").is_file() and (raw / "labelsTs" / "t0.nii.gz").is_file()


def test_system_files_are_passed_over(source, raw, capsys):
    for name in ("._c0.nii.gz", ".DS_Store", "Thumbs.db"):
        (source / "images" / name).write_bytes(b"x")
    convert(source)
    assert "left out, a file of the operating system: 3 files" in capsys.readouterr().out


def test_archives_from_windows(source, raw, tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        for path in source.rglob("*.nii.gz"):
            file.write(path, "data\\" + str(path.relative_to(source)).replace("/", "\\"))
            file.filelist[-1].filename = file.filelist[-1].filename.replace("/", "\\")
    convert(tmp_path / "d.zip")
    assert len(list((raw / "imagesUn").iterdir())) == 2


def test_what_is_written_anew_is_said(source, raw, capsys):
    (source / "images" / "c0.nii.gz").unlink()
    sitk.WriteImage(sitk.ReadImage(str(source / "labels" / "c0.nii.gz")), str(source / "images" / "c0.mhd"))
    nii(255 * ORGAN, source / "labels" / "c1.nii.gz")
    label = sitk.ReadImage(str(source / "labels" / "c1.nii.gz"))
    (source / "labels" / "c1.nii.gz").unlink()
    sitk.WriteImage(label, str(source / "labels" / "c1.nrrd"))
    convert(source)
    printed = capsys.readouterr().out
    for line in (
        "note: 1 .mhd are written as .nii.gz, voxel by voxel",
        "note: 1 .nrrd labels are written as .nii.gz, voxel by voxel",
        "note: label value 255 is written as 1",
    ):
        assert line in printed
    assert np.array_equal(voxels(raw / "labelsTr" / "c1.nii.gz"), ORGAN)


# -------------------------------------------------------------------------------------------------------------- stacks


def dicom(
    folder: Path, array: np.ndarray, description: str, uid: str, kind="1.2.840.10008.5.1.4.1.1.4", modality="MR"
) -> None:
    """A slice a file, written from the top down: the names are in the other order than the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    for z in range(array.shape[2]):
        plane = sitk.GetImageFromArray(array[:, :, z : z + 1].T.astype(np.int16))
        plane.SetSpacing((1, 1, 2))
        tags = {"0008|0060": modality, "0020|000d": "1.2.3", "0020|000e": uid, "0008|0018": f"{uid}.{z}",
                "0018|0050": "2", "0008|0016": kind, "0008|103e": description,
                "0020|0013": str(z),
                "0020|0032": f"0\\0\\{2 * z}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0052": "1.2.3.9",
                "0010|0020": "P1", "0010|0010": "P1"}  # fmt: skip
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"IM{array.shape[2] - z}.dcm"))
        writer.Execute(plane)


def test_masks_in_pictures_follow_the_names_of_dicom_files(tmp_path, raw, capsys):
    for i in (1, 2):
        dicom(tmp_path / "d" / f"{i}" / "DICOM_anon", image(i), "t1", f"1.2.{i}")
    for z in range(SHAPE[2]):  # the first picture is of the uppermost slice
        mask = ORGAN[:, :, SHAPE[2] - 1 - z].T * 255
        write(Image.fromarray(mask), tmp_path / "d" / "1" / "Ground" / f"liver_{z + 5}.png")
    convert(tmp_path / "d", labels=["liver"])
    assert np.array_equal(voxels(raw / "imagesTr" / "1_0000.nii.gz"), image(1))
    assert np.array_equal(voxels(raw / "labelsTr" / "1.nii.gz"), ORGAN)
    assert "7 pictures are the slices of the label, in the order of their names and of" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"/d: what do the label values mean\? Name 1, 2, ... with --labels NAME1"):
        convert(tmp_path / "d", labels=None)


def test_pictures_become_volumes_with_a_spacing(tmp_path, raw):
    for z in range(SHAPE[2]):
        write(Image.fromarray(image()[:, :, z].T.astype(np.uint8)), tmp_path / "d" / "images" / "P1" / f"{z}.png")
        write(Image.fromarray(ORGAN[:, :, z].T), tmp_path / "d" / "labels" / "P1" / f"{z}.png")
        write(Image.fromarray(ORGAN[:, :, z].T), tmp_path / "d" / "images" / "P2" / f"{z}.png")
    convert(tmp_path / "d", spacing=(0.5, 0.5, 3))
    assert np.array_equal(voxels(raw / "imagesTr" / "P1_0000.nii.gz"), image())
    assert np.array_equal(voxels(raw / "labelsTr" / "P1.nii.gz"), ORGAN)
    assert sitk.ReadImage(str(raw / "labelsTr" / "P1.nii.gz")).GetSpacing() == (0.5, 0.5, 3)
    folder = tmp_path / "d" / "images" / "P1"
    write(Image.new("L", (3, 4)), folder / "1.png")
    with pytest.raises(
        ValueError, match=r"P1/1.png: its shape is \(4, 3\), but that of 0.png is \(\d+, \d+\): give all"
    ):
        read_stack(folder, (1, 1, 1))
    write(Image.new("RGB", (3, 4)), folder / "0.png")
    with pytest.raises(ValueError, match="P1/0.png: has colours or several pages: each slice must be one grey picture"):
        read_stack(folder, (1, 1, 1))


def pacs(folder: Path) -> Path:
    """Two patients, two series each, of one study in a folder of files in no order."""
    for i in (1, 2):
        dicom(folder / f"P{i}" / "study" / "a", image(i), "T1 post", f"1.2.{i}.1")
        dicom(folder / f"P{i}" / "study" / "b", image(i + 5), "t2_tse", f"1.2.{i}.2")
    return folder


def test_series_of_a_pacs_export_are_channels_by_their_description(tmp_path, raw):
    folder = pacs(tmp_path / "d")
    affine = np.diag([-1.0, -1, 2, 1])
    nii(ORGAN, folder / "P1" / "seg.nii.gz", affine)
    with pytest.raises(
        ValueError, match=r"P1/study: 2 DICOM series: .* --channels: T1 post \(7 slices\), t2_tse \(7 slices\)"
    ):
        convert(folder)
    convert(folder, channels=["T2", "T1"])
    assert np.array_equal(voxels(raw / "imagesTr" / "P1_0000.nii.gz"), image(6))
    assert np.array_equal(voxels(raw / "imagesUn" / "P2_0001.nii.gz"), image(2))


def test_a_case_that_lacks_the_series_of_a_channel_is_refused_and_others_are_left_out(tmp_path, raw, capsys):
    folder = pacs(tmp_path / "d")
    dicom(folder / "P1" / "study" / "c", image()[:, :, :2], "localizer", "1.2.1.3")
    shutil.rmtree(folder / "P2" / "study" / "b")
    nii(ORGAN, folder / "P1" / "seg.nii.gz", np.diag([-1.0, -1, 2, 1]))
    with pytest.raises(ValueError, match="^case P2: .*no DICOM series of 1 fits channel T2: .*T1 post"):
        convert(folder, channels=["T1", "T2"])
    assert "case P1: left out, of no channel: DICOM series localizer (2 slices)" in capsys.readouterr().out


def test_ct_and_mr_at_once(tmp_path):
    for n, kind in enumerate(("CT", "MR")):
        for i in (1, 2):
            case = tmp_path / "d" / kind / f"{i}"
            dicom(case / "DICOM", image(i), "x", f"1.{n}.{i}", modality=kind)
            for z in range(SHAPE[2]):
                write(Image.fromarray(ORGAN[:, :, -1 - z].T), case / "Ground" / f"{z}.png")
    message = r"of different kinds, CT \(2 cases\) and MR \(2 cases\): choose one kind: .*-i.*--channels$"
    with pytest.raises(ValueError, match=message):
        own.find_cases(tmp_path / "d", labels=["organ"])
    found = own.find_cases(tmp_path / "d", labels=["organ"], channels=["CT"])
    assert [str(case.images[0].paths[0].relative_to(tmp_path)) for case in found.cases.values()] == [
        "d/CT/1/DICOM", "d/CT/2/DICOM",
    ]  # fmt: skip
    assert set(found.left_out.values()) == {"in no folder with the name CT"} and "MR/1/Ground/0.png" in found.left_out


def test_one_dicom_folder_is_one_case(tmp_path):
    dicom(tmp_path / "Smith", image(), "t1", "1.2.1")
    nii(ORGAN, tmp_path / "Smith" / "seg.nii.gz", np.diag([-1.0, -1, 2, 1]))
    found = own.find_cases(tmp_path / "Smith", labels=["organ"])
    assert found.left_out == {} and found.cases["Smith"].images[0].paths == (tmp_path / "Smith",)


def save_structure_set(folder: Path, file: Path) -> None:
    """A square of pixels 1 to 3 (x) and 1 to 4 (y) in slice 2, with a hole at (2, 2): on pixel corners."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    def outline(x0, x1, y0, y1):
        contour = Dataset()
        contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
        corners = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
        contour.ContourData = [v for x, y in corners for v in (x, y, 4.0)]
        return contour

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.77"
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    names, contours = [], []
    for number, (name, outlines) in enumerate({"Heart": [outline(0.6, 3.4, 0.6, 4.4), outline(1.6, 2.4, 1.6, 2.4)],
                                               "Couch": [outline(4, 5, 4, 5)]}.items(), 1):  # fmt: skip
        roi, lines = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        lines.ReferencedROINumber, lines.ContourSequence = number, outlines
        names.append(roi)
        contours.append(lines)
    data.StructureSetROISequence, data.ROIContourSequence = names, contours
    pydicom.dcmwrite(file, data, enforce_file_format=True)


def test_structure_sets(tmp_path, raw, capsys):
    for i in (1, 2):
        dicom(tmp_path / "d" / f"P{i}" / "mr", image(i), "t1", f"1.2.{i}.1")
    save_structure_set(tmp_path / "d" / "P1" / "mr", tmp_path / "d" / "P1" / "rt.dcm")
    with pytest.raises(ValueError, match="rt.dcm: its classes have names: .* --labels Heart Couch"):
        convert(tmp_path / "d", labels=None)
    found = own.find_cases(tmp_path / "d", labels=["heart"])
    assert pickle.loads(pickle.dumps(found.cases)).keys() == {"P1", "P2"}  # workers get them
    convert(tmp_path / "d", labels=["heart"])
    expected = np.zeros(SHAPE, np.uint8)
    expected[1:4, 1:5, 2] = 1
    expected[2, 2, 2] = 0
    assert np.array_equal(voxels(raw / "labelsTr" / "P1.nii.gz"), expected)
    assert "Couch of rt.dcm is left out, because --labels does not name it" in capsys.readouterr().out
    whole = (tmp_path / "d" / "P1" / "rt.dcm").read_bytes()
    (tmp_path / "d" / "P1" / "rt.dcm").write_bytes(whole[: whole.index(b"\x06\x30\x20\x00")])  # before its classes
    for labels in (None, ["heart"]):
        with pytest.raises(ValueError, match="rt.dcm: has no class, perhaps .* cut off: save or download it again"):
            convert(tmp_path / "d", labels=labels, overwrite=True)
    (tmp_path / "d" / "P1" / "rt.dcm").write_bytes(b"1.2.840.10008.5.1.4.1.1.481.3")
    with pytest.raises(ValueError, match="rt.dcm: cannot be read .*: save it again"):
        convert(tmp_path / "d", labels=None)


def test_dicom_segmentations(tmp_path, raw, capsys, monkeypatch):
    highdicom = pytest.importorskip("highdicom")
    import pydicom
    from pydicom.sr.codedict import codes

    for i in (1, 2):
        dicom(tmp_path / "d" / f"P{i}" / "mr", image(i), "t1", f"1.2.{i}.1")
    files = sorted((tmp_path / "d" / "P1" / "mr").iterdir(), key=lambda f: -int(f.stem[2:]))  # by position
    slices = [pydicom.dcmread(file) for file in files]
    segments = [
        highdicom.seg.SegmentDescription(
            n, name, codes.SCT.Organ, codes.SCT.Liver, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for n, name in enumerate(("Liver", "Spleen"), 1)
    ]
    masks = np.stack([(LABEL == n).transpose(2, 1, 0) for n in (1, 2)], -1).astype(np.uint8)

    def save(file: Path, masks: np.ndarray, segments: list) -> None:
        about = ("1.2.88", 5, "1.2.88.1", 1, "maker", "model", "1", "serial")
        highdicom.seg.Segmentation(slices, masks, "BINARY", segments, *about).save_as(file)

    (tmp_path / "d" / "labels").mkdir()
    save(tmp_path / "d" / "labels" / "P1.dcm", masks, segments)
    convert(tmp_path / "d", labels=["spleen", "liver"])
    assert np.array_equal(voxels(raw / "labelsTr" / "P1.nii.gz"), np.choose(LABEL, [0, 2, 1]))
    assert "another grid" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "d" / "labels")
    masks[..., 1] = ORGAN.transpose(2, 1, 0)  # the 18 voxels of the liver are in both
    save(tmp_path / "d" / "P1" / "a.dcm", masks[..., :1], segments[:1])
    segments[1].SegmentNumber = 1
    save(tmp_path / "d" / "P1" / "b.dcm", masks[..., 1:], segments[1:])
    convert(tmp_path / "d", labels=["spleen", "liver"], overwrite=True)
    assert np.array_equal(voxels(raw / "labelsTr" / "P1.nii.gz"), np.choose(LABEL, [0, 2, 1]))
    assert "case P1: 18 voxels are in several classes: they get the one that is named last" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "highdicom", None)  # pydicom alone is not enough
    with pytest.raises(ValueError, match="case P1: .*a.dcm: is a DICOM segmentation .*: to read it, pip install"):
        convert(tmp_path / "d", labels=["spleen", "liver"], overwrite=True)


# ------------------------------------------------------------------------------------------------- dry run and patients


def test_dry_run_shows_what_goes_where_and_makes_nothing(source, raw, capsys):
    nii(image(9), source / "imagesTs" / "t0.nii.gz")
    (source / "images" / "notes.txt").write_text("x")
    (source / "images" / "c9.npy").write_text("x")
    convert(source, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"{raw}: 2 labelled, 2 unlabelled, 1 test",
        "  channels: image",
        "  labels: 0 background, 1 organ",
        "  labelled: images/c0.nii.gz -> imagesTr/c0_0000.nii.gz; labels/c0.nii.gz -> labelsTr/c0.nii.gz",
        "  unlabelled: images/c2.nii.gz -> imagesUn/c2_0000.nii.gz",
        "  test: imagesTs/t0.nii.gz -> imagesTs/t0_0000.nii.gz",
        "left out, of no known kind: 1 files: images/c9.npy",
        "left out, not an image: 1 files: images/notes.txt",
    ):
        assert line in lines
    assert list(raw.parent.iterdir()) == []


def scans(folder: Path, names: list[str], labels: list[str]) -> Path:
    for name in names:
        nii(image(), folder / "images" / f"{name}.nii.gz")
    for name in labels:
        nii(ORGAN, folder / "labels" / f"{name}.nii.gz")
    return folder


def test_scans_of_a_patient_stay_together(tmp_path, raw):
    names = [f"P{p}-00{s}" for p in range(6) for s in range(2)]
    folder = scans(tmp_path / "d", names, names)
    convert(folder, group_by="patient", test=0.34)
    test = {file.name.partition("-")[0] for file in (raw / "labelsTs").iterdir()}
    train = {file.name.partition("-")[0] for file in (raw / "labelsTr").iterdir()}
    assert len(test) == 2 and len(train) == 4 and not test & train
    folds = json.loads((raw / "splits_final.json").read_text())
    assert len(folds) == 4
    for fold in folds:
        assert not {n[:2] for n in fold["train"]} & {n[:2] for n in fold["val"]} and len(fold["val"]) == 2


def test_a_patient_in_training_and_test_is_refused(tmp_path):
    folder = scans(tmp_path / "d", ["P1_1", "P2_1", "P2_2"], ["P1_1"])
    nii(image(), folder / "imagesTs" / "P1_2.nii.gz")
    with pytest.raises(
        ValueError,
        match=r"1 patients have scans both in the test set and in training, for"
        r" example P1 \(P1_2 and P1_1\)",
    ):
        convert(folder, group_by="patient")
    (folder / "imagesTs" / "P1_2.nii.gz").unlink()
    nii(ORGAN, folder / "labels" / "P2_1.nii.gz")
    split = folder / "split.json"
    split.write_text(json.dumps({"train": ["P1_1", "P2_2"], "val": ["P2_1"]}))  # P2_2 has no label
    convert(folder, group_by="patient", split=split, dry_run=True)
    nii(ORGAN, folder / "labels" / "P2_2.nii.gz")
    with pytest.raises(ValueError, match=r"1 patients .* both in the validation cases and .* P2 \(P2_1 and P2_2\)"):
        convert(folder, group_by="patient", split=split, dry_run=True)
    with pytest.raises(ValueError, match=r"--group-by \(: is not a regular expression"):
        convert(folder, group_by="(")
    with pytest.raises(ValueError, match="names like case_1 do not show patients"):
        convert(scans(tmp_path / "e", ["case_1", "case_2"], ["case_1"]), group_by="patient")


@pytest.mark.parametrize("gpus, planner", [(0, " -pl SemiSegPlannerSmall"), (1, "")])
def test_the_next_command_and_a_forgotten_word(gpus, planner, source, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("nnUNet_preprocessed", str(source.parent / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(source.parent / "results"))
    words = ["convert", "-i", str(source), "-d", "801", "--labels", "organ", "-np", "0", "--no_pbar"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "taken for `convert folder`" in lines[0]
    assert lines[-1] == f"next: nnunet_semiseg plan_and_preprocess -d 801 -c 3d_fullres{planner}"
    assert cli.main(["status", "-d", "801"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]


def test_a_conversion_says_how_cases_for_validation_and_test_were_chosen(source, tmp_path, capsys):
    split = tmp_path / "split.json"

    def protocol(*words: str) -> str:
        command = ["convert", "folder", "-i", str(source), "-d", "801", "--labels", "organ", "--dry-run", *words]
        assert cli.main(command) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  protocol: "))
        return line.removeprefix("  protocol: cases with a label are labelled; ")

    assert protocol() == "--split, --test or folders name those for validation and test"
    assert protocol("--test", "0.5") == "--test draws 0.5 of them for testing"
    split.write_text(json.dumps({"train": ["c0", "c1"]}))
    assert protocol("--split", str(split)) == "--split names those for validation and test"


@pytest.mark.parametrize(
    "words, following",
    [
        (
            "plan_and_preprocess -d 801 -c 2d",
            "nnunet_semiseg train 801 2d 0 -tr SemiSegTrainer -p nnUNetPlans -device cpu",
        ),
        (
            "plan_and_preprocess -d 801 --labeled_only -pl SemiSegPlanner",
            "nnunet_semiseg train 801 3d_fullres 0 -tr SupervisedTrainer -p nnUNetSemiSegPlans -device cpu",
        ),
        ("plan_and_preprocess -d 801 --no_pp", None),
        (
            "train 801 2d 1 -tr BCPTrainer -device cpu",
            "nnunet_semiseg compare -d 801 -c 2d -f 1 -p nnUNetPlans --trainers SupervisedTrainer BCPTrainer --run"
            " -device cpu",
        ),
        (
            "compare -d 801 -c 2d --trainers SupervisedTrainer BCPTrainer -device cpu",
            "nnUNetv2_predict -d 801 -c 2d -f 0 -p nnUNetPlans -tr BCPTrainer -i IMAGES -o PREDICTIONS -device cpu",
        ),
        (
            "compare -d 801 -c 2d --trainers SupervisedTrainer BCPTrainer --labeled 2 3 --seeds 2 -device cpu",
            "nnUNetv2_predict -d 801 -c 2d -f 0 -p nnUNetPlans_2labeled_seed0 -tr BCPTrainer -i IMAGES -o PREDICTIONS"
            " -device cpu",
        ),
    ],
)
def test_every_command_ends_with_the_next(words, following, tiny_dataset, monkeypatch, capsys):
    dataset = tiny_dataset(size=6, dataset_id=801)
    dataset.results.mkdir(parents=True)
    write_plans(dataset, "nnUNetPlans")
    write_plans(dataset)
    monkeypatch.setattr("nnunet_semiseg.planning.plan_and_preprocess", lambda *args, **kwargs: None)
    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", lambda: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("nnunet_semiseg.evaluation.compare.compare", lambda *args: "report.html")
    monkeypatch.setattr("sys.argv", ["nnunet_semiseg"])
    assert cli.main(words.split()) == 0
    last = capsys.readouterr().out.splitlines()[-1:]
    assert last == ([f"next: {following}"] if following else [])


@pytest.mark.parametrize("words, following", [("", "train 801 2d 0 -tr SemiSegTrainer"), (" -c 3d_lowres", None)])
def test_the_next_command_names_a_configuration_of_the_plans(words, following, tiny_dataset, monkeypatch, capsys):
    write_plans(tiny_dataset(dims=2, size=6, dataset_id=801), "nnUNetPlans", configurations={"2d": {}})
    monkeypatch.setattr("nnunet_semiseg.planning.plan_and_preprocess", lambda *args, **kwargs: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main(f"plan_and_preprocess -d 801{words}".split()) == 0
    said = capsys.readouterr().out
    assert said == (f"next: nnunet_semiseg {following} -p nnUNetPlans -device cpu\n" if following else "")
