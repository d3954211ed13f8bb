"""What all converters share: who is labelled, what is refused, and going on after an interruption."""

from __future__ import annotations

import io
import json
import os
import re
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

from nnunet_semiseg import cli, conversion
from nnunet_semiseg.conversion import Case, Crop, Source, assign, seeded_split
from nnunet_semiseg.dataset_conversion import folder as own

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
    "labeled, published, expected",
    [(2, None, 2), (0.1, None, 1), (0.3, None, 3), ("all", 4, 10), (None, 4, 4), (None, None, 10), (None, 0.25, 2),
     (10, 4, 10), (1.0, 4, 10), (None, 40, 10)],
)  # fmt: skip
def test_the_first_of_the_list_are_labelled(labeled, published, expected):
    parts = assign(source(10, 10, labeled=published), labeled, "published")
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


@pytest.mark.parametrize("labeled", [11, 0, 1.2])
def test_more_labelled_cases_than_there_are(labeled):
    with pytest.raises(ValueError, match="10 of the 10 training cases have a label: give a number from 1 to 10"):
        assign(source(10, 10), labeled, "published")


def test_seeded_split_is_the_same_everywhere_and_leaves_out_nothing():
    train, test = seeded_split(["b", "a", "d", "c", "e"], test=0.4)
    assert (train, test) == seeded_split(["e", "d", "c", "b", "a"], test=0.4)
    assert len(test) == 2 and sorted(train + test) == list("abcde")


def test_crop_is_the_box_with_its_margin_at_least_so_large_and_inside():
    label = np.zeros((20, 20, 20), np.uint8)
    label[0, 8:10, 5:15] = 1  # z, y, x
    # x: 5 - 1 to 15 + 1; y: 8 - 1 to 10 + 1, grown from 4 to 7: 1 below, 2 above; z: -1 to 2, cut to 0 to 2
    slices = Crop((1, 1, 1), (5, 7, 3), "me")(sitk.GetImageFromArray(label))
    assert slices == (slice(4, 16), slice(6, 13), slice(0, 2))
    with pytest.raises(ValueError, match="label is empty"):
        Crop((1, 1, 1), (5, 7, 3), "me")(sitk.GetImageFromArray(0 * label))


# ------------------------------------------------------------------------------------------ what is written


def test_the_dataset(download, raw):
    assert convert(download, 801, **OPTIONS, labeled=2) == raw
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
    digest = subprocess.run(["sha256sum", download / "labels" / "c1.nii.gz"], capture_output=True, encoding="utf-8")
    assert sources["labels/c1.nii.gz"] == digest.stdout.split()[0]


def test_unlabelled_labels_are_not_even_opened(download, raw):
    (download / "labels" / "c2.nii.gz").write_bytes(b"not an image")
    convert(download, 801, **OPTIONS, labeled=2)
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
    convert(download, 801, **OPTIONS, labeled=2, dry_run=True)
    assert "2 labeled, 3 unlabeled" in capsys.readouterr().out
    assert not raw.exists() and list(raw.parent.iterdir()) == []


def test_an_empty_label_is_reported(download, raw, capsys):
    save(np.zeros((8, 8, 8), np.uint8), download / "labels" / "c1.nii.gz")
    convert(download, 801, **OPTIONS)
    assert "case c1: the label is empty" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ what is refused

BAD_CASES = {
    "a missing channel": (lambda d: (d / IMAGE).unlink(), "c1_0001.nii.gz: missing"),
    "a label of another shape": (lambda d: save(cuboid(0)[1][:6], d / LABEL), r"c1.nii.gz: size \(8, 8, 6\) differs"),
    "a label on another grid": (lambda d: save(cuboid(0)[1], d / LABEL, spacing=(1, 1, 3)), "c1.nii.gz: spacing"),
    "channels on different grids": (
        lambda d: save(cuboid(0)[0], d / IMAGE, origin=(5, 0, 0)),
        "c1_0001.nii.gz: origin",
    ),
    "an unknown label value": (
        lambda d: save(7 * cuboid(0)[1], d / LABEL),
        "c1.nii.gz: label value 7, known are 0, 1",
    ),
    "a truncated file": (lambda d: truncate(d / IMAGE), "c1_0001.nii.gz: cannot be read"),
    "NaN": (
        lambda d: save(np.full((8, 8, 8), np.nan, np.float32), d / IMAGE),
        "c1_0001.nii.gz: 512 voxels are NaN",
    ),
    "colours": (
        lambda d: sitk.WriteImage(sitk.Image([8, 8, 8], sitk.sitkVectorUInt8, 3), str(d / IMAGE)),
        "4 channels instead of 2",
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

    image, label = cuboid(1)  # mended, the same command goes on
    for c in range(2):
        save(image, two_channels / "images" / f"c1_000{c}.nii.gz")
    save(label, two_channels / "labels" / "c1.nii.gz")
    assert cli.main(arguments) == 0
    assert "going on: 3 cases are there" in capsys.readouterr().out
    assert json.loads((raw / "dataset.json").read_text())["numTraining"] == 3
    assert (raw / "labelsTr" / "c1.nii.gz").exists() and not (raw / ".conversion").exists()


def test_no_labelled_case_is_whole(download, raw):
    for i in range(3):
        truncate(download / "labels" / f"c{i}.nii.gz")
    with pytest.raises(ValueError, match="no labelled case is whole"):
        convert(download, 801, **OPTIONS)
    assert not (raw / "dataset.json").exists()


def test_no_case_found_shows_the_layout(tmp_path, raw):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no case found; expected is\n    images/CASE_0000.nii.gz"):
        convert(tmp_path / "empty", 801, **OPTIONS)


def test_a_case_that_is_there_twice(download):
    save(cuboid(0)[0], download / "images" / "c0.nrrd")
    with pytest.raises(ValueError, match=r"c0.nrrd: case c0 is there twice, also as .*c0.nii.gz"):
        convert(download, 801, **OPTIONS)


def test_a_label_without_an_image(download):
    save(cuboid(0)[1], download / "labels" / "c9.nii.gz")
    with pytest.raises(ValueError, match="c9.nii.gz: there is no image of case c9"):
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
    with pytest.raises(ValueError, match="Dataset801_Other: has the same number"):
        convert(download, 801, **OPTIONS, overwrite=True)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"crop": "published"}, "no published crop"),
        ({"labels": None}, "--labels"),
        ({"labeled": 4}, "3 of the 5 training cases have a label"),
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
        convert(download, 801, **OPTIONS, labeled=1)


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
        "import sys, time, nnunet_semiseg.cli as cli, nnunet_semiseg.conversion as c; write = c._write_case\n"
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
    written = conversion._write_case
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_write_case", lambda case, *args: seen.append(case.name) or written(case, *args))
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
    with pytest.raises(ValueError, match="evil.tar: .*do not trust it"):
        convert(archive, 801, **OPTIONS)
    assert not (tmp_path / "evil.txt").exists() and not (tmp_path / "raw" / "evil.txt").exists()
    assert list(raw.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_zips_that_reach_out_are_refused(name, tmp_path, raw):
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, "evil")
    with pytest.raises(ValueError, match="evil.zip: .*do not trust it"):
        convert(archive, 801, **OPTIONS)
    assert list(raw.parent.iterdir()) == []


def test_a_damaged_archive(tmp_path):
    (tmp_path / "d.zip").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="d.zip: cannot be unpacked"):
        convert(tmp_path / "d.zip", 801, **OPTIONS)


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
    assert "unrecognized arguments: --spacing" in capsys.readouterr().err
