"""`accept`: unlabelled cases become labelled ones as a whole, whatever kills it; and back."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_image
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from PIL import Image
from training import make_trainer

from nnunet_semiseg import cli
from nnunet_semiseg.data.half_accepted import FOLDER, journals
from nnunet_semiseg.data.known_reviews import known_reviews, remember
from nnunet_semiseg.data.unlabeled_cases import find_unlabeled_cases
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import DiskError, read_json, write_json
from nnunet_semiseg.review import journal, preprocessing
from nnunet_semiseg.review.accept import accept, extended, undo
from nnunet_semiseg.review.labels import NewLabel, digest_of, problems_of
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer


def snapshot(folder: Path, but: str = "") -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if not but or but not in f.parts}


def cubes(size: int = 24) -> np.ndarray:
    label = np.zeros([size] * 3, np.uint8)
    label[4:20, 4:20, 4:20] = 1
    label[8:12, 8:12, 8:12] = 2
    return label


@pytest.fixture
def dataset(ready):
    dataset = ready(labeled=2, unlabeled=3)
    shutil.copy(dataset.preprocessed / "splits_final.json", dataset.raw)
    return dataset


@pytest.fixture
def corrected(dataset, tmp_path):
    """A folder with a label of un_001, on its image's grid."""
    folder = tmp_path / "corrected"
    folder.mkdir()
    write_image(cubes(), folder / "un_001.nii.gz")
    return folder


def test_a_case_becomes_a_labelled_one_and_an_unlabelled_one_again(dataset, corrected):
    raw, preprocessed = snapshot(dataset.raw), snapshot(dataset.preprocessed)
    image = raw["imagesUn/un_001_0000.nii.gz"]

    accept(901, corrected, show_progress=False)

    assert sorted(os.listdir(dataset.raw / "imagesUn")) == ["un_000_0000.nii.gz", "un_002_0000.nii.gz"]
    now = snapshot(dataset.raw, but=FOLDER)
    assert now.keys() - raw.keys() == {"imagesTr/un_001_0000.nii.gz", "labelsTr/un_001.nii.gz"}
    assert now["imagesTr/un_001_0000.nii.gz"] == image
    assert now["labelsTr/un_001.nii.gz"] == (corrected / "un_001.nii.gz").read_bytes()
    assert dataset.dataset_json["numTraining"] == 3
    assert dataset.dataset_json["semiseg"] == {"accepted": {"un_001": {"from": "human"}}}
    for folder in (dataset.raw, dataset.preprocessed):
        first, second = json.loads((folder / "splits_final.json").read_text())
        assert first == {"train": ["tr_001", "un_001"], "val": ["tr_000"]}
        assert second == {"train": ["tr_000", "un_001"], "val": ["tr_001"]}
    (folder,) = dataset.preprocessed.glob("*3d_fullres")
    assert {f.name for f in folder.glob("un_*")} == {"un_001.b2nd", "un_001_seg.b2nd", "un_001.pkl"}
    assert not list(dataset.preprocessed.glob("*3d_fullres__unlabeled/un_001*"))
    trainer = make_trainer(MeanTeacherTrainer, dataset, fold=0)  # it refuses data that is not as its records say
    trainer.initialize()
    assert trainer.do_split() == (["tr_001", "un_001"], ["tr_000"])

    accepted = snapshot(dataset.raw)
    undo(901)
    assert snapshot(dataset.raw) == raw
    assert snapshot(dataset.preprocessed) == preprocessed
    accept(901, corrected, show_progress=False)
    assert snapshot(dataset.raw, but=FOLDER) == {k: v for k, v in accepted.items() if not k.startswith(FOLDER)}


def kill_at(count: int, function, *args) -> bool:
    """Run a function in a process that dies before its `count`-th change of a name; whether it did."""
    if (child := os.fork()) == 0:
        calls = iter(range(count))

        def dying(change):
            def instead(*words, **options):
                if next(calls, None) is None:
                    os._exit(9)
                return change(*words, **options)

            return instead

        os.replace, os.rename = dying(os.replace), dying(os.rename)
        try:
            function(*args)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.fixture
def raw_only(tiny_dataset):
    """Raw data of two channels, and a folder with the label of a case."""
    dataset = tiny_dataset(labeled=2, unlabeled=2, channels=2)
    write_json([{"train": ["tr_000"], "val": ["tr_001"]}], dataset.raw / "splits_final.json")
    folder = dataset.raw.parent / "corrected"
    folder.mkdir()
    write_image(cubes(), folder / "un_000.nii.gz")
    return dataset, folder


def test_whatever_is_killed_is_ended_by_the_next_call(raw_only):
    dataset, folder = raw_only
    before = snapshot(dataset.raw)
    accept(901, folder)
    after = snapshot(dataset.raw, but=FOLDER)
    undo(901)
    assert snapshot(dataset.raw) == before

    accepted = []  # whether it was, by the change of a name at which it was killed
    while kill_at(len(accepted), accept, 901, folder):
        if any("going" in file.read_text() for file in journals(dataset.raw)):
            with pytest.raises(UserError, match="was interrupted: finish it with nnunet_semiseg accept -d 901"):
                find_unlabeled_cases(dataset.raw, dataset.dataset_json)
        with suppress(UserError):  # there may be nothing to be ended
            accept(901)
        accepted.append(snapshot(dataset.raw, but=FOLDER) == after)
        if accepted[-1]:
            undo(901)
        assert snapshot(dataset.raw) == before
    # at the end a label, two images, two descriptions, and the state of the journal
    assert accepted[-6:] == [True] * 6 and not any(accepted[:-6])

    undone = []  # what was accepted in the end
    while kill_at(len(undone), undo, 901):
        with suppress(UserError):
            accept(901)
        undone.append(snapshot(dataset.raw) == before)
        if not undone[-1]:
            assert snapshot(dataset.raw, but=FOLDER) == after
            undo(901)
        accept(901, folder)
    # killed before the journal says so, it is not undone
    assert undone == [False] + [True] * 5


class Killed(BaseException):
    pass


def test_whatever_is_killed_among_preprocessed_data_is_ended_by_the_next_call(dataset, corrected, monkeypatch):
    def both() -> tuple[dict[str, bytes], dict[str, bytes]]:
        return snapshot(dataset.raw, but=FOLDER), snapshot(dataset.preprocessed, but=FOLDER)

    def dies_at(count: int, function, *args) -> bool:
        """Whether a function wants to change more than `count` names. It may not, as if it were killed."""
        calls = iter(range(count))

        def dying(change):
            def instead(source, *words):
                if next(calls, None) is None:
                    raise Killed
                return change(source, *words)

            return instead

        with monkeypatch.context() as patch:
            for name in ("replace", "rename"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                function(*args)
            except Killed:
                return True
        return False

    roots = {"raw": dataset.raw, "preprocessed": dataset.preprocessed}
    before = both()
    with monkeypatch.context() as patch:  # nothing is moved yet, all is prepared
        patch.setattr(journal, "finish", lambda *_: None)
        accept(901, corrected, show_progress=False)
    prepared = {root: shutil.copytree(folder / FOLDER, corrected / root) for root, folder in roots.items()}
    accept(901)
    after = both()
    undo(901)
    assert both() == before

    steps = []  # what there was when it was killed at each change of a name
    while not steps or steps[-1] != "all":
        for root, folder in roots.items():
            shutil.copytree(prepared[root], folder / FOLDER)
        (change,) = journals(dataset.raw)
        is_dead = dies_at(len(steps), journal.finish, change, roots)
        steps.append("all" if not is_dead else "none" if both() == before else "done" if both() == after else "half")
        images = [dataset.raw / folder / "un_001_0000.nii.gz" for folder in ("imagesUn", "imagesTr")]
        assert sum(file.exists() for file in images) == 1
        with suppress(UserError):  # there may be nothing to be ended
            accept(901)
        assert both() == after
        dies_at(len(steps), undo, 901)  # the first name is that of the journal
        with suppress(UserError):
            accept(901)
        assert both() == before
    # two copies of the label, the image, twice two descriptions, three files in two folders, record, manifest,
    # fingerprint, and the state of the journal
    assert steps == ["none", *["half"] * 15, "done", "all"]


def labelled(folder: Path, case: str, label: np.ndarray, **header) -> Path:
    folder.mkdir(exist_ok=True)
    write_image(label, folder / f"{case}.nii.gz", **header)
    return folder


def refused(*args) -> str:
    with pytest.raises(UserError) as error:
        accept(901, *args)
    return str(error.value)


def test_wrong_labels_are_refused_in_one_line_each(raw_only, tmp_path):
    dataset, _ = raw_only
    before = snapshot(dataset.raw)
    wrong = labelled(tmp_path / "wrong", "un_000", cubes(), spacing=(1.0, 1.0, 2.0))
    labelled(wrong, "un_001", np.where(cubes() == 2, 3, cubes()).astype(np.uint8))
    labelled(wrong, "un_007", cubes())
    labelled(wrong, "tr_000", cubes())
    first, second, third, fourth = refused(wrong).splitlines()
    assert f"{wrong}/tr_000.nii.gz: tr_000 is a labelled case already" in first
    assert f"{wrong}/un_000.nii.gz: spacing (1, 1, 2) differs from (1, 1, 1.5) in {dataset.raw}/imagesUn" in second
    assert f"{wrong}/un_001.nii.gz: has the value 3, but dataset.json names 0, 1, 2" in third
    assert '"ignore": 3' in third
    assert f"{wrong}/un_007.nii.gz: un_007 is not a case of {dataset.raw}/imagesUn" in fourth
    (tmp_path / "empty").mkdir()
    assert "has no label CASE.nii.gz" in refused(tmp_path / "empty")
    assert refused(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such folder: name the right folder with -i"
    assert "nothing was accepted" in undo_refused()
    assert snapshot(dataset.raw) == before


def test_labels_in_another_format_are_not_left_out(raw_only):
    dataset, folder = raw_only
    before = snapshot(dataset.raw)
    right = folder / "un_000.nii.gz"
    for name in ("un_001.seg.nrrd", "un_001.json", "un_000.nii", "notes.nrrd"):
        (folder / name).touch()
    fix = "its ending is not .nii.gz, that of the data set: save it as"
    assert refused(folder) == f"{folder}/un_001.seg.nrrd: {fix} un_001.nii.gz"
    right.unlink()
    assert refused(folder).splitlines()[0] == f"{folder}/un_000.nii: {fix} un_000.nii.gz"
    assert snapshot(dataset.raw) == before


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_a_label_with_a_fourth_dimension_is_refused(shift, raw_only, tmp_path):
    _, folder = raw_only
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])  # of images without origin, whose axes ITK and NIfTI see differently
    affine[0, 3] = shift
    file = folder / "un_000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(cubes().T[..., None], affine), file)
    assert refused(folder).startswith(f"{file}: has 4 dimensions instead of the 3 in ")


def test_a_label_of_an_image_with_all_channels_in_one_file_is_compared_with_its_grid(tmp_path):
    image = tmp_path / "image.nii.gz"
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 24, 24, 2), np.float32), affine), image)
    labels = {"labels": {"background": 0, "kidney": 1, "tumour": 2}}
    file = labelled(tmp_path, "one", cubes()) / "one.nii.gz"
    assert problems_of(NewLabel("one", file, "human"), [str(image)], labels, SimpleITKIO) == []
    labelled(tmp_path, "one", cubes(), origin=(5.0, 0.0, 0.0))
    (line,) = problems_of(NewLabel("one", file, "human"), [str(image)], labels, SimpleITKIO)
    assert line.startswith(f"{file}: origin (5, 0, 0) differs from (0, 0, 0) in {image}: ")


def test_a_refusal_on_the_way_leaves_nothing(raw_only):
    dataset, folder = raw_only
    (dataset.raw / "splits_final.json").write_text("[1]")
    before = snapshot(dataset.raw)
    assert "splits_final.json: fold 0 is not a JSON object" in refused(folder)
    assert snapshot(dataset.raw) == before


def test_a_preprocessed_case_that_cannot_be_read_back_is_the_fault_of_the_disk(dataset, corrected, monkeypatch):
    def damaged(folder, case):
        raise UserError(f"{case}.b2nd: half-written")

    monkeypatch.setattr(preprocessing, "read_arrays", damaged)
    before = snapshot(dataset.raw)
    with pytest.raises(DiskError, match=r"/un_001: cannot be written \(un_001.b2nd: half-written\): make room"):
        accept(901, corrected, show_progress=False)
    assert snapshot(dataset.raw) == before


def undo_refused() -> str:
    with pytest.raises(UserError) as error:
        undo(901)
    return str(error.value)


def test_each_label_says_where_it_comes_from(raw_only, tmp_path):
    dataset, folder = raw_only
    review = dataset.results / "review" / "A__B__fold_0"
    for case in ("un_000", "un_001", "tr_000"):  # the last one was accepted some time ago
        (review / "masks").mkdir(parents=True, exist_ok=True)
        (review / "cases").mkdir(exist_ok=True)
        write_image(cubes(), review / "masks" / f"{case}.nii.gz")
        write_json({"mask": digest_of(cubes())}, review / "cases" / f"{case}.json")
    (line,) = refused(folder).splitlines()
    assert line.startswith(f"{folder}/un_000.nii.gz: is the unchanged prediction: correct it, or")
    assert f"--all-of {review}" in line

    elsewhere = Path(shutil.move(review, dataset.raw.parent / "mine"))  # as with -o
    remember(dataset.results, elsewhere, review.name)
    remember(dataset.results, dataset.raw.parent / "gone", review.name)
    assert f"--all-of {elsewhere}" in refused(folder)
    shutil.move(elsewhere, review)

    changed = cubes().astype(np.float32)  # as napari saves it
    changed[0, 0, 0] = 1
    labelled(folder, "un_000", changed)
    accept(901, folder, review)
    origins = {"un_000": {"from": "corrected", "review": review.name}}
    origins |= {"un_001": {"from": "prediction", "review": review.name}}
    assert dataset.dataset_json["semiseg"]["accepted"] == origins
    written = sitk.ReadImage(str(dataset.raw / "labelsTr" / "un_000.nii.gz"))
    assert written.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    assert np.array_equal(sitk.GetArrayFromImage(written), changed)


def test_reviews_elsewhere_are_known_once_and_in_the_order_of_their_pages(tmp_path):
    results, model = tmp_path / "results", "A__B__fold_0"
    for time, folder in enumerate([results / "review" / model, tmp_path / "x", tmp_path / "y"], 1):
        folder.mkdir(parents=True)
        (folder / "review.html").touch()
        os.utime(folder / "review.html", (9 - time, 9 - time))
    for folder in (tmp_path / "x", tmp_path / "y", tmp_path / "y" / ".." / "x", results / "review" / model):
        remember(results, folder, "C__D__fold_1")
    assert read_json(results / "review" / "elsewhere.json", "").keys() == {f"{tmp_path}/x", f"{tmp_path}/y"}
    found = {tmp_path / "y": "C__D__fold_1", tmp_path / "x": "C__D__fold_1", results / "review" / model: model}
    assert list(known_reviews(results).items()) == list(found.items())
    shutil.rmtree(tmp_path / "y")
    assert tmp_path / "y" not in known_reviews(results)
    assert sorted(os.listdir(results / "review")) == [model, "elsewhere.json"]  # no lock stays


def test_voxels_that_nobody_looked_at_are_ignored(raw_only, tmp_path):
    dataset, _ = raw_only
    partial = cubes()
    partial[12:] = 3
    folder = labelled(tmp_path / "partial", "un_000", partial)
    assert 'add "ignore": 3 to its labels and plan again' in refused(folder)
    dataset.update_dataset_json(labels={"background": 0, "kidney": 1, "tumour": 2, "ignore": 3})
    accept(901, folder)
    written = sitk.ReadImage(str(dataset.raw / "labelsTr" / "un_000.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(written), partial)


def test_a_label_of_another_size_is_told_what_is_wrong_and_nothing_else(tmp_path):
    for name, size in (("image", 8), ("label", 9)):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / f"{name}.png")
    label, labels = NewLabel("a", tmp_path / "label.png", "human"), {"background": 0, "a": 1}
    (line,) = problems_of(label, [str(tmp_path / "image.png")], {"labels": labels}, NaturalImage2DIO)
    assert line.endswith(f"that of the image: replace the label or take its case out of {tmp_path.name}")


def test_what_was_changed_since_is_not_taken_back(raw_only):
    dataset, folder = raw_only
    accept(901, folder)
    label = dataset.raw / "labelsTr" / "un_000.nii.gz"
    write_image(cubes() * 0, label)
    copy = dataset.raw / FOLDER / "0001" / "after" / "raw" / "labelsTr" / label.name
    error = undo_refused()
    assert error.startswith(f"{label}: was changed or removed after accept") and f"(a copy is {copy})" in error
    shutil.copy(copy, label)
    undo(901)
    assert not label.exists()


def test_validation_cases_stay_where_they_are():
    folds = [{"train": ["b"], "val": ["a"]}, {"train": ["a"], "val": ["b", "c"]}]
    assert extended(folds, ["c", "d"]) == [
        {"train": ["b", "c", "d"], "val": ["a"]},
        {"train": ["a", "d"], "val": ["b", "c"]},
    ]


def test_the_command_accepts_and_takes_back(raw_only, capsys):
    _, folder = raw_only
    assert cli.main(["accept", "-d", "901", "-i", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "un_000: human\nnewly labelled cases: 1;" in said and "\nnext: nnunet_semiseg plan_and_preprocess" in said
    assert cli.main(["accept", "-d", "901", "--undo", "-i", "x"]) == 1
    assert cli.main(["accept", "-d", "901", "--undo"]) == 0
    assert "unlabelled again: un_000" in capsys.readouterr().out
