"""What all converters share: who is labelled, what is refused, and going on after an interruption."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_image
from PIL import Image
from watching import no_room_for_files_of

from nnunet_semiseg import cli, raw_datasets
from nnunet_semiseg.archives import unpacked
from nnunet_semiseg.dataset_conversion import folder as own
from nnunet_semiseg.files import BusyError, DiskError, only_one
from nnunet_semiseg.raw_datasets import Case, Crop, Source, assign, seeded_split

convert = own.convert
OPTIONS = {"labels": ["organ"], "num_processes": 0, "show_progress_bar": False}


@pytest.fixture(autouse=True)
def raw(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "raw" / "Dataset801_MyData"


def cuboid(i: int) -> tuple[np.ndarray, np.ndarray]:
    label = np.zeros((8, 8, 8), np.uint8)
    label[2:5, 2:6, 2:7] = 1
    return (50 * label + np.random.default_rng(i).integers(0, 20, label.shape)).astype(np.int16), label


@pytest.fixture
def download(tmp_path) -> Path:
    """Five cases, c0 to c4; c0, c1 and c2 have a label."""
    folder = tmp_path / "download"
    for i in range(5):
        image, label = cuboid(i)
        save(image, folder / "images" / f"c{i}.nii.gz")
        if i < 3:
            save(label, folder / "labels" / f"c{i}.nii.gz")
    return folder


def save(array: np.ndarray, file: Path, **kwargs) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_image(array, file, **kwargs)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------ who is labelled


def source(train: int, with_label: int, **about) -> Source:
    names = [f"c{i}" for i in range(train)]
    cases = {n: Case(n, (), Path("label") if i < with_label else None) for i, n in enumerate(names)}
    cases["v"], cases["t"], cases["x"] = (Case(n, (), Path("label")) for n in "vtx")
    return Source(replace(own.ABOUT, **about), cases, names, ["v"], ["t", "gone"])


@pytest.mark.parametrize(
    "num_labeled, published, expected",
    [(2, None, 2), (0.1, None, 1), (0.3, None, 3), ("all", 4, 10), (None, 4, 4), (None, None, 10), (None, 0.25, 2),
     (10, 4, 10), (1.0, 4, 10), (None, 40, 10)],
)  # fmt: skip
def test_the_first_of_the_list_are_labelled(num_labeled, published, expected):
    parts = assign(source(10, 10, num_labeled=published), num_labeled, "published")
    assert [parts[f"c{i}"] for i in range(10)] == ["labeled"] * expected + ["unlabeled"] * (10 - expected)
    assert (parts["v"], parts["t"]) == ("validation", "test") and not {"x", "gone"} & set(parts)


def test_a_case_without_a_label_is_never_labelled():
    parts = assign(source(6, 4), "all", "published")
    assert [parts[f"c{i}"] for i in range(6)] == ["labeled"] * 4 + ["unlabeled"] * 2


def test_protocol_all_trains_on_every_case():
    parts = assign(source(3, 3), 2, "all")
    assert parts == {
        "c0": "labeled",
        "c1": "labeled",
        "c2": "unlabeled",
        "v": "unlabeled",
        "t": "unlabeled",
        "x": "unlabeled",
    }


@pytest.mark.parametrize("num_labeled", [11, 0, 1.2])
def test_more_labelled_cases_than_there_are(num_labeled):
    with pytest.raises(ValueError, match="10 of the 10 training cases have a label: give a number from 1 to 10"):
        assign(source(10, 10), num_labeled, "published")


def test_seeded_split_is_the_same_everywhere_and_leaves_out_nothing():
    train, test = seeded_split(["b", "a", "d", "c", "e"], test=0.4)
    assert (train, test) == seeded_split(["e", "d", "c", "b", "a"], test=0.4)
    assert len(test) == 2 and sorted(train + test) == list("abcde")


def test_crop_is_the_box_grown_with_the_margin_outside():
    label = np.zeros((20, 20, 20), np.uint8)
    label[0, 8:10, 5:15] = 1  # z, y, x
    # x: 5 to 15 is large enough, margin 1; y: 8 to 10, grown to 6 to 13, then the margin; z: -1 to 2, then -2 to 3, cut
    slices = Crop((5, 7, 3), (1, 1, 1), "me")(sitk.GetImageFromArray(label))
    assert slices == (slice(4, 16), slice(5, 14), slice(0, 3))
    slices = Crop((5, 7, None), (1, 1, None), "me")(sitk.GetImageFromArray(label))
    assert slices == (slice(4, 16), slice(5, 14), slice(0, 20))
    with pytest.raises(ValueError, match="label is empty"):
        Crop((5, 7, 3), (1, 1, 1), "me")(sitk.GetImageFromArray(0 * label))


def test_a_crop_needs_a_label(tmp_path):
    """No converter has such a case yet: with one, an unlabelled case without a label file cannot be cropped."""
    save(cuboid(0)[0], tmp_path / "a.nii.gz")
    about, crop = replace(own.ABOUT, channels=("CT",)), Crop((5, 7, 3), (1, 1, 1), "me")
    case = Case("a", (tmp_path / "a.nii.gz",), None)
    found = raw_datasets.case.convert_case(case, "Un", about, crop, tmp_path, tmp_path / "new")
    assert found == ("a", "has no label, so there is nothing to crop around: add it, or use --crop none")


def test_a_missing_case_is_not_replaced_by_the_next_of_the_list():
    ten = source(10, 10, num_labeled=4)
    fewer = replace(ten, cases={name: case for name, case in ten.cases.items() if name != "c1"})
    for num_labeled in (None, 4, 0.4):
        parts = assign(fewer, num_labeled, "published")
        assert [name for name, part in parts.items() if part == "labeled"] == ["c0", "c2", "c3"]
    assert [n for n, part in assign(fewer, 4, "all").items() if part == "labeled"] == ["c0", "c2", "c3", "c4"]
    with pytest.raises(ValueError, match="none of the first 1 cases of the training list was found: give"):
        assign(replace(ten, train=["absent", *ten.train]), 1, "published")


def test_no_case_is_in_two_lists():
    with pytest.raises(ValueError, match="case c1 is in the train and in the test list"):
        assign(replace(source(3, 3), test=["c1"]), None, "published")


@pytest.mark.parametrize("num_labeled", [None, 2, 0.5, "all"])
def test_nothing_is_labelled(num_labeled):
    with pytest.raises(ValueError, match="no training case has a label: put the labels there, too"):
        assign(source(3, 0), num_labeled, "published")


def test_there_is_no_training_case():
    with pytest.raises(ValueError, match="no training case was found: .*or train on all cases with --protocol all"):
        assign(source(0, 0), None, "published")


def test_seeded_split_does_not_depend_on_what_is_missing():
    names = [f"c{i}" for i in range(100)]
    train, test = seeded_split(names, test=0.2)
    fewer_train, fewer_test = seeded_split([n for n in names if n != test[3]], test=0.2)
    assert set(test) - {test[3]} <= set(fewer_test) and len(set(train) - set(fewer_train)) <= 1


def test_files_are_found_through_links_and_what_macs_leave_is_not(tmp_path):
    for name in ("a/x.tif", "__MACOSX/a/._x.tif", "a/._y.tif", "a/.z.tif", "a/~$t.tif", "elsewhere/b/v.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    assert raw_datasets.find_files(tmp_path / "a", "*.tif") == [tmp_path / "a/link/b/v.tif", tmp_path / "a/x.tif"]
    assert raw_datasets.find_files(tmp_path, "a/*.tif") == [tmp_path / "a" / "x.tif"]


# ------------------------------------------------------------------------------------------ what is written


def test_the_dataset(download, raw):
    assert convert(download, 801, **OPTIONS, num_labeled=2) == raw
    expected = {f"imagesTr/c{i}_0000.nii.gz" for i in (0, 1)} | {f"labelsTr/c{i}.nii.gz" for i in (0, 1)}
    expected |= {f"imagesUn/c{i}_0000.nii.gz" for i in (2, 3, 4)} | {"dataset.json"}
    assert files(raw) == expected  # the label of c2 is nowhere
    for i in range(5):
        part = "Tr" if i < 2 else "Un"
        assert (raw / f"images{part}" / f"c{i}_0000.nii.gz").samefile(download / "images" / f"c{i}.nii.gz")
    about = json.loads((raw / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "organ": 1} and about["numTraining"] == 2
    assert about["file_ending"] == ".nii.gz" and about["channel_names"] == {"0": "image"}
    sources = about["semiseg"]["sources"]
    assert set(sources) == {f"images/c{i}.nii.gz" for i in range(5)} | {f"labels/c{i}.nii.gz" for i in (0, 1)}
    for name, digest in sources.items():
        assert digest == hashlib.sha256((download / name).read_bytes()).hexdigest()
    assert about["semiseg"]["labeled_order"] == ["c0", "c1"]


def test_unlabelled_labels_are_not_even_opened(download, raw):
    (download / "labels" / "c2.nii.gz").write_bytes(b"not an image")
    convert(download, 801, **OPTIONS, num_labeled=2)
    assert (raw / "imagesUn" / "c2_0000.nii.gz").exists()


def test_files_are_copied_where_they_cannot_be_linked(download, raw, monkeypatch):
    def no_link(*args):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_link)
    convert(download, 801, **OPTIONS)
    copy, original = raw / "imagesTr" / "c0_0000.nii.gz", download / "images" / "c0.nii.gz"
    assert copy.read_bytes() == original.read_bytes() and not copy.samefile(original)


def test_channels_by_number_and_by_name(tmp_path, raw):
    for style, suffixes in (("number", ("_0000", "_0001")), ("name", ("_CT", "_PET"))):
        folder = tmp_path / style
        for case in range(2):
            image, label = cuboid(case)
            for c, suffix in enumerate(suffixes):
                save(image + c, folder / "images" / f"c{case}{suffix}.nii.gz")
            save(label, folder / "labels" / f"c{case}.nii.gz")
        convert(folder, 801, **OPTIONS, channels=["CT", "PET"], overwrite=True)
        second = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "imagesTr" / "c1_0001.nii.gz")))
        assert np.array_equal(second, cuboid(1)[0] + 1), style


def test_endings_that_nnunet_does_not_read_are_written_without_loss(tmp_path, raw):
    image, label = cuboid(0)
    save(image, tmp_path / "d" / "images" / "a.mhd")
    save(image, tmp_path / "d" / "images" / "b.nrrd")
    save(label, tmp_path / "d" / "labels" / "a.mha")
    convert(tmp_path / "d", 801, **OPTIONS)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "imagesTr" / "a_0000.nii.gz"))), image)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "imagesUn" / "b_0000.nii.gz"))), image)


def test_split_file_of_the_user(download, raw, tmp_path):
    (tmp_path / "split.json").write_text('{"train": ["c1", "c3", "c4"], "val": ["c0"], "test": ["c2"]}')
    convert(download, 801, **OPTIONS, split=tmp_path / "split.json")
    assert {f for f in files(raw) if f.startswith("labels")} == {
        "labelsTr/c0.nii.gz", "labelsTr/c1.nii.gz", "labelsTs/c2.nii.gz"
    }  # fmt: skip
    assert json.loads((raw / "splits_final.json").read_text()) == [{"train": ["c1"], "val": ["c0"]}]


def test_dry_run_says_what_and_writes_nothing(download, raw, capsys):
    convert(download, 801, **OPTIONS, num_labeled=2, dry_run=True)
    assert "2 labelled, 3 unlabelled" in capsys.readouterr().out
    assert not raw.exists() and list(raw.parent.iterdir()) == []


def test_an_empty_label_is_reported(download, raw, capsys):
    save(np.zeros((8, 8, 8), np.uint8), download / "labels" / "c1.nii.gz")
    convert(download, 801, **OPTIONS)
    assert "case c1: the label is empty" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ what is refused

BAD_CASES = {
    "a missing channel": (lambda d: (d / IMAGE).unlink(), "c1_0000.nii.gz: its case has no channel b"),
    "a label of another shape": (lambda d: save(cuboid(0)[1][:6], d / LABEL), r"c1.nii.gz: size \(8, 8, 6\) differs"),
    "a label on another grid": (lambda d: save(cuboid(0)[1], d / LABEL, spacing=(1, 1, 3)), "c1.nii.gz: spacing"),
    "channels on different grids": (
        lambda d: save(cuboid(0)[0], d / IMAGE, origin=(5, 0, 0)),
        "c1_0001.nii.gz: origin",
    ),
    "an unknown label value": (
        lambda d: save(7 * cuboid(0)[1], d / LABEL),
        r"c1.nii.gz: has the label value 7 \(60 voxels\), but the known values are 0, 1",
    ),
    "a truncated file": (lambda d: truncate(d / IMAGE), "c1_0001.nii.gz: cannot be read"),
    "NaN": (
        lambda d: save(np.full((8, 8, 8), np.nan, np.float32), d / IMAGE),
        "c1_0001.nii.gz: 512 voxels are NaN",
    ),
    "colours": (
        lambda d: sitk.WriteImage(sitk.Image([8, 8, 8], sitk.sitkVectorUInt8, 3), str(d / IMAGE)),
        r"c1_0001.nii.gz: has 3 channels, so its case has 4 instead of 2 \(a, b\)",
    ),
}
IMAGE, LABEL = "images/c1_0001.nii.gz", "labels/c1.nii.gz"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def two_channels(tmp_path) -> Path:
    for i in range(4):
        image, label = cuboid(i)
        for c in range(2):
            save(image, tmp_path / "two" / "images" / f"c{i}_000{c}.nii.gz")
        save(label, tmp_path / "two" / "labels" / f"c{i}.nii.gz")
    return tmp_path / "two"


@pytest.mark.parametrize("kind", BAD_CASES)
def test_a_bad_case_is_named_and_the_rest_goes_on(kind, two_channels, raw, capsys):
    spoil, words = BAD_CASES[kind]
    spoil(two_channels)
    arguments = ["convert", "folder", "-i", str(two_channels), "-d", "801", "--labels", "organ", "--channels", "a", "b"]
    arguments += ["-np", "0", "--no_pbar", "--labeled", "3"]
    assert cli.main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: case c1: ") and "run the command again" in lines[1]
    assert re.search(words, lines[0]), lines[0]
    assert {f for f in files(raw) if f.startswith("labelsTr")} == {"labelsTr/c0.nii.gz", "labelsTr/c2.nii.gz"}
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 2
    assert not [f for f in files(raw) if "c1" in f]

    image, label = cuboid(1)  # fixed, the same command goes on
    for c in range(2):
        save(image, two_channels / "images" / f"c1_000{c}.nii.gz")
    save(label, two_channels / "labels" / "c1.nii.gz")
    assert cli.main(arguments) == 0
    assert "continuing: 3 cases are complete already" in capsys.readouterr().out
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 3
    assert (raw / "labelsTr" / "c1.nii.gz").exists() and not (raw / ".conversion").exists()


def test_no_labelled_case_is_whole(download, raw):
    for i in range(3):
        truncate(download / "labels" / f"c{i}.nii.gz")
    with pytest.raises(ValueError, match="no labelled case is complete"):
        convert(download, 801, **OPTIONS)
    assert not (raw / "dataset.json").exists()


def test_no_case_found_shows_the_layout(tmp_path, raw):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no case was found; give a folder with these files:\n    images/CASE.nii.gz"):
        convert(tmp_path / "empty", 801, **OPTIONS)


def test_a_case_that_is_there_twice(download):
    save(cuboid(0)[0], download / "images" / "c0.nrrd")
    with pytest.raises(ValueError, match=r"c0.nrrd: case c0 appears twice, also as .*c0.nii.gz"):
        convert(download, 801, **OPTIONS)


def test_a_label_without_an_image(download):
    save(cuboid(0)[1], download / "labels" / "c9.nii.gz")
    with pytest.raises(ValueError, match="download/labels/c9.nii.gz: no image of case c9: rename this label"):
        convert(download, 801, **OPTIONS)


def test_target_that_exists(download, raw):
    convert(download, 801, **OPTIONS)
    (raw / "mine.txt").write_text("mine")
    before = files(raw)
    with pytest.raises(ValueError, match="exists already: replace it with --overwrite"):
        convert(download, 801, **OPTIONS)
    assert files(raw) == before
    convert(download, 801, **OPTIONS, overwrite=True)
    assert files(raw) == before - {"mine.txt"}


def test_number_that_another_dataset_has(download, raw):
    (raw.parent / "Dataset801_Other").mkdir()
    with pytest.raises(ValueError, match="Dataset801_Other: this dataset has the same number"):
        convert(download, 801, **OPTIONS, overwrite=True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"crop": "published"}, "no published crop"),
        ({"labels": None}, "--labels"),
        ({"num_labeled": 4}, "3 of the 5 training cases have a label"),
    ],
)
def test_options_that_do_not_fit(change, words, download, raw):
    with pytest.raises(ValueError, match=words):
        convert(download, 801, **{**OPTIONS, **change})
    assert not raw.exists()


def test_unset_folder_and_missing_download(download, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        convert(tmp_path / "nowhere", 801, **OPTIONS)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(ValueError, match="nnUNet_raw is not set"):
        convert(download, 801, **OPTIONS)


def test_other_options_than_those_it_was_begun_with(download, raw):
    truncate(download / "images" / "c4.nii.gz")
    with pytest.raises(ValueError, match="case c4"):
        convert(download, 801, **OPTIONS)
    with pytest.raises(ValueError, match="was begun with other options"):
        convert(download, 801, **OPTIONS, num_labeled=1)


def test_a_source_is_never_removed(download, raw):
    own_data = raw / "own"
    for where in (raw, own_data, raw.parent):
        shutil.copytree(download, where, dirs_exist_ok=True)
        before = files(where)
        with pytest.raises(ValueError, match="must not lie inside each other"):
            convert(where, 801, **OPTIONS, overwrite=True)
        assert files(where) == before


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "a b"])
def test_names_that_are_no_names(name, download):
    with pytest.raises(ValueError, match="--name .*letters, digits"):
        convert(download, 801, **OPTIONS, name=name)


def test_a_bad_case_may_be_taken_out_and_another_put_in(download, raw):
    truncate(download / "images" / "c1.nii.gz")
    with pytest.raises(ValueError, match="case c1"):
        convert(download, 801, **OPTIONS, num_labeled=2)
    (download / "images" / "c1.nii.gz").unlink()
    (download / "labels" / "c1.nii.gz").unlink()
    (download / "images" / "c4.nii.gz").unlink()
    convert(download, 801, **OPTIONS, num_labeled=2)  # c2 was unlabelled before
    expected = {f"imagesTr/c{i}_0000.nii.gz" for i in (0, 2)} | {f"labelsTr/c{i}.nii.gz" for i in (0, 2)}
    assert files(raw) == expected | {"imagesUn/c3_0000.nii.gz", "dataset.json"}


def test_without_a_labelled_case_no_old_dataset_json_is_left(download, raw):
    truncate(download / "images" / "c4.nii.gz")
    with pytest.raises(ValueError, match="case c4"):
        convert(download, 801, **OPTIONS)
    assert (raw / "dataset.json").exists()
    for i in range(3):
        truncate(download / "labels" / f"c{i}.nii.gz")
    with pytest.raises(ValueError, match="no labelled case is complete"):
        convert(download, 801, **OPTIONS)
    assert not (raw / "dataset.json").exists()


def test_a_source_is_not_removed_through_links(download, raw, tmp_path):
    inside = raw / "src"
    shutil.copytree(download, inside)
    (tmp_path / "link").symlink_to(inside)
    (tmp_path / "parts").mkdir()
    for kind in ("images", "labels"):
        (tmp_path / "parts" / kind).symlink_to(inside / kind)
    before = files(raw)
    for source in (tmp_path / "link", tmp_path / "parts", raw.parent / ".." / "raw" / raw.name / "src"):
        with pytest.raises(ValueError, match="must not lie inside each other"):
            convert(source, 801, **OPTIONS, overwrite=True)
        assert files(raw) == before


def test_a_case_taken_out_may_change_what_all_are_written_as(tmp_path, raw):
    for name in ("a", "b"):
        save(cuboid(0)[0], tmp_path / "d" / "images" / f"{name}.nrrd")
    save(cuboid(0)[1], tmp_path / "d" / "labels" / "a.nrrd")
    picture(tmp_path / "d" / "images" / "thumb.png", GRAY)
    with pytest.raises(ValueError, match="case thumb"):
        convert(tmp_path / "d", 801, **OPTIONS)
    (tmp_path / "d" / "images" / "thumb.png").unlink()
    convert(tmp_path / "d", 801, **OPTIONS)
    assert files(raw) == {"imagesTr/a_0000.nrrd", "imagesUn/b_0000.nrrd", "labelsTr/a.nrrd", "dataset.json"}
    assert json.loads((raw / "dataset.json").read_text())["file_ending"] == ".nrrd"


def test_taking_a_case_out_leaves_others_with_its_name_before_theirs(tmp_path, raw):
    for name in ("img", "img_0001", "img_0002"):
        save(cuboid(0)[0], tmp_path / "d" / "images" / f"{name}.nii.gz")
        save(cuboid(0)[1], tmp_path / "d" / "labels" / f"{name}.nii.gz")
    truncate(tmp_path / "d" / "labels" / "img.nii.gz")
    with pytest.raises(ValueError, match="case img: "):
        convert(tmp_path / "d", 801, **OPTIONS)
    for kind in ("images", "labels"):
        (tmp_path / "d" / kind / "img.nii.gz").unlink()
    convert(tmp_path / "d", 801, **OPTIONS)
    kept = {f"{kind}Tr/img_000{i}{c}.nii.gz" for i in (1, 2) for kind, c in (("images", "_0000"), ("labels", ""))}
    assert files(raw) == kept | {"dataset.json"}


def test_what_has_changed_since_is_made_anew(download, raw, tmp_path):
    split = tmp_path / "split.json"
    split.write_text('{"train": ["c0", "c3", "c4"], "val": ["c1"], "test": ["c2"]}')
    truncate(download / "images" / "c4.nii.gz")
    with pytest.raises(ValueError, match="case c4"):
        convert(download, 801, **OPTIONS, split=split)
    assert (raw / "splits_final.json").exists()
    (download / "images" / "c0.nii.gz").unlink()  # the dataset's is a link to it
    save(cuboid(7)[0], download / "images" / "c0.nii.gz")
    (download / "labels" / "c2.nii.gz").unlink()
    split.write_text('{"train": ["c0", "c1", "c3"], "test": ["c2"]}')
    convert(download, 801, **OPTIONS, split=split)
    assert np.array_equal(voxels(raw / "imagesTr" / "c0_0000.nii.gz"), cuboid(7)[0])
    assert not (raw / "splits_final.json").exists() and not (raw / "labelsTs" / "c2.nii.gz").exists()


def test_a_killed_worker_is_reported(download, raw, monkeypatch):
    monkeypatch.setattr(raw_datasets.dataset, "convert_case", kill_worker)
    with pytest.raises(ValueError, match=r"Dataset801_MyData: a worker was killed, .*-np"):
        convert(download, 801, **{**OPTIONS, "num_processes": 1})


def kill_worker(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--labeled nan", "nan: give a number of cases, a fraction"),
        ("--labeled inf", "inf: give a number of cases"),
        ("--labeled -1", "-1: give a number of cases"),
        ("--labeled 0.0", "0.0: give a number of cases"),
        ("--labeled 1.5", "1.5: give a number of cases"),
        ("--labeled few", "few: give a number of cases"),
        ("-np -1", "-1: give a whole number, 0 or more"),
        ("-d 0", "0: give a number from 1 to 999"),
        ("-d 1000", "1000: give a number from 1 to 999"),
    ],
)
def test_numbers_that_are_none(words, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "folder", "-i", "x", "-d", "801", "--labels", "organ", *words.split()])
    assert message in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "convert", interrupted)
    assert cli.main("convert folder -i x -d 801".split()) == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---------------------------------------------------------------------------------------------- the user's own folder


def voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def picture(file: Path, array: np.ndarray, mode: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(file)


GRAY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
MASK = (GRAY > 100).astype(np.uint8)


@pytest.fixture
def pictures(tmp_path) -> Path:
    for name in ("a", "b"):
        picture(tmp_path / "p" / "images" / f"{name}.png", GRAY)
    picture(tmp_path / "p" / "labels" / "a.png", MASK)
    return tmp_path / "p"


def test_gray_pictures_are_linked_and_masks_of_255_are_1(pictures, raw):
    picture(pictures / "labels" / "a.png", 255 * MASK)
    convert(pictures, 801, **OPTIONS)
    assert (raw / "imagesTr" / "a_0000.png").samefile(pictures / "images" / "a.png")
    assert np.array_equal(voxels(raw / "labelsTr" / "a.png"), MASK)


@pytest.mark.parametrize("kind", ["RGB", "one bit", "palette", "alpha"])
def test_masks_of_many_kinds(kind, pictures, raw):
    file = pictures / "labels" / "a.png"
    if kind == "RGB":
        picture(file, np.stack([MASK] * 3, -1))
    elif kind == "one bit":
        picture(file, MASK.astype(bool))
    elif kind == "palette":
        mask = Image.fromarray(MASK, "P")
        mask.putpalette([0, 0, 0, 128, 0, 0])
        mask.save(file)
    else:
        picture(file, np.stack([MASK, 255 + 0 * MASK], -1), "LA")
    convert(pictures, 801, **OPTIONS)
    written = voxels(raw / "labelsTr" / "a.png")
    assert written.shape == (4, 6) and np.array_equal(written, MASK)


def test_1_and_255_at_once_are_refused(pictures):
    mask = MASK.copy()
    mask[0, 0] = 255
    picture(pictures / "labels" / "a.png", mask)
    with pytest.raises(ValueError, match="a.png: has label values 1 and 255"):
        convert(pictures, 801, **OPTIONS)


def test_a_coloured_mask_is_refused(pictures):
    picture(pictures / "labels" / "a.png", np.stack([MASK, MASK, 0 * MASK], -1))
    message = r"0/0/0 \(11 voxels\), 1/1/0 \(13\), but there are names only for 0, 1, 255: give them .* 1/1/0=organ$"
    with pytest.raises(ValueError, match=message):
        convert(pictures, 801, **OPTIONS)


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("a_0000.png", "b_0000.png")])
def test_colour_pictures_are_three_channels_of_one_file(names, pictures, raw):
    shutil.rmtree(pictures / "images")
    for name in names:
        picture(pictures / "images" / name, np.stack([GRAY, GRAY + 1, GRAY + 2], -1))
    with pytest.raises(ValueError, match="a.*.png: is a colour image: name its channels with --channels"):
        convert(pictures, 801, **OPTIONS)
    assert not raw.exists()
    convert(pictures, 801, **OPTIONS, channels=["red", "green", "blue"])
    assert voxels(raw / "imagesTr" / "a_0000.png").shape == (4, 6, 3)


def test_gray_bmp_tiff_and_jpeg(tmp_path, raw):
    palette = Image.fromarray(GRAY, "P")
    palette.putpalette([i for i in range(256) for _ in range(3)])
    (tmp_path / "p" / "images").mkdir(parents=True)
    palette.save(tmp_path / "p" / "images" / "a.bmp")
    picture(tmp_path / "p" / "images" / "b.tiff", GRAY.astype(np.float32) / 7)
    picture(tmp_path / "p" / "images" / "c.jpg", GRAY)
    picture(tmp_path / "p" / "labels" / "a.png", MASK)
    convert(tmp_path / "p", 801, **OPTIONS)
    assert np.array_equal(voxels(raw / "imagesTr" / "a_0000.tif"), GRAY)
    assert np.allclose(voxels(raw / "imagesUn" / "b_0000.tif"), GRAY.astype(np.float32) / 7)
    jpeg = tmp_path / "p" / "images" / "c.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-30])
    with pytest.raises(ValueError, match="case c: .*c.jpg: cannot be read"):
        convert(tmp_path / "p", 801, **OPTIONS, overwrite=True)


def test_resolution_in_dots_is_no_spacing(pictures, raw):
    Image.fromarray(GRAY).save(pictures / "images" / "a.png", dpi=(300, 72))  # its mask has none
    convert(pictures, 801, **OPTIONS)
    assert (raw / "labelsTr" / "a.png").exists()


def test_volumes_among_pictures_and_pictures_among_volumes(pictures, download, raw):
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([GRAY] * 3)), str(pictures / "images" / "c.tif"))
    with pytest.raises(ValueError, match="case c: .*c.tif: has 3 dimensions, but images of this dataset have 2"):
        convert(pictures, 801, **OPTIONS)
    picture(download / "images" / "thumb.png", GRAY)
    with pytest.raises(
        ValueError, match="case thumb: .*thumb.png: has 2 dimensions, but images of this dataset have 3"
    ):
        convert(download, 801, **OPTIONS, overwrite=True)
    assert np.array_equal(voxels(raw / "imagesTr" / "c0_0000.nii.gz"), cuboid(0)[0])


def test_tiff_volumes_need_a_voxel_size(tmp_path, raw):
    image, label = cuboid(0)
    for kind, array in (("images", image.astype(np.uint8)), ("labels", label)):
        (tmp_path / "p" / kind).mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "p" / kind / "a.tiff"))
    with pytest.raises(ValueError, match=r"a.tiff: this volume has no voxel size: give it with --spacing X Y Z"):
        convert(tmp_path / "p", 801, **OPTIONS)
    convert(tmp_path / "p", 801, **OPTIONS, spacing=(0.5, 0.6, 3), overwrite=True)
    written = sitk.ReadImage(str(raw / "imagesTr" / "a_0000.nii.gz"))
    assert np.allclose(written.GetSpacing(), (0.5, 0.6, 3))
    assert np.array_equal(sitk.GetArrayFromImage(written), image) and voxels(raw / "labelsTr" / "a.nii.gz").any()
    (tmp_path / "p" / "images" / "a.json").write_text('{"Manufacturer": "x"}')
    with pytest.raises(ValueError, match='images/a.json: has no "spacing": write .* or remove this file'):
        convert(tmp_path / "p", 801, **OPTIONS, spacing=(0.5, 0.6, 3), overwrite=True)
    for kind in ("images", "labels"):
        (tmp_path / "p" / kind / "a.json").write_text('{"spacing": [4, 0.7, 0.8]}')
    convert(tmp_path / "p", 801, **OPTIONS, overwrite=True)
    spacing = sitk.ReadImage(str(raw / "imagesTr" / "a_0000.nii.gz")).GetSpacing()
    assert np.allclose(spacing, (0.8, 0.7, 4))


def write_dicom(folder: Path, heights, uid="1.2.3", start=0, shift=0.0) -> None:
    """A slice of 4 x 5 at each height, its voxels 10 times the height; the file names are in no order."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, height in enumerate(heights, start):
        image = sitk.GetImageFromArray(np.full((1, 4, 5), round(10 * height), np.int16))
        image.SetSpacing((0.5, 0.5, 2))
        image.SetOrigin((0, shift * height, height))
        tags = {"0020|000e": uid, "0008|0060": "CT", "0020|0013": str(i)}
        tags |= {"0020|0032": f"0\\{shift * height}\\{height}"}
        tags |= {"0020|0037": "1\\0\\0\\0\\1\\0", "0020|000d": "1.2", "0008|0018": f"1.2.{uid}.{i}"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{(7 * i) % 11}_{i}.dcm"))
        writer.Execute(image)


def test_dicom_series_in_one_folder_or_in_several(tmp_path, raw):
    case = tmp_path / "d" / "images" / "a"
    write_dicom(case / "one", [6, 2, 0])
    write_dicom(case / "two", [4, 8], start=3)
    label = np.zeros((5, 4, 5), np.uint8)
    label[2] = 1
    save(label, tmp_path / "d" / "labels" / "a.nii.gz", spacing=(0.5, 0.5, 2))
    convert(tmp_path / "d", 801, **OPTIONS)
    written = sitk.ReadImage(str(raw / "imagesTr" / "a_0000.nii.gz"))
    assert written.GetSize() == (5, 4, 5) and np.allclose(written.GetSpacing(), (0.5, 0.5, 2))
    assert [written[0, 0, z] for z in range(5)] == [0, 20, 40, 60, 80]


@pytest.mark.parametrize(
    "heights, uids, words",
    [
        ([0, 2, 4, 8, 10], ["1.2.3"], "slices are 2 mm apart, but 4 mm at 4 mm: slices are missing"),
        ([0, 2, 2, 4], ["1.2.3"], "several slices lie at 2 mm: remove copies"),
        ([0, 3, 6, 9, 10.5, 12], ["1.2.3"], "slices are 3 mm apart, but 1.5 mm at 9 mm"),
        ([0, 2, 4], ["1.2.3", "1.2.4"], "2 DICOM series: leave exactly one there"),
        ([], [], "no DICOM series"),
    ],
)
def test_dicom_that_is_not_one_whole_series(heights, uids, words, tmp_path):
    (tmp_path / "a").mkdir()
    for uid in uids:
        write_dicom(tmp_path / "a" / uid, heights, uid)
    with pytest.raises(ValueError, match=words):
        raw_datasets.read_dicom_series(tmp_path / "a")


def test_rounded_positions_are_no_gaps_and_a_tilted_gantry_is_refused(tmp_path):
    write_dicom(tmp_path / "a", [0, 0.6, 1.2, 1.9, 2.5, 3.1])
    assert raw_datasets.read_dicom_series(tmp_path / "a").GetSize() == (5, 4, 6)
    write_dicom(tmp_path / "b", [0, 2, 4], shift=1)
    with pytest.raises(ValueError, match="b: its slices are shifted against each other"):
        raw_datasets.read_dicom_series(tmp_path / "b")


def test_a_folder_of_dicom_may_have_any_name(tmp_path, raw):
    write_dicom(tmp_path / "d" / "images" / "a.nii", [0, 2, 4])
    label = sitk.GetImageFromArray(np.ones((3, 4, 5), np.uint8))
    label.SetSpacing((0.5, 0.5, 2))
    (tmp_path / "d" / "labels").mkdir()
    sitk.WriteImage(label, str(tmp_path / "d" / "labels" / "a.nii.mha"))
    convert(tmp_path / "d", 801, **OPTIONS)
    # ITK would write the label of a case "a.nii" as a.nii.gz
    assert (raw / "imagesTr" / "a_0000.nii.gz").exists() and (raw / "labelsTr" / "a.nii.gz").exists()


def test_files_that_are_numbered_from_zero(tmp_path, raw):
    for i in range(3):
        save(cuboid(i)[0], tmp_path / "n" / "images" / f"img_{i:04d}.nii.gz")
    save(cuboid(0)[1], tmp_path / "n" / "labels" / "img_0000.nii.gz")
    convert(tmp_path / "n", 801, **OPTIONS)
    assert (raw / "labelsTr" / "img_0000.nii.gz").exists() and len(list((raw / "imagesUn").iterdir())) == 2


@pytest.mark.parametrize("odd", ["c3_0002.nii.gz", "c3_T2.nii.gz"])
def test_a_misnamed_channel_fails_alone(odd, two_channels, raw):
    (two_channels / "images" / "c3_0001.nii.gz").rename(two_channels / "images" / odd)
    with pytest.raises(ValueError) as error:
        convert(two_channels, 801, **OPTIONS, channels=["a", "b"], num_labeled=3)
    lines = str(error.value).splitlines()
    assert (
        len(lines) == 3
        and "c3_0000.nii.gz: its case has no channel b" in lines[0]
        and f"{odd}: its name ends with none" in lines[1]
    )
    assert len(list((raw / "labelsTr").iterdir())) == 3


def test_what_is_of_no_known_kind(download, raw, capsys):
    (download / "images" / "c9.npy").touch()
    (download / "images" / "readme.txt").touch()
    convert(download, 801, **OPTIONS)
    assert "left out, of no known kind: 1 files: images/c9.npy" in capsys.readouterr().out
    (download / "labels" / "c3.npz").touch()
    with pytest.raises(ValueError, match="c3.npz: this file type cannot be read"):
        convert(download, 801, **OPTIONS, overwrite=True)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"labels": ["background", "organ"]}, "--labels: background is value 0"),
        ({"labels": ["organ", "organ"]}, "--labels: organ is named twice"),
        ({"channels": ["CT", "CT"]}, "--channels: CT is named twice"),
    ],
)
def test_names_that_make_no_sense(options, words, download):
    with pytest.raises(ValueError, match=words):
        convert(download, 801, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "split, words",
    [
        ([{"train": ["c0"], "val": []}], 'split.json: is not a JSON object: write {"train"'),
        ({"val": ["c0"]}, 'split.json: has no "train": write {"train"'),
        ({"train": ["c0"], "tset": ["c1"]}, 'split.json: "tset" is not the name of a part: write {"train"'),
        ({"train": ["c0", "c1.nii.gz"]}, "split.json: train: there is no case c1.nii.gz: did you mean c1"),
        ({"train": ["c0", 1]}, "split.json: \"train\" is ['c0', 1], but must be a list"),
        ({"train": "c0"}, "split.json: \"train\" is 'c0', but must be a list"),
        ({"train": ["c0"], "val": "c1"}, "split.json: \"val\" is 'c1', but must be a list"),
        ({"train": [["c0"]]}, "split.json: \"train\" is [['c0']], but must be a list"),
        ({"train": ["c0", "c1"], "test": ["c1"]}, "split.json: case c1 is in the train and in the test list"),
    ],
)
def test_split_files_that_make_no_sense(split, words, download, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=re.escape(words)):
        convert(download, 801, **OPTIONS, split=tmp_path / "split.json")


def test_test_images_need_no_label(download, raw, tmp_path, capsys):
    (tmp_path / "split.json").write_text('{"train": ["c0", "c3"], "test": ["c1", "c4"]}')
    convert(download, 801, **OPTIONS, split=tmp_path / "split.json")
    assert {f for f in files(raw) if "Ts" in f} == {
        "imagesTs/c1_0000.nii.gz", "imagesTs/c4_0000.nii.gz", "labelsTs/c1.nii.gz"
    }  # fmt: skip
    assert "case c4: has no label" in capsys.readouterr().out


def test_header_and_data_are_both_in_the_checksum(tmp_path, raw):
    digests = []
    for value in (1, 2):
        save(value + cuboid(0)[0], tmp_path / "d" / "images" / "a.mhd")
        save(cuboid(0)[1], tmp_path / "d" / "labels" / "a.mha")
        convert(tmp_path / "d", 801, **OPTIONS, overwrite=True)
        digests.append(json.loads((raw / "dataset.json").read_text())["semiseg"]["sources"])
    assert digests[0]["images/a.mhd"] != digests[1]["images/a.mhd"]
    assert digests[0]["labels/a.mha"] == digests[1]["labels/a.mha"]


# ----------------------------------------------------------------------------------------- interruptions, archives


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(tmp_path, raw):
    for i in range(40):
        image, label = cuboid(i)
        save(image, tmp_path / "many" / "images" / f"c{i:02d}.nii.gz")
        save(label, tmp_path / "many" / "labels" / f"c{i:02d}.nii.gz")
    words = [
        "convert",
        "folder",
        "-i",
        str(tmp_path / "many"),
        "-d",
        "801",
        "--labels",
        "organ",
        "-np",
        "0",
        "--no_pbar",
    ]
    slowly = (
        "import sys, time, nnunet_semiseg.cli as cli, nnunet_semiseg.raw_datasets.case as c; write = c._write_case\n"
        "c._write_case = lambda *args: (time.sleep(0.05), write(*args))[1]\n"
        "cli.main(sys.argv[1:])"
    )
    process = subprocess.Popen([sys.executable, "-c", slowly, *words], start_new_session=True)
    while len(list((raw / ".conversion").glob("case_*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in (raw / ".conversion").glob("case_*.json")}
    assert 5 <= len(done) < 40 and not (raw / "dataset.json").exists()
    written = raw_datasets.case._write_case
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            raw_datasets.case, "_write_case", lambda case, *args: seen.append(case.name) or written(case, *args)
        )
        assert cli.main(words) == 0
    assert len(seen) == 40 - len(done)
    assert len(list((raw / "imagesTr").iterdir())) == len(list((raw / "labelsTr").iterdir())) == 40


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_are_unpacked_for_the_time_of_the_conversion(kind, download, raw, tmp_path):
    archive = tmp_path / f"d.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in download.rglob("*.nii.gz"):
                file.write(path, path.relative_to(download))
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(download, ".")
    with unpacked(archive, raw.parent, "for_801") as left:  # a killed run has left it
        shutil.copytree(left, tmp_path / "left")
    shutil.copytree(tmp_path / "left", left)
    convert(archive, 801, **OPTIONS)
    assert (raw / "imagesTr" / "c0_0000.nii.gz").read_bytes() == (download / "images" / "c0.nii.gz").read_bytes()
    assert [p.name for p in raw.parent.iterdir()] == [raw.name]


def member(name: str, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("../evil.txt"),
        member("/evil.txt"),
        member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("link", type=tarfile.SYMTYPE, linkname="inside"),
        member("hard", type=tarfile.LNKTYPE, linkname="inside"),
        member("null", type=tarfile.CHRTYPE),
        member("pipe", type=tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.linkname}",
)
def test_tars_that_reach_out_are_refused(info, tmp_path, raw):
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as file:
        file.addfile(member("inside"), io.BytesIO())
        file.addfile(info, io.BytesIO())
    with pytest.raises(ValueError, match="evil.tar: .*do not use this archive"):
        convert(archive, 801, **OPTIONS)
    assert not (tmp_path / "evil.txt").exists() and not (tmp_path / "raw" / "evil.txt").exists()
    assert list(raw.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_zips_that_reach_out_are_refused(name, tmp_path, raw):
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, "evil")
    with pytest.raises(ValueError, match="evil.zip: .*do not use this archive"):
        convert(archive, 801, **OPTIONS)
    assert list(raw.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["nonsense", "deflate"])
def test_a_damaged_archive(kind, tmp_path, raw):
    archive = tmp_path / "d.zip"
    if kind == "nonsense":
        archive.write_bytes(b"PK nonsense")
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a", b"abc" * 100)
        content = bytearray(archive.read_bytes())
        content[32:36] = b"\xff\xff\xff\xff"
        archive.write_bytes(content)
    with pytest.raises(ValueError, match="d.zip: cannot be unpacked"):
        convert(archive, 801, **OPTIONS)
    assert list(raw.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_full_disk_while_unpacking_is_no_damaged_archive(kind, tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    archive = shutil.make_archive(str(tmp_path / "d"), kind, tmp_path, "a")
    with no_room_for_files_of(100), pytest.raises(DiskError, match=r": cannot be written \(.*\): make room"):
        with unpacked(Path(archive), tmp_path, "for_801"):
            pass
    assert not list(tmp_path.glob(".unpacked*"))


def test_the_raw_folder_is_made_and_an_archive_may_have_a_folder_of_its_own(download, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "new" / "raw"))
    shutil.make_archive(str(tmp_path / "d"), "zip", download.parent, download.name)
    assert (convert(tmp_path / "d.zip", 801, **OPTIONS) / "imagesTr" / "c0_0000.nii.gz").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="nnUNet_raw=.*file: cannot be made"):
        convert(download, 801, **OPTIONS)


# --------------------------------------------------------------------------------------------------- the command


def test_list_and_unknown_names(capsys):
    assert cli.main(["convert", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "la2018 " in printed and "folder " in printed
    assert cli.main(["convert", "la2017", "-i", "x", "-d", "1"]) == 1
    assert "no such data set: did you mean la2018" in capsys.readouterr().err


def test_options_of_a_data_set_are_its_own(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "h5", "-h"])
    assert "--spacing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["convert", "la2018", "-i", "x", "-d", "1", "--spacing", "1"])
    assert "error: --spacing: no such option" in capsys.readouterr().err
    for option, value, message in (
        ("--spacing", "1 1 -2", "-2: give a number above 0"),
        ("--test", "20", "20: give a number between 0 and 1"),
        ("--test", "a", "a: give a number above 0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["convert", "folder", "-i", "x", "-d", "1", option, *value.split()])
        assert f"error: argument {option}: {message}" in capsys.readouterr().err


def test_a_second_conversion_is_told_who_is_at_it(download, raw):
    with only_one(raw.parent / ".Dataset801.lock", "converts"):
        with pytest.raises(BusyError, match=f"process {os.getpid()} on .* makes dataset 801: wait"):
            convert(download, 801, **OPTIONS)
        assert not raw.exists()
        convert(download, 801, **OPTIONS, dry_run=True)
        convert(download, 802, **OPTIONS)
    convert(download, 801, **OPTIONS)
    assert (raw / "dataset.json").is_file() and not list(raw.parent.glob(".*"))


def test_a_full_disk_ends_the_conversion_in_one_line_and_leaves_nothing_half(tmp_path, raw):
    folder = tmp_path / "download"
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (60, 60, 60)).astype(np.uint8)
        save(noise, folder / "images" / f"c{i}.nhdr")  # which nnU-Net does not read
        save(np.ones((60, 60, 60), np.uint8), folder / "labels" / f"c{i}.nhdr")
    with no_room_for_files_of(100_000), pytest.raises(DiskError) as error:
        convert(folder, 801, **OPTIONS)
    assert re.fullmatch(rf"{raw}/.*c0_0000.nii.gz: cannot be written \(.*\): make room .*", str(error.value))
    assert not list(raw.rglob("*.nii.gz")) and not list(raw.rglob("*.tmp")) and not (raw / "dataset.json").exists()
    convert(folder, 801, **OPTIONS)
    assert len(list(raw.rglob("*.nii.gz"))) == 6
