"""Labelled cases that are damaged, or that change after they were preprocessed."""

import errno
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import in_threads, write_image
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from training import PLANS, make_trainer
from watching import no_room_for_files_of, opened_in

from nnunet_semiseg import parallel
from nnunet_semiseg.data.image_problems import (
    intensity_problems,
    label_problems,
    preprocessed_problems,
    spread,
    spread_problems,
)
from nnunet_semiseg.data.labeled_cases import inspect_labeled
from nnunet_semiseg.data.preprocessed import look_at_labeled
from nnunet_semiseg.data.readable import ReadableCases
from nnunet_semiseg.data.stamps import renewed, stamp
from nnunet_semiseg.data.unlabeled_manifest import load_manifest
from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.request import Request, find_test_set
from nnunet_semiseg.schema import read_dataset_json
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.vlm.pairs import open_cases

OLD = (1_500_000_000, 1_500_000_000)
"""July 2017: what `cp -p`, rsync or unzip may leave"""
PLAN_AGAIN = "run nnunet_semiseg plan_and_preprocess -d 901 -c 3d_fullres -pl SemiSegPlannerSmall"


@pytest.fixture
def dataset(ready):
    return ready(labeled=2, unlabeled=2)


def refused(message, action, *args, **kwargs):
    with pytest.raises(UserError, match=rf"^\S*{message}.*$"):
        action(*args, **kwargs)


def train(dataset, trainer_class=MeanTeacherTrainer):
    return make_trainer(trainer_class, dataset)


def preprocess(dataset):
    with in_threads():
        preprocess_unlabeled(dataset.id, ["3d_fullres"], PLANS, 0, show_progress_bar=False)


def label_of(dataset, case="tr_000"):
    return dataset.raw / "labelsTr" / f"{case}.nii.gz"


def reference_of(dataset, case="tr_000"):
    return dataset.preprocessed / "gt_segmentations" / f"{case}.nii.gz"


def voxels(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def correct(dataset, times=OLD):
    """A corrected label; its values are those of the old one in a half of the voxels."""
    label = voxels(label_of(dataset))
    label[:, :, 12:] = 0
    write_image(label, label_of(dataset))
    if times:
        os.utime(label_of(dataset), times)


def preprocessed_folder(dataset):
    return dataset.preprocessed / f"{PLANS}_3d_fullres"


# --- a corrected label


@pytest.mark.parametrize("times", [OLD, None])
def test_a_corrected_label_reaches_validation_whatever_its_time(dataset, times):
    correct(dataset, times)
    refused("tr_000.nii.gz: this label or its image is not what was preprocessed: " + PLAN_AGAIN, train, dataset)
    names = {"configuration": "3d_fullres", "trainers": ("MeanTeacherTrainer",), "plans": PLANS, "fold": "0"}
    asked = Request(dataset=dataset.id, **names)
    refused("tr_000.nii.gz: this label or its image is not", lambda: find_test_set(asked))
    for part, file in {"imagesTs": "un_000_0000.nii.gz", "labelsTs": "un_000.nii.gz"}.items():  # a test set, too
        (dataset.raw / part).mkdir()
        shutil.copy(dataset.image("un_000"), dataset.raw / part / file)
    refused("tr_000.nii.gz: this label or its image is not", lambda: find_test_set(asked))
    refused("tr_000.nii.gz: this label or its image is not", open_cases, dataset.name, PLANS, "3d_fullres")
    refused("tr_000.nii.gz: this label, its image or the plans changed after prepro", preprocess, dataset)
    dataset.plan()
    assert reference_of(dataset).read_bytes() == label_of(dataset).read_bytes()
    assert np.array_equal(
        blosc2.open(str(preprocessed_folder(dataset) / "tr_000_seg.b2nd"))[0], voxels(label_of(dataset))
    )
    train(dataset)


def test_a_corrected_label_that_nnunet_preprocessed(dataset):
    """nnU-Net's own command leaves its copy of the old label, as that is newer."""
    correct(dataset)
    stock_preprocessing(dataset)
    assert reference_of(dataset).read_bytes() != label_of(dataset).read_bytes()
    refused("", train, dataset)
    preprocess(dataset)
    assert reference_of(dataset).read_bytes() == label_of(dataset).read_bytes()
    train(dataset)


def stock_preprocessing(dataset):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    with in_threads():
        preprocess_dataset(dataset.id, PLANS, ["3d_fullres"], [1], show_progress_bar=False)


def test_references_that_are_half_or_missing(dataset):
    whole = label_of(dataset).read_bytes()
    reference_of(dataset).write_bytes(whole[:100])
    for trainer_class in (MeanTeacherTrainer, SupervisedTrainer):
        refused(
            "gt_segmentations/tr_000.nii.gz: this copy is not the label that was preprocessed: run",
            train,
            dataset,
            trainer_class,
        )
    preprocess(dataset)
    assert reference_of(dataset).read_bytes() == whole
    shutil.rmtree(dataset.preprocessed / "gt_segmentations")
    for trainer_class in (MeanTeacherTrainer, SupervisedTrainer):
        refused("gt_segmentations/tr_000.nii.gz: no such file, but validation needs", train, dataset, trainer_class)
    preprocess(dataset)
    train(dataset)
    assert not list(dataset.preprocessed.rglob("*.tmp"))


# --- damaged files

RNG = np.random.default_rng(1)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def change_image(value, dtype=np.float32):
    def change(dataset):
        image = voxels(dataset.image("tr_000", folder="imagesTr")).astype(dtype)
        image[3, 4, 5] = value
        write_image(image, dataset.image("tr_000", folder="imagesTr"))

    return change


def change_header(file, byte, kind, value):
    """A number in a NIfTI header; the orientation is left out, as it would hold another spacing."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[252:256] = bytes(4)  # qform_code and sform_code
    struct.pack_into(f"<{kind}", content, byte, value)
    file.write_bytes(gzip.compress(bytes(content)))


def change_label(change):
    def change_it(dataset):
        label = voxels(label_of(dataset))
        write_image(change(label), label_of(dataset))

    return change_it


def with_voxel(label, value, dtype):
    label = label.astype(dtype)
    label[0, 0, 0] = value
    return label


def write_rgb(file):
    colours = sitk.Image([24, 24, 24], sitk.sitkVectorUInt8, 3)
    colours.CopyInformation(sitk.ReadImage(str(file)))
    sitk.WriteImage(colours, str(file))


DAMAGE = {
    "cut image": (lambda d: cut(d.image("tr_000", folder="imagesTr")), "imagesTr/tr_000_0000.nii.gz: cannot be read"),
    "empty file": (
        lambda d: d.image("tr_000", folder="imagesTr").write_bytes(b""),
        "imagesTr/tr_000_0000.nii.gz: cannot be read by any of nnU-Net's readers: replace the image",
    ),
    "RGB label": (
        lambda d: sitk.WriteImage(sitk.Image([24, 24, 24], sitk.sitkVectorUInt8, 3), str(label_of(d))),
        "labelsTr/tr_000.nii.gz: ",
    ),
    "RGB label on the image's grid": (
        lambda d: write_rgb(label_of(d)),
        r"labelsTr/tr_000.nii.gz: size \(24, 24, 24, 3\) differs from",  # and not the spacing, too
    ),
    "cut label": (lambda d: cut(label_of(d)), "labelsTr/tr_000.nii.gz: cannot be read"),
    "link to nothing": (
        lambda d: (image := d.image("tr_001", folder="imagesTr")).unlink() or image.symlink_to("/nowhere.nii.gz"),
        "imagesTr/tr_001_0000.nii.gz: no such file, or a link to none: replace the image or take its case out of",
    ),
    "no label": (lambda d: label_of(d).unlink(), "labelsTr/tr_000.nii.gz: no such file: put the label there"),
    "lost slices": (
        change_label(lambda label: label[:20]),
        r"labelsTr/tr_000.nii.gz: size \(24, 24, 20\) differs from \(24, 24, 24\) in tr_000_0000.nii.gz: .*labelsTr",
    ),
    "NaN": (change_image(np.nan), "imagesTr/tr_000_0000.nii.gz: 1 voxels are NaN or infinite: .*imagesTr"),
    "above 32 bits": (change_image(1e300, np.float64), "tr_000_0000.nii.gz: 1 voxels are NaN or infinite, as 32-bit"),
    "huge": (
        change_image(3e38),
        r"tr_000_0000.nii.gz: values from \S* to 3e\+38, too large for the variance to be a 32-bit number",
    ),
    "constant": (
        lambda d: write_image(np.zeros((24, 24, 24), np.float32), d.image("tr_000", folder="imagesTr")),
        "imagesTr/tr_000_0000.nii.gz: constant, every voxel is 0: replace the image or take its case out of imagesTr",
    ),
    "unknown value": (
        change_label(lambda label: with_voxel(label, 7, np.uint8)),
        "labelsTr/tr_000.nii.gz: has the value 7, but dataset.json names 0, 1, 2: correct one",
    ),
    "broken value": (
        change_label(lambda label: with_voxel(label, 0.9999, np.float32)),
        "labelsTr/tr_000.nii.gz: 0.9999 is not a whole number",
    ),
    "below 0": (
        change_label(lambda label: with_voxel(label, -1, np.int16)),
        "labelsTr/tr_000.nii.gz: has the value -1",
    ),
    "voxels within the header": (
        lambda d: change_header(d.image("tr_000", folder="imagesTr"), 108, "f", 0),
        "imagesTr/tr_000_0000.nii.gz: its voxels begin at byte 0, inside the header of 352 bytes: replace",
    ),
    "label within the header": (
        lambda d: change_header(label_of(d), 108, "f", 0),
        "labelsTr/tr_000.nii.gz: its voxels begin at byte 0, inside",
    ),
    "spacing of none": (
        lambda d: change_header(d.image("tr_000", folder="imagesTr"), 80, "f", 1e-30),
        r"imagesTr/tr_000_0000.nii.gz: its spacing is \(1e-30, 1, 1.5\) mm: replace",
    ),
    "4D label": (
        change_label(lambda label: np.stack([label, label])),
        "labelsTr/tr_000.nii.gz: size .* differs",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_labelled_files_are_named_before_anything_is_made_of_them(tiny_dataset, kind, capsys):
    dataset = tiny_dataset(labeled=2, unlabeled=1)
    damage, message = DAMAGE[kind]
    damage(dataset)
    refused(message, dataset.plan)
    assert not dataset.preprocessed.exists()
    assert "Traceback" not in capsys.readouterr().err  # nnU-Net prints one for each reader that fails


def test_damage_that_nnunets_own_preprocessing_let_through(dataset):
    change_image(1e15)(dataset)  # all other voxels are one value after the z-score
    stock_preprocessing(dataset)
    refused("tr_000_0000.nii.gz: after preprocessing, its values spread 0.0.* times as much", preprocess, dataset)
    assert not list(preprocessed_folder(dataset).glob("tr_000*"))  # so that no training takes it
    refused("Dataset901_Tiny: labelled case tr_000 is new and not preprocessed: run", train, dataset)


@pytest.mark.parametrize("folder, command", [("imagesTr", "plan"), ("imagesUn", "preprocess")])
def test_spacings_of_another_magnitude(dataset, folder, command, monkeypatch):
    """The others have 1 mm: in nanometres, no voxel would be left; in metres, there would be 10^9 times as many."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    file = dataset.image("tr_000" if folder == "imagesTr" else "un_000", folder=folder)
    change_header(file, 80, "f", 1e-6 if folder == "imagesUn" else 1e3)
    if folder == "imagesTr":
        change_header(label_of(dataset), 80, "f", 1e3)
    message = (
        rf"{file.name}: its spacing is (1e-06|1000) where other images have 1: correct its header.*out of {folder}"
    )
    refused(message, dataset.plan if command == "plan" else lambda: preprocess(dataset))


def test_an_unlabelled_image_whose_voxels_begin_within_the_header(dataset):
    for first in (0, 348):
        change_header(dataset.image("un_000"), 108, "f", first)
        refused("imagesUn/un_000_0000.nii.gz: (its voxels begin|cannot be read)", preprocess, dataset)


def test_each_labelled_file_is_unpacked_once(dataset, tmp_path, monkeypatch):
    """What is read is what was unpacked before, and checked; without room for that, the file itself."""
    read, original = [], SimpleITKIO.read_images
    monkeypatch.setattr(SimpleITKIO, "read_images", lambda self, files: read.extend(files) or original(self, files))
    names = ["tr_000.nii", "tr_000_0000.nii", "tr_001.nii", "tr_001_0000.nii"]
    stamps = inspect_labeled(dataset.raw, tmp_path, read_dataset_json(dataset.raw), 0)
    example = str(dataset.raw / "imagesTr" / "tr_000_0000.nii.gz")  # with which nnU-Net tries its readers
    assert read.pop(0) == example and sorted(Path(file).name for file in read) == names
    assert not any(Path(file).exists() for file in read)
    read.clear()
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert inspect_labeled(dataset.raw, tmp_path, read_dataset_json(dataset.raw), 0) == stamps
    assert read.pop(0) == example and sorted(Path(file).name for file in read) == [f"{name}.gz" for name in names]


@pytest.mark.parametrize("what", [None, "Labelled cases"])
def test_long_work_has_a_bar(what, monkeypatch):
    bars = []
    monkeypatch.setattr(parallel, "tqdm", lambda results, *about, **_: bars.append(about) or results)
    assert list(parallel.run_jobs(pow, [(2, 1), (2, 3)], 0, what)) == [2, 8]
    assert bars == ([] if what is None else [(what, 2)])


def test_labels_that_are_all_empty(tiny_dataset):
    dataset = tiny_dataset(labeled=2, unlabeled=1)
    for file in (dataset.raw / "labelsTr").iterdir():
        write_image(np.zeros((24, 24, 24), np.uint8), file)
    refused(f"{dataset.raw / 'labelsTr'}: all labels are empty", dataset.plan)


def test_problems_by_hand():
    """Image values -1 and 1 in turn: mean distance 1; a single 8 in 64 zeros: 2 * 8 * (1/64) * (63/64) = 0.246."""
    flat = np.zeros((1, 4, 4, 4), np.float32)
    turns = np.where(np.arange(64) % 2, 1, -1).reshape(1, 4, 4, 4).astype(np.float32)
    single = flat.copy()
    single[0, 0, 0, 0] = 8
    assert spread(np.concatenate([flat, turns, single])) == pytest.approx([0, 1, 2 * 8 * 63 / 64**2])
    channels, images = ["a", "b"], ["f/a", "f/b"]
    assert spread_problems([1, 0], images, channels, [19, 1]) == []  # 0 is a channel that the case lacks
    assert spread_problems([1, 1], images, channels, None) == []
    (line,) = spread_problems([1, 21], images, channels, [1, 1])
    assert line.startswith("f/b: after preprocessing, its values spread 21 times")
    (line,) = spread_problems([1 / 21, 1], images, channels, [1, 1])
    assert line.startswith("f/a: after preprocessing, its values spread 0.048 times")
    both = np.concatenate([turns, flat])
    assert preprocessed_problems(both, images, channels, [0, 0]) == []
    (line,) = preprocessed_problems(both, images, channels, [0, 2])
    assert line.startswith("f/b: constant after preprocessing, every voxel is 0")
    both[0, 0, 0, 0] = np.nan
    assert (
        "f/a: 1 voxels are NaN or infinite after preprocessing"
        in preprocessed_problems(both, images, channels, [0, 0])[0]
    )
    assert intensity_problems(turns * np.float32(1e18), ["f/a"], ["a"]) == []
    (line,) = intensity_problems(turns * np.float32(1e20), ["f/a"], ["a"])
    assert line.startswith("f/a: values from -1e+20 to 1e+20, too large for the variance to be a 32-bit number")
    label = np.array([0, 1, 3]).reshape(1, 1, 1, 3)
    assert label_problems(label, "l", (1, 1, 3), {0, 1, 3}) == []
    assert "has the value 3, but dataset.json names 0, 1" in label_problems(label, "l", (1, 1, 3), {0, 1})[0]


# --- what changes after preprocessing


def test_a_stamp_notices_what_no_time_and_no_size_tells(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    kept = stamp(file)
    with opened_in(tmp_path) as opened:
        assert renewed(kept, file) == kept
    assert opened == []
    times = (kept[2], kept[2])
    file.write_bytes(b"abd")  # other bytes, the same size and, by cp -p, the same time
    os.utime(file, ns=times)
    assert renewed(kept, file) is None
    file.write_bytes(b"abc")
    os.utime(file, OLD)
    now = renewed(kept, file)
    assert now[2] == 1_500_000_000 * 10**9 and now[4] == kept[4]
    assert renewed(kept, file, may_read=False) is None and renewed(now, file, may_read=False) == now
    file.write_bytes(b"abcd")
    assert renewed(kept, file) is None


def test_a_start_opens_no_image_and_no_label(dataset):
    folders = [dataset.raw / folder for folder in ("imagesUn", "imagesTr", "labelsTr")]
    train(dataset)  # the first start of a copy reads the images, as their times are new
    with opened_in(*folders) as opened:
        train(dataset)
    assert {os.path.basename(os.path.normpath(path)) for path in opened} <= {"imagesUn", "imagesTr"}  # to list them
    os.utime(dataset.image("un_000"))
    with opened_in(*folders) as opened:
        train(dataset)
    assert [os.path.basename(path) for path in opened if path.endswith(".gz")] == ["un_000_0000.nii.gz"]


def test_an_unlabelled_image_with_other_bytes_and_the_same_size_and_time(dataset):
    file = dataset.image("un_001")
    train(dataset)
    change_bytes(file)
    refused(
        "imagesUn: the images of case un_001 have changed since they were preprocessed: run nnunet_semiseg prepro",
        train,
        dataset,
    )


@pytest.mark.parametrize("trainer_class", [MeanTeacherTrainer, SupervisedTrainer])
def test_labelled_cases_that_change_come_or_go(dataset, trainer_class):
    image = dataset.image("tr_001", folder="imagesTr")
    content = image.read_bytes()
    write_image(voxels(image) + 1, image)
    refused("tr_001.nii.gz: this label or its image is not what was preprocessed: run", train, dataset, trainer_class)
    image.write_bytes(content)
    os.utime(image)  # another time, the same bytes
    train(dataset, trainer_class)
    shutil.copy(image, dataset.image("tr_007", folder="imagesTr"))
    shutil.copy(label_of(dataset, "tr_001"), label_of(dataset, "tr_007"))
    refused("Dataset901_Tiny: labelled case tr_007 is new and not preprocessed: run", train, dataset, trainer_class)
    dataset.image("tr_007", folder="imagesTr").unlink()
    image.unlink()
    refused(
        "Dataset901_Tiny: labelled case tr_001 was preprocessed but is missing now: run", train, dataset, trainer_class
    )


def test_a_touch_of_raw_files_asks_for_no_more_than_a_look(dataset):
    for file in dataset.raw.rglob("*.nii.gz"):
        os.utime(file)
    look = f"to compare its content, run nnunet_semiseg preprocess_unlabeled -d 901 -c 3d_fullres -plans_name {PLANS}"
    refused(f"tr_000.nii.gz: its time has changed since it was preprocessed: {look}$", train, dataset)
    before = {file: file.stat().st_mtime_ns for file in dataset.preprocessed.rglob("*.b2nd")}
    preprocess(dataset)
    train(dataset)
    assert before == {file: file.stat().st_mtime_ns for file in dataset.preprocessed.rglob("*.b2nd")}
    os.utime(label_of(dataset))
    shutil.rmtree(dataset.raw / "imagesUn")
    refused("tr_000.nii.gz: its time has changed .* --labeled_only$", train, dataset, SupervisedTrainer)


def test_what_nnunets_own_commands_made_is_looked_at_without_a_record(dataset):
    for file in dataset.preprocessed.glob("*__labeled.json"):
        file.unlink()
    train(dataset, SupervisedTrainer)
    newer = "is newer than the preprocessed case: to compare its content, run nnunet_semiseg preprocess_unlabeled"
    os.utime(label_of(dataset))
    refused(f"labelsTr/tr_000.nii.gz: {newer}", train, dataset, SupervisedTrainer)
    os.utime(dataset.image("tr_000", folder="imagesTr"))
    refused(f"imagesTr/tr_000_0000.nii.gz: {newer}", train, dataset, SupervisedTrainer)
    preprocess(dataset)  # it compares the voxels, and finds that nothing has changed
    train(dataset, SupervisedTrainer)
    correct(dataset, None)
    (dataset.preprocessed / f"{PLANS}_3d_fullres__labeled.json").unlink()
    refused("tr_000.nii.gz: this label, its image or the plans changed after preprocessing: run", preprocess, dataset)


def test_the_fingerprint_follows_the_labelled_cases(dataset, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    fingerprint = dataset.preprocessed / "dataset_fingerprint.json"

    def shapes():
        return len(json.loads(fingerprint.read_text())["shapes_after_crop"])

    for new in ("tr_007", "tr_008"):
        shutil.copy(dataset.image("tr_001", folder="imagesTr"), dataset.image(new, folder="imagesTr"))
        shutil.copy(label_of(dataset, "tr_001"), label_of(dataset, new))
        dataset.update_dataset_json(numTraining=int(new[-1]) - 4)
        (dataset.preprocessed / "splits_final.json").unlink()
        if new == "tr_008":  # as after nnU-Net's own command: the number of cases tells
            (dataset.preprocessed / "dataset_fingerprint__labeled.json").unlink()
        capsys.readouterr()
        dataset.plan(preprocess=new == "tr_007")
        why = {
            "tr_007": "made before labelled case tr_007 was added, changed or removed",
            "tr_008": "made from 3 labelled cases, but there are 4",
        }
        assert f"dataset_fingerprint.json: was {why[new]}: it is made again" in capsys.readouterr().out
    assert shapes() == 4
    capsys.readouterr()
    dataset.plan()
    assert "it is made again" not in capsys.readouterr().out
    train(dataset)
    content = json.loads(fingerprint.read_text())
    fingerprint.write_text(json.dumps(content | {"shapes_after_crop": content["shapes_after_crop"][1:]}))
    refused("dataset_fingerprint.json: made from 3 labelled cases, but 4 are preprocessed: run", train, dataset)
    fingerprint.write_text(json.dumps(content | {"shapes_after_crop": None}))
    refused('dataset_fingerprint.json: "shapes_after_crop" is None, but must be a list: run', train, dataset)
    fingerprint.write_text(fingerprint.read_text()[:50])
    refused(rf"dataset_fingerprint.json: not valid JSON .*: {PLAN_AGAIN}", train, dataset)
    dataset.plan(preprocess=False)
    assert "dataset_fingerprint.json: is damaged: it is made again" in capsys.readouterr().out and shapes() == 4


def test_labelled_data_of_other_plans(dataset):
    file = dataset.preprocessed / f"{PLANS}.json"
    plans = dataset.plans(PLANS)
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    file.write_text(json.dumps(plans))
    refused(
        f"{PLANS}_3d_fullres: was preprocessed with other plans: {PLANS} have changed since then",
        train,
        dataset,
        SupervisedTrainer,
    )
    refused("tr_000.nii.gz: this label, its image or the plans changed|.*tr_000.nii.gz: this", preprocess, dataset)


# --- half files and full disks


@pytest.mark.parametrize("suffix", [".b2nd", "_seg.b2nd", ".pkl"])
def test_half_preprocessed_files(dataset, suffix):
    for folder, case, command in (
        (preprocessed_folder(dataset), "tr_000", "plan_and_preprocess"),
        (dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled", "un_000", "preprocess_unlabeled"),
    ):
        file = folder / (case + suffix)
        whole = file.read_bytes()
        cut(file)
        refused(f"{case}{suffix}: damaged.*: run nnunet_semiseg {command} -d 901 -c 3d_fullres", train, dataset)
        file.write_bytes(whole)
    train(dataset)
    record = dataset.preprocessed / f"{PLANS}_3d_fullres__labeled.json"
    record.unlink()
    if suffix != ".pkl":
        cut(preprocessed_folder(dataset) / f"tr_000{suffix}")
        refused(f"tr_000{suffix}: half-written or damaged: run", train, dataset, SupervisedTrainer)


def change_bytes(file):
    """Other bytes, the same size and time of modification."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


@pytest.mark.parametrize("kind", [".b2nd", "_seg.b2nd", ".pkl", "gt_segmentations"])
def test_damage_that_no_size_and_no_time_tells(dataset, kind):
    unlabeled = dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled" / f"un_001{kind}"
    file = reference_of(dataset) if kind == "gt_segmentations" else preprocessed_folder(dataset) / f"tr_000{kind}"
    whole = file.read_bytes()
    change_bytes(file)
    for trainer_class in (MeanTeacherTrainer, SupervisedTrainer):
        command = "run nnunet_semiseg preprocess_unlabeled -d 901" if kind == "gt_segmentations" else PLAN_AGAIN
        refused(rf"{file.name}: .*: {command}", train, dataset, trainer_class)
    if kind == "gt_segmentations":  # a copy that is made again
        preprocess(dataset)
        assert file.read_bytes() == whole
        return
    file.write_bytes(whole)
    train(dataset)  # the content counts, not the time
    change_bytes(unlabeled)
    refused(rf"{unlabeled.name}: damaged.*: run nnunet_semiseg preprocess_unlabeled", train, dataset)
    (dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled.json").unlink()  # as a killed command leaves it
    preprocess(dataset)
    train(dataset)
    if kind == ".b2nd":
        voxel = blosc2.open(str(file), mode="a")
        voxel[0, 0, 0, 0] = voxel[0, 0, 0, 0] + 1
        refused(
            rf"tr_000.b2nd: damaged, its voxels are not those of \S*tr_000_0000.nii.gz: {PLAN_AGAIN}",
            preprocess,
            dataset,
        )


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("suffix", [".pkl", "_seg.b2nd"])
def test_what_cannot_be_read_in_a_training_is_one_line(ready, suffix, workers, monkeypatch, capfd):
    """Of data that nnU-Net's own command made, nothing is known."""
    dataset = ready(dims=2, size=32)
    record = dataset.preprocessed / f"{PLANS}_2d__labeled.json"
    record.unlink()
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    trainer = make_trainer(SupervisedTrainer, dataset)
    for file in (dataset.preprocessed / f"{PLANS}_2d").glob(f"*{suffix}"):
        file.write_bytes(b"x" * file.stat().st_size)
    folder = rf"\S*/{PLANS}_2d/tr_00\d.\*"
    line = rf"^{folder}: one of these files cannot be read \(.*\): run nnunet_semiseg plan_and_preprocess -d 901 -c 2d "
    with pytest.raises(UserError, match=line):
        trainer.run_training()
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_loaders_end_with_a_training_that_is_killed(tmp_path):
    """Two of them: both have what the parent writes to, for the second one was forked with it."""
    fork = multiprocessing.get_context("fork")
    loaders = fork.SimpleQueue()
    dataset = SimpleNamespace(identifiers=[], source_folder=str(tmp_path), load_case=lambda case: (None, {}))

    def load():
        ReadableCases(lambda folder: dataset, {}, fork.SimpleQueue())(str(tmp_path)).load_case("a")
        loaders.put(os.getpid())
        signal.pause()

    def train():
        for _ in range(2):
            fork.Process(target=load, daemon=True).start()
        signal.pause()

    training = fork.Process(target=train)
    training.start()
    files = [Path(f"/proc/{loaders.get()}/cmdline") for _ in range(2)]
    assert all(file.read_bytes() for file in files)
    training.kill()
    training.join()
    end = time.monotonic() + 60
    while any(file.exists() and file.read_bytes() for file in files):  # of one that has ended it is empty
        assert time.monotonic() < end
        time.sleep(0.02)


HALF = [
    '{"plans_hash": "', "[]", "{}", '{"plans_hash": 1, "cases": []}',
    '{"plans_hash": 1, "cases": {"a": []}}', '{"plans_hash": 1, "cases": {"a": {}}}',
    '{"plans_hash": "1", "cases": {"tr_000": {"files": [1, 2], "made": [1, 2, 3], "spread": [1]}}}',
    '{"plans_hash": "1", "cases": {"tr_000": {"files": [["a"]], "made": 3, "spread": null}}}',
]  # fmt: skip


@pytest.mark.parametrize("content", HALF)
def test_half_manifests_and_records(dataset, content):
    file = dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled.json"
    file.write_text(content)
    refused(r"__unlabeled.json: .*: run nnunet_semiseg preprocess_unlabeled -d 901", train, dataset)
    (dataset.preprocessed / f"{PLANS}_3d_fullres__labeled.json").write_text(content)
    preprocess(dataset)
    train(dataset)


@pytest.mark.parametrize("size", [20_000, 2_000, 200])
def test_a_full_disk_while_preprocessing_unlabelled_cases(dataset, size):
    shutil.rmtree(dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled")
    with no_room_for_files_of(size):
        refused(r"(un_00\d(\.pkl)?|__labeled.json): cannot be written \(.*\): make room", preprocess, dataset)
    assert not list(dataset.preprocessed.rglob("*.tmp"))
    assert not list((dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled").glob("*.pkl"))
    refused("", train, dataset)
    preprocess(dataset)
    train(dataset)


def test_a_full_disk_that_says_nothing(dataset, monkeypatch):
    """What is read back is not what was written."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    save = nnUNetDatasetBlosc2.save_case

    def save_other(data, *args, **kwargs):
        return save(data + (np.arange(data.shape[-1]) == 5), *args, **kwargs)

    monkeypatch.setattr(nnUNetDatasetBlosc2, "save_case", staticmethod(save_other))
    shutil.rmtree(dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled")
    refused(r"un_000: cannot be written \(what can be read from it is not what was written\)", preprocess, dataset)
    assert not list((dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled").iterdir())


@pytest.mark.parametrize("size", [50_000, 3_000, 600])
def test_a_full_disk_while_planning_and_preprocessing_labelled_cases(tiny_dataset, size):
    dataset = tiny_dataset(labeled=2, unlabeled=1)
    with no_room_for_files_of(size):
        refused(r"Dataset901_Tiny\S*: cannot be written \(.*\): make room", dataset.plan)
    assert not list(dataset.preprocessed.rglob("*.tmp")) and not preprocessed_folder(dataset).exists()
    dataset.plan()
    load_manifest(dataset.preprocessed, dataset.plans(PLANS), "3d_fullres", dataset.name)
    assert look_at_labeled(dataset.raw, dataset.preprocessed, dataset.plans(PLANS), "3d_fullres", 0)[0] > 0.3


def killed(*_, **__):
    raise RuntimeError("Some background worker is 6 feet under. Yuck. \nOK jokes aside.")


def test_workers_of_nnunets_that_are_killed(tiny_dataset, monkeypatch):
    dataset = tiny_dataset(labeled=2, unlabeled=1)
    monkeypatch.setattr("nnunet_semiseg.planning.steps.preprocess_dataset", killed)
    refused(f"{PLANS}_3d_fullres: a worker was killed, .* -np", dataset.plan)
    monkeypatch.setattr("nnunet_semiseg.planning.steps.extract_fingerprint_dataset", killed)
    refused("Dataset901_Tiny: a worker was killed, .* -npfp$", dataset.plan)


@pytest.mark.parametrize("processes", [0, 3])
def test_nnunet_is_given_at_least_one_process(tiny_dataset, monkeypatch, processes):
    dataset, given = tiny_dataset(labeled=2, unlabeled=1), []
    monkeypatch.setattr("nnunet_semiseg.planning.steps.preprocess_dataset", lambda *args: given.append(args[3]))
    dataset.plan(num_processes=[processes], labeled_only=True)
    assert given == [[processes or 1]]
