"""Files from others: headers that reach out or lie, archives that grow, checkpoints that run code, names in reports."""

import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from conftest import write_image
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from test_raw_datasets import OPTIONS, convert, save
from training import make_trainer

from nnunet_semiseg import archives
from nnunet_semiseg.data import headers
from nnunet_semiseg.data.headers import data_files, flat_problem, header_problem
from nnunet_semiseg.dataset_conversion import h5
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation import figures, worker
from nnunet_semiseg.evaluation.metrics import evaluate_case
from nnunet_semiseg.evaluation.page import Report, Section, write, write_csv
from nnunet_semiseg.text.prompts import read_prompts
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training import checkpoint as checkpoints

# ---------------------------------------------------------------------------------------------------------- headers

META = "ObjectType = Image\nNDims = 3\nDimSize = 10 10 10\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n"
NRRD = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 10 10 10\nspacings: 1 1 1\nencoding: raw\n"


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("a.mhd", f"{META}ElementDataFile = a.raw\n", ["a.raw"]),
        ("a.mha", f"{META}\nElementDataFile : ../a.raw\n", ["../a.raw"]),
        ("a.mhd", f"{META}ElementDataFile = LIST\na.raw\n/b.raw\n", ["a.raw", "/b.raw"]),
        ("a.mhd", f"{META}ElementDataFile = /s/%03d.raw 1 10 1\n", ["/s/%03d.raw"]),
        ("a.mha", f"{META}ElementDataFile = LOCAL\n/x\n", []),
        ("a.nhdr", f"{NRRD}data file: /s/x.raw\n", ["/s/x.raw"]),
        ("a.nrrd", f"{NRRD}DataFile: LIST 2\r\n/s/x.raw\r\n", ["/s/x.raw"]),
        ("a.nrrd", f"{NRRD}\ndata file: x\n", []),
        ("a.nii.gz", "ElementDataFile = x", []),
    ],
)
def test_which_files_a_header_names(name, text, found, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    assert list(data_files(tmp_path / name)) == found


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    return tmp_path / "raw" / "Dataset801_MyData"


@pytest.mark.parametrize("ending, text, key", [("mhd", META, "ElementDataFile ="), ("nhdr", NRRD, "data file:")])
@pytest.mark.parametrize("packed", [True, False])
def test_voxels_from_outside_get_into_no_data_set(ending, text, key, packed, tmp_path, raw):
    (tmp_path / "secret.raw").write_bytes(b"TOPSECRET!" * 100)
    download = tmp_path / "download"
    for case, data in (("a", tmp_path / "secret.raw"), ("b", "b.raw"), ("c", "../images/b.raw")):
        (download / "images").mkdir(parents=True, exist_ok=True)
        (download / "images" / f"{case}.{ending}").write_text(f"{text}{key} {data}\n")
    (download / "images" / "b.raw").write_bytes(bytes(range(250)) * 4)
    for case in "abc":
        save(np.ones((10, 10, 10), np.uint8), download / "labels" / f"{case}.nii.gz", spacing=(1, 1, 1))
    source = download
    if packed:
        source = tmp_path / "d.zip"
        with zipfile.ZipFile(source, "w") as file:
            for path in download.rglob("*.*"):
                file.write(path, path.relative_to(download))
    with pytest.raises(UserError) as refused:
        convert(source, 801, **OPTIONS)
    first, *_ = str(refused.value).splitlines()
    assert first.startswith("case a: ") and f"a.{ending}: its voxels are in {tmp_path}/secret.raw" in first
    assert not list(raw.glob("*/a*.nii.gz")) and len(list(raw.glob("imagesTr/[bc]_0000.nii.gz"))) == 2


def test_voxels_from_outside_are_not_preprocessed(tiny_dataset):
    dataset = tiny_dataset(labeled=2, unlabeled=1, file_ending=".nrrd")
    for file in dataset.raw.rglob("*.nii.gz"):
        sitk.WriteImage(sitk.ReadImage(file), str(file).replace(".nii.gz", ".nrrd"))
        file.unlink()
    dataset.image("un_000").write_text(NRRD + "data file: /etc/passwd\n")
    with pytest.raises(UserError, match=r"un_000_0000.nrrd: its voxels are in /etc/passwd, outside of"):
        dataset.plan()
    assert not list(dataset.preprocessed.glob("*__unlabeled/*"))


def test_a_header_that_claims_more_than_there_is(tmp_path, monkeypatch):
    file = tmp_path / "a.mha"
    file.write_text(META.replace("10 10 10", "100000 100000 100000") + "ElementDataFile = LOCAL\n")
    problem = header_problem(file, tmp_path)
    assert problem and problem.startswith("its header claims 100000 x 100000 x 100000 voxels, 931323 GiB, but")
    file.write_text(META + "ElementDataFile = LOCAL\n")
    monkeypatch.setattr(headers, "total_memory", lambda: 1000)
    assert header_problem(file, tmp_path) is None
    monkeypatch.setattr(headers, "total_memory", lambda: 999)
    assert "claims 10 x 10 x 10" in str(header_problem(file, tmp_path))


def test_complex_images_are_refused(tmp_path):
    image = sitk.GetImageFromArray(np.ones((4, 4, 4), np.complex64))
    sitk.WriteImage(image, tmp_path / "a.nii.gz")
    assert "complex numbers" in str(header_problem(tmp_path / "a.nii.gz", tmp_path))
    write_image(np.ones((4, 4, 4), np.float32), tmp_path / "b.nii.gz")
    assert header_problem(tmp_path / "b.nii.gz", tmp_path) is None


def test_a_single_slice_among_volumes():
    volumes, pictures = ({"original_median_shape_after_transp": shape} for shape in ([20, 30, 30], [1, 30, 30]))
    assert "1 x 30 x 30, a single slice" in str(flat_problem((1, 30, 30), volumes))
    assert flat_problem((20, 30, 30), volumes) is None and flat_problem((1, 30, 30), pictures) is None


def test_a_single_slice_is_not_preprocessed(ready):
    dataset = ready(labeled=2, unlabeled=2)
    write_image(np.random.default_rng(0).random((1, 24, 24), np.float32), dataset.image("un_001"))
    from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled

    with pytest.raises(UserError, match=r"un_001_0000.nii.gz: has the shape 1 x 24 x 24, a single slice"):
        preprocess_unlabeled(901, ["3d_fullres"], "nnUNetSemiSegSmallPlans", 0, show_progress_bar=False)


def test_an_h5_file_whose_array_is_elsewhere_or_too_large(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(b"TOPSECRET!" * 100)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["image"] = np.ones((2, 2, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["own"] = np.ones((2, 3, 4))
        file["link"] = h5py.ExternalLink("other.h5", "image")
        file["soft"] = h5py.SoftLink("/link")
        file.create_dataset("raw", (10, 10, 10), "u1", external=[(str(tmp_path / "secret"), 0, 1000)])
        layout = h5py.VirtualLayout((2, 2, 2), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "image", (2, 2, 2))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("large", (100_000,) * 3, "u1", chunks=(100,) * 3)
    assert h5.read_h5(tmp_path / "a.h5", "own", [1]).GetSize() == (2, 3, 4)
    for key in ("link", "soft", "raw", "virtual"):
        with pytest.raises(UserError, match=f"a.h5: `{key}` is no array, or is read from another file"):
            h5.read_h5(tmp_path / "a.h5", key, [1])
    with pytest.raises(UserError, match="a.h5: `large` claims 931323 GiB"):
        h5.read_h5(tmp_path / "a.h5", "large", [1])


@pytest.mark.parametrize("labels, words", [(["ignore"], "this names no class"), ([""], "a name is empty")])
def test_names_of_classes_that_are_none(labels, words, tmp_path, raw):
    save(np.ones((4, 4, 4), np.uint8), tmp_path / "d" / "images" / "a.nii.gz")
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "d", 801, **OPTIONS | {"labels": labels})


# --------------------------------------------------------------------------------------------------------- archives


@pytest.fixture
def grows(tmp_path, monkeypatch) -> Path:
    """An archive of two cases and of zeros: 1.4 MB from 2 kB."""
    monkeypatch.setattr(archives, "HARMLESS", 1_000_000)
    save(np.ones((4, 4, 4), np.uint8), tmp_path / "a.nii.gz")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for folder in ("images", "labels"):
            file.write(tmp_path / "a.nii.gz", f"{folder}/a.nii.gz")
        file.writestr("zeros.bin", bytes(1_400_000))
    return tmp_path / "bomb.zip"


def test_an_archive_that_grows_is_refused_or_allowed(grows, raw):
    with pytest.raises(UserError, match=r"bomb.zip: would unpack to 0.0 GB, \d{3} times .* --max-size 1 "):
        convert(grows, 801, **OPTIONS)
    assert list(raw.parent.iterdir()) == []
    with pytest.raises(UserError, match="bomb.zip: would unpack to"):
        convert(grows, 801, **OPTIONS, max_size=0.0014)
    assert convert(grows, 801, **OPTIONS, max_size=0.0015) == raw


def test_the_size_that_a_tar_needs_is_named(tmp_path):
    """Not the size at which the limit is passed: then the next attempt would fail again."""
    archive = tmp_path / "d.tar"
    with open(archive, "wb") as file:
        for name in "abc":
            info = tarfile.TarInfo(name)
            info.size = 1_000_000_000  # a multiple of 512; a hole in the file
            file.write(info.tobuf())
            file.seek(info.size, os.SEEK_CUR)
        file.truncate()
    with pytest.raises(UserError, match="d.tar: would unpack to 3.0 GB, .* --max-size 3 "):
        archives.unpack(archive, tmp_path, 1_500_000_000)


def test_an_archive_that_is_larger_than_the_disk(grows, raw, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_400_000))
    with pytest.raises(UserError, match="bomb.zip: unpacks to .* GB free"):
        convert(grows, 801, **OPTIONS, max_size=1)


def test_a_dry_run_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "new" / "raw"))
    for folder in ("images", "labels"):
        save(np.ones((4, 4, 4), np.uint8), tmp_path / "d" / folder / "a.nii.gz")
    convert(tmp_path / "d", 801, **OPTIONS, dry_run=True)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        for path in (tmp_path / "d").rglob("*.gz"):
            file.write(path, path.relative_to(tmp_path / "d"))
    convert(tmp_path / "d.zip", 801, **OPTIONS, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "d.zip"]


# ------------------------------------------------------------------------------------------------------ checkpoints


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("content", ["evil", "cut", "list", "text", "missing"])
@pytest.mark.parametrize("trainer_class", [MeanTeacherTrainer, SupervisedTrainer])
def test_a_checkpoint_that_is_none_runs_no_code(trainer_class, content, ready, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(trainer_class, ready(labeled=2, unlabeled=2))
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    if content != "missing":
        trainer.save_checkpoint(str(file))
        whole = torch.load(file, weights_only=False)
        torch.save({"evil": whole | {"x": Evil()}, "list": [1]}.get(content, whole), file)
    if content == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    if content == "text":
        file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError) as refused:
        trainer.load_checkpoint(str(file))
    words = {
        "evil": "holds ", "cut": "cannot be read (", "list": "is not an nnU-Net checkpoint", "text": "cannot be read",
        "missing": "no such file",
    }  # fmt: skip
    assert f"checkpoint_latest.pth: {words[content]}" in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("ran").exists()
    if content == "evil":
        assert f"can run code that is in it: if you trust where it comes from, export {checkpoints.TRUST}=1" in str(
            refused.value
        )
        monkeypatch.setenv(checkpoints.TRUST, "1")
        trainer.load_checkpoint(str(file))
        assert Path("ran").exists()


@pytest.mark.parametrize("trainer_class", [MeanTeacherTrainer, SupervisedTrainer])
def test_a_checkpoint_of_another_network(trainer_class, ready, tmp_path):
    trainer = make_trainer(trainer_class, ready(labeled=2, unlabeled=2))
    trainer.initialize()
    file = tmp_path / "c.pth"
    trainer.save_checkpoint(str(file))
    content = torch.load(file, weights_only=False)
    content["network_weights"].popitem()
    torch.save(content, file)
    with pytest.raises(UserError, match="c.pth: does not fit this training .RuntimeError: .*Missing key") as refused:
        trainer.load_checkpoint(str(file))
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------- reports


def test_cells_that_begin_like_a_formula(tmp_path):
    table = pd.DataFrame({"case": ["=1+1", "-2", "@a", "+b", "-c", "plain"], "=dice": [-0.5, 1, 2, 3, 4, 5]})
    write_csv(table, tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines == ["case,'=dice", "'=1+1,-0.5", "-2,1.0", "'@a,2.0", "'+b,3.0", "'-c,4.0", "plain,5.0"]


def test_markdown_has_no_tags(tmp_path):
    evil = "<script>alert(1)</script>"
    write(Report(evil, {evil: evil}, [Section(evil, [evil], [evil], [[evil]])], [evil], [evil]), tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "<script>" not in text and text.count("&lt;script&gt;") >= 8


def test_a_class_may_have_dollars_in_its_name():
    scores = pd.DataFrame({"method": "$m_1$", "label": ["$\\frac$", "b"], "case": "c", "dice": [0.5, 0.6]})
    svg = figures.box_plots(scores, "dice", "Dice", "x").svg
    assert "$\\frac$" in svg and "$m_1$" in svg


# ---------------------------------------------------------------------------------- messages that name their file


def test_every_message_on_prompts_has_the_path():
    for labels in ({"a": 1}, {"background": 0, "a": 1, "b": 1}):
        with pytest.raises(UserError, match=r"^/x/dataset.json: "):
            read_prompts({"labels": labels}, "/x/dataset.json")


def test_a_damaged_checkpoint_is_named_where_it_predicts(tmp_path):
    (tmp_path / "model" / "fold_0").mkdir(parents=True)
    (tmp_path / "model" / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK")
    with pytest.raises(
        UserError, match="fold_0/checkpoint_final.pth: cannot be read .*: remove it and continue the training"
    ):
        worker.predict(str(tmp_path / "model"), "0", [], str(tmp_path / "out"), "cpu", False, 0.0, {})


def test_a_damaged_prediction_is_named(tmp_path):
    for name in ("p", "r"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="p.nii.gz: cannot be read .*: predict this case again") as refused:
        evaluate_case(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz", {"background": 0, "a": 1}, SimpleITKIO)
    assert "\n" not in str(refused.value)
