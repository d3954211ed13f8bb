"""Every data set's converter, on a miniature of its official download with all its quirks."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest
import SimpleITK as sitk
from conftest import TinyDataset
from training import make_trainer

from nnunet_semiseg.dataset_conversion import hecktor
from nnunet_semiseg.dataset_conversion.pancreas_ct import choose_orientation
from nnunet_semiseg.dataset_conversion.qata_cov19 import read_mask
from nnunet_semiseg.discovery import load_module, module_names
from nnunet_semiseg.raw_datasets import Read, Source, assign, published_split
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer

SIZE = 24


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))


def volume(seed: int, value: int = 1, shape=(SIZE,) * 3) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright cuboid off the middle (every axis is told from its mirror image), and its label."""
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 8, n // 2) for n in shape)] = value
    noise = np.random.default_rng(seed).normal(0, 10, shape)
    return (100 + 60 * (label > 0) + noise).astype(np.int16), label


def save(array: np.ndarray, file: Path, spacing=(1.0, 1.0, 1.5), is_vector=False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array, isVector=is_vector)
    if image.GetDimension() == 3:
        image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def convert(name: str, download: Path, **kwargs) -> Path:
    kwargs = {"num_processes": 0, "show_progress_bar": False} | kwargs
    return load_module("dataset_conversion", name).convert(download, 801, **kwargs)


def find(name: str, download: Path, **options) -> Source:
    return load_module("dataset_conversion", name).find_cases(download, **options)


def touch(folder: Path, *names: str) -> None:
    """Empty files, where only names matter."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def parts(dataset: Path) -> dict[str, set[str]]:
    """Case names by folder, from whatever the ending is."""
    return {
        part: {file.name.rpartition("_")[0] for file in (dataset / f"images{part}").glob("*_0000.*")}
        for part in ("Tr", "Un", "Ts")
        if (dataset / f"images{part}").is_dir()
    }


# ------------------------------------------------------------------------------------------------- miniatures


def la2018(folder: Path) -> dict:
    split = published_split("la2018")
    for i, name in enumerate(split["train"][:4] + split["test"][:1]):
        image, label = volume(i, 255)
        where = folder / ("Testing Set" if name in split["test"] else "Training Set") / name
        save(image.astype(np.uint8), where / "lgemri.nrrd", (0.625,) * 3)
        save(label, where / "laendo.nrrd", (0.625,) * 3)
    return {"num_labeled": 2}


def h5(folder: Path) -> dict:
    names = published_split("la2018")["train"][:5]
    for i, name in enumerate(names):
        image, label = volume(i)
        (folder / name).mkdir(parents=True)
        with h5py.File(folder / name / "mri_norm2.h5", "w") as file:
            file["image"], file["label"] = (image.T - 100) / 50, label.T
    (folder / "train.list").write_text("\n".join(names[:4]) + "\n")
    (folder / "test.list").write_text(names[4] + "\n")
    return {"num_labeled": 2}


def save_dicom(array: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True)
    for z, plane in enumerate(array):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing((0.8, 0.8))
        tags = {"0008|0060": "CT", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4", "0018|0050": "1.5"}
        tags |= {"0020|0032": f"0\\0\\{1.5 * z}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(z)}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{(7 * z) % 101:03d}.dcm"))  # names do not follow positions
        writer.Execute(image)


def pancreas_ct(folder: Path) -> dict:
    numbers = [name[-4:] for name in published_split("pancreas_ct")["train"][:4]]
    numbers += [name[-4:] for name in published_split("pancreas_ct")["test"][:1]]
    for i, number in enumerate(numbers):
        image, label = volume(i)
        body = np.where(label > 0, image - 60, np.random.default_rng(i).choice([-900, 20, 250], image.shape))
        save_dicom(body.astype(np.int16), folder / f"PANCREAS_{number}" / "11-24-2015" / "Pancreas-63502")
        save(label[:, ::-1] if i % 2 else label, folder / "TCIA_pancreas_labels" / f"label{number}.nii.gz", (9, 9, 9))
    return {"num_labeled": 2}


def brats(folder: Path, names: list[str], odd: str = "") -> None:
    for i, name in enumerate(names):
        image, label = volume(i, 2)
        label[5:8, 5:8, 5:8], label[8:10, 5:8, 5:8] = 1, 4
        for c, sequence in enumerate(("flair", "t1", "t1ce", "t2")):
            save(image + 10 * c, folder / name / f"{name}_{sequence}.nii.gz")
        # the odd one lies as .nii in a download of .nii.gz or .nii
        save(label, folder / name / ("W39_1998.09.19_Segm.nii" if name == odd else f"{name}_seg.nii.gz"))


def brats2019(folder: Path) -> dict:
    split = published_split("brats2019")
    brats(folder / "HGG", split["train"][:3] + split["val"][:1])
    brats(folder / "LGG", split["train"][3:5] + split["test"][:1])
    return {"num_labeled": 2}


def brats2020(folder: Path) -> dict:
    names = [f"BraTS20_Training_{i:03d}" for i in (1, 2, 3, 4, 355)]
    brats(folder / "MICCAI_BraTS2020_TrainingData", names, "BraTS20_Training_355")
    return {"num_labeled": 2}


def msd_lung(folder: Path) -> dict:
    for i in (1, 3, 4, 5, 6, 9):
        image, label = volume(i)
        save(image, folder / "Task06_Lung" / "imagesTr" / f"lung_{i:03d}.nii.gz")
        save(label, folder / "Task06_Lung" / "labelsTr" / f"lung_{i:03d}.nii.gz")
    (folder / "Task06_Lung" / "imagesTr" / "._lung_001.nii.gz").write_bytes(b"resource fork")
    return {"num_labeled": 2}


def lits2017(folder: Path) -> dict:
    for i in (0, 1, 2, 10, 28, 130):
        batch = folder / ("Training Batch 1" if i < 28 else "Training Batch 2")
        image, label = volume(i)
        label[4:6, 4:6, 4:6] = 2
        save(image, batch / f"volume-{i}.nii")
        save(label, batch / f"segmentation-{i}.nii")
    return {"num_labeled": 2}


def acdc(folder: Path) -> dict:
    split = published_split("acdc")
    names = split["train"][:6] + split["val"][:2] + split["test"][:2]
    for i, patient in enumerate(sorted({name.partition("_")[0] for name in names})):
        where = folder / "training" / patient
        for frame in (1, 9 + i):
            image, label = volume(100 * i + frame)
            label[4:6, 4:6, 4:6], label[7:9, 4:6, 4:6] = 2, 3
            save(image, where / f"{patient}_frame{frame:02d}.nii.gz")
            save(label, where / f"{patient}_frame{frame:02d}_gt.nii.gz")
        (where / "Info.cfg").write_text(f"ED: 1\nES: {9 + i}\nGroup: DCM\nHeight: 184.0\n")
    return {"num_labeled": 2}


def pictures(folder: Path, sets: dict[str, list[str]]) -> None:
    for part, names in sets.items():
        for i, name in enumerate(names):
            image, label = volume(i, 255, (SIZE, SIZE))
            save(image.clip(0, 255).astype(np.uint8), folder / part / "Images" / f"{name}.png")
            save(label, folder / part / "Ground-truths" / f"mask_{name}.png")


def texts(file: Path, images: list[str]) -> None:
    table = pandas.DataFrame({
        "Image": images,
        "Description": [f"Infection {i}, left lung." for i in range(len(images))],
    })
    table.to_excel(file, index=False)


def qata_cov19(folder: Path) -> dict:
    pictures(folder, {"Train Set": ["a1", "a2", "a3", "a4"], "Test Set": ["b1"]})
    texts(folder / "train.xlsx", ["mask_a1.png", "mask_a2", "a3.png", "a4"])
    texts(folder / "test.xlsx", ["mask_b1.png"])
    return {"num_labeled": 2}


def mosmed_plus(folder: Path) -> dict:
    pictures(folder, {"Train Set": ["s1_10", "s1_11", "s2_4", "s2_5"], "Val Set": ["s3_1"], "Test Set": ["s1_12"]})
    texts(folder / "texts.xlsx", ["mask_s1_10.png", "s1_11.png"])
    return {"num_labeled": 2}


XML = "<Annotations><Annotation><Regions>{}</Regions></Annotation></Annotations>"
SQUARE = "<Region><Vertices>{}</Vertices></Region>".format(
    "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in ((4, 2), (9, 2), (9, 5), (4, 5)))
)


def monuseg(folder: Path) -> dict:
    for i, name in enumerate(["TCGA-A1", "TCGA-A2", "TCGA-A3", "TCGA-T1"]):
        rgb = np.random.default_rng(i).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        rgb[2:6, 4:10] = (90, 20, 120)
        test = name == "TCGA-T1"
        images, outlines = ("MoNuSegTestData",) * 2 if test else ("Tissue Images", "Annotations")
        save(rgb, folder / images / f"{name}.tif", is_vector=True)
        (folder / outlines).mkdir(exist_ok=True)
        (folder / outlines / f"{name}.xml").write_text(XML.format(SQUARE))
    return {"num_labeled": 2}


def hecktor_(folder: Path) -> dict:
    for i in range(6):
        image, label = volume(i)
        label[4:6, 4:6, 4:6] = 2
        save(image, folder / "imagesTr" / f"CHUM-{i:03d}__CT.nii.gz", (1.0, 1.0, 1.0))
        save(image[::2, ::2, ::2].astype(np.float32), folder / "imagesTr" / f"CHUM-{i:03d}__PT.nii.gz", (2.0, 2.0, 2.0))
        save(label, folder / "labelsTr" / f"CHUM-{i:03d}.nii.gz", (1.0, 1.0, 1.0))
    return {"num_labeled": 2}


def own_folder(folder: Path) -> dict:
    for i in range(5):
        image, label = volume(i)
        save(image, folder / "images" / f"patient.{i}.mha")
        if i in (1, 3):
            save(label, folder / "labels" / f"patient.{i}.mha")
    return {"labels": ["organ"]}


MINIATURES = {
    "la2018": la2018,
    "h5": h5,
    "pancreas_ct": pancreas_ct,
    "brats2019": brats2019,
    "brats2020": brats2020,
    "msd_lung": msd_lung,
    "lits2017": lits2017,
    "acdc": acdc,
    "qata_cov19": qata_cov19,
    "mosmed_plus": mosmed_plus,
    "monuseg": monuseg,
    "hecktor": hecktor_,
    "folder": own_folder,
}


def test_every_converter_has_a_miniature():
    assert sorted(MINIATURES) == module_names("dataset_conversion")


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_nnunet_accepts_the_dataset_and_a_method_trains_on_it(name, tmp_path, monkeypatch):
    raw = convert(name, tmp_path / "download", **MINIATURES[name](tmp_path / "download"))
    two = (raw / "dataset.json").read_text().find('".png"') > 0 or name == "monuseg"
    dataset = TinyDataset(
        801, raw.name, raw, tmp_path / "preprocessed" / raw.name, tmp_path / "results", "2d" if two else "3d_fullres"
    )
    dataset.plan(verify_dataset_integrity=True)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(MeanTeacherTrainer, dataset)
    trainer.on_train_start()
    trainer.network.train()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert all(np.isfinite(float(v)) for v in out.values())


# ------------------------------------------------------------------------------------- what each one does


def test_la2018(tmp_path):
    split = published_split("la2018")
    download = tmp_path / "download"
    raw = convert("la2018", download, **la2018(download))
    assert parts(raw) == {"Tr": set(split["train"][:2]), "Un": set(split["train"][2:4]), "Ts": set(split["test"][:1])}
    name = split["train"][0]
    source = download / "Training Set" / name
    assert (raw / "imagesTr" / f"{name}_0000.nrrd").samefile(source / "lgemri.nrrd")  # linked, not written again
    label = read(raw / "labelsTr" / f"{name}.nrrd")
    assert label.dtype == np.uint8 and np.array_equal(label, read(source / "laendo.nrrd") // 255)
    assert not (raw / "labelsUn").exists()


def test_la2018_published_crop(tmp_path):
    download = tmp_path / "download"
    name = published_split("la2018")["train"][0]
    image, _ = volume(0, shape=(100, 200, 200))
    label = np.zeros(image.shape, np.uint8)
    label[40:60, 70:75, 20:140] = 255  # z, y, x
    save(image, download / name / "lgemri.nrrd", (0.625,) * 3)
    save(label, download / name / "laendo.nrrd", (0.625,) * 3)
    raw = convert("la2018", download, num_labeled=1, crop="published")
    # x: 20 to 140 is more than 112, with the margin 5 to 155; y: 70 to 75 is grown by 107, 53 below and 54 above, to 17
    # and 129, with the margin 2 to 144; z: whole
    expected = (slice(None), slice(2, 144), slice(5, 155))
    assert np.array_equal(read(raw / "imagesTr" / f"{name}_0000.nrrd"), image[expected])
    assert np.array_equal(read(raw / "labelsTr" / f"{name}.nrrd"), label[expected] // 255)
    origin = sitk.ReadImage(str(raw / "labelsTr" / f"{name}.nrrd")).GetOrigin()
    np.testing.assert_allclose(origin, (5 * 0.625, 2 * 0.625, 0))


def test_h5_keeps_values_spacing_and_axes(tmp_path):
    download = tmp_path / "download"
    raw = convert("h5", download, **h5(download))
    name = published_split("la2018")["train"][0]
    image = sitk.ReadImage(str(raw / "imagesTr" / f"{name}_0000.nii.gz"))
    assert image.GetSpacing() == (0.625,) * 3
    with h5py.File(download / name / "mri_norm2.h5") as file:
        assert image.GetPixel(3, 5, 7) == file["image"][3, 5, 7]
        assert np.array_equal(sitk.GetArrayFromImage(image), file["image"][()].T)
        assert np.array_equal(read(raw / "labelsTr" / f"{name}.nii.gz"), file["label"][()].T)
    assert {len(names) for names in parts(raw).values()} == {1, 2}
    assert "already normalised and cropped" in (raw / "dataset.json").read_text()


def test_h5_of_an_unknown_set_asks_for_what_it_cannot_know(tmp_path):
    for i in range(2):
        image, label = volume(i)
        (tmp_path / "d").mkdir(exist_ok=True)
        with h5py.File(tmp_path / "d" / f"case{i}.h5", "w") as file:
            file["image"], file["label"] = image.T, label.T
    with pytest.raises(ValueError, match="--labels"):
        convert("h5", tmp_path / "d")
    with pytest.raises(ValueError, match="voxel size of this data set is not known: give it with --spacing"):
        convert("h5", tmp_path / "d", labels=["organ"])
    with pytest.raises(ValueError, match="^--spacing 1 2.5: give three numbers"):
        convert("h5", tmp_path / "d", labels=["organ"], spacing=[1.0, 2.5])
    raw = convert("h5", tmp_path / "d", labels=["organ"], spacing=[2.0])
    assert sitk.ReadImage(str(raw / "imagesTr" / "case0_0000.nii.gz")).GetSpacing() == (2, 2, 2)


def h5_files(folder: Path, *names: str, **lists: list[str]) -> Path:
    """Empty files with such names, and lists of cases."""
    touch(folder, *names)
    for part, cases in lists.items():
        (folder / f"{part}.list").write_text("\n".join(cases))
    return folder


def test_h5_takes_the_lists_beside_the_files(tmp_path):
    names = [f"BraTS19_2013_{i}_1" for i in range(5)]
    lists = {"train": names[2::-1], "val": [names[3]], "test": [names[4]]}
    found = find("h5", h5_files(tmp_path, *(f"data/{name}.h5" for name in names), **lists))
    assert {"train": found.train, "val": found.val, "test": found.test} == lists
    assert found.about.protocol == "the lists beside the files"
    (tmp_path / "train.list").unlink()
    assert find("h5", tmp_path).train == names[:3]  # all the others


@pytest.mark.parametrize(
    "split, file", [("la2018", "{}/mri_norm2.h5"), ("pancreas_ct", "Pancreas_h5/{}_norm.h5"), ("brats2019", "{}.h5")]
)
def test_h5_of_a_known_set_without_lists_keeps_to_the_published_ones(split, file, tmp_path):
    published = published_split(split)
    names = {part: published.get(part, [])[:3] for part in ("train", "val", "test")}
    h5_files(tmp_path, *(file.format(name) for part in names.values() for name in part))
    found = find("h5", tmp_path)
    assigned = assign(found, 1, "published")
    assert [name for name, part in assigned.items() if part == "test"] == names["test"]
    assert [name for name, part in assigned.items() if part == "validation"] == names["val"]
    assert found.about.protocol.startswith("no list beside the files, hence ")


def test_h5_of_the_pancreas_has_voxels_of_a_millimetre(tmp_path):
    found = find("h5", h5_files(tmp_path, "0001.h5", "0057.h5"))  # as CoraNet names them
    assert found.cases["0057"].images[0].options["spacing"] == (1, 1, 1)
    assert assign(found, 1, "published") == {"0057": "labeled", "0001": "test"}


def test_h5_without_a_list_of_an_unknown_set_says_so(tmp_path):
    found = find("h5", h5_files(tmp_path, "a.h5", "b.h5"), labels=["organ"], spacing=[1.0])
    assert found.about.protocol == "no list beside the files: every case is for training"
    assert found.train == ["a", "b"] and not found.test


def test_h5_names_a_file_that_is_of_another_set(tmp_path):
    h5_files(tmp_path, "0001.h5", "0002.h5", "0003.h5", "features.h5")
    with pytest.raises(ValueError, match=r"features\.h5: its name is not like those .* of PancreasCT"):
        find("h5", tmp_path)


def test_pancreas_labels_are_flipped_where_measured(tmp_path, capsys):
    download = tmp_path / "download"
    raw = convert("pancreas_ct", download, **pancreas_ct(download))
    names = [f"PANCREAS_{name[-4:]}" for name in published_split("pancreas_ct")["train"][:2]]
    for i, name in enumerate(names):
        scan = sitk.ReadImage(str(raw / "imagesTr" / f"{name}_0000.nii.gz"))
        assert scan.GetSpacing() == pytest.approx((0.8, 0.8, 1.5))
        assert np.array_equal(read(raw / "labelsTr" / f"{name}.nii.gz"), volume(i)[1])
    printed = capsys.readouterr().out
    assert f"case {names[0]}: label as it is" in printed and f"case {names[1]}: label flipped along y" in printed


def test_pancreas_label_of_another_patient_is_refused(tmp_path):
    download = tmp_path / "download"
    options = pancreas_ct(download)
    number = published_split("pancreas_ct")["train"][0][-4:]
    wrong = np.zeros((SIZE,) * 3, np.uint8)
    wrong[-3:, :, -3:] = 1  # a mixture of air, tissue and bone, both ways; its mean is no soft tissue's
    save(wrong, download / "TCIA_pancreas_labels" / f"label{number}.nii.gz")
    with pytest.raises(ValueError, match=f"label{number}.nii.gz: this label does not lie on soft tissue"):
        convert("pancreas_ct", download, **options)


def abdomen(mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """A pancreas of 85 HU in fat, in a body of soft tissue in air; at the mirrored place, tissue as given."""
    rng = np.random.default_rng(0)
    units = np.full((16, 60, 60), -1000.0)
    units[:, 4:56, 4:56] = rng.normal(50, 12, (16, 52, 52))
    units[:, 32:56, 4:56] = rng.normal(mean, std, (16, 24, 52))
    units[2:14, 8:24, 8:42] = rng.normal(-100, 15, (12, 16, 34))
    label = np.zeros(units.shape, np.uint8)
    label[4:12, 11:21, 12:38] = 1
    units[label > 0] = rng.normal(85, 45, (label > 0).sum())
    return units.round().astype(np.int16), label


@pytest.mark.parametrize(
    "mirrored", [(55, 12), (40, 40), (-1000, 5)], ids=["homogeneous muscle", "noise of a body", "air"]
)
@pytest.mark.parametrize("flipped", [False, True])
def test_pancreas_orientation_is_told_from_what_lies_at_the_mirrored_place(mirrored, flipped):
    units, label = abdomen(*mirrored)
    chosen, note = choose_orientation(units, label[:, ::-1] if flipped else label)
    assert np.array_equal(chosen, label)
    assert note.startswith("label flipped along y" if flipped else "label as it is")


def test_pancreas_orientation_is_doubtful_without_a_border():
    units, label = abdomen(50, 12)
    units[:, 4:56, 4:56] = np.random.default_rng(1).normal(60, 20, (16, 52, 52))
    chosen, note = choose_orientation(units, label)
    assert chosen is not None and note.startswith("WARNING: it is not clear")


def test_pancreas_label_must_lie_in_the_body():
    units = np.full((8, 40, 40), -1000, np.int16)
    units[:, 4:12, 4:36] = units[:, 28:36, 4:36] = 60  # two bodies, the label half in each
    label = np.zeros(units.shape, np.uint8)
    label[2:6, 6:10, 6:30] = label[2:6, 30:34, 6:30] = 1
    assert choose_orientation(units, label)[0] is None
    units[:, 4:36, 4], units[:, 4:36, 35] = 60, 60  # one body with gas in the middle
    assert choose_orientation(units, label)[0] is not None


def test_pancreas_label_covers_hardly_any_air():
    units = np.full((8, 40, 40), 100, np.int16)
    label = np.zeros(units.shape, np.uint8)
    label[2:6, 10:30, 10:20] = 1
    units[:, 26:28] = -900  # a tenth, which leaves the mean that of soft tissue
    assert choose_orientation(units, label)[0] is None


def test_pancreas_test_cases_are_for_testing(tmp_path):
    published = published_split("pancreas_ct")
    for name in (*published["train"][:2], *published["test"][:2]):
        (tmp_path / name.replace("image", "PANCREAS_")).mkdir()
    assigned = assign(find("pancreas_ct", tmp_path), 1, "published")
    expected = dict.fromkeys(published["train"][:2], False) | dict.fromkeys(published["test"][:2], True)
    assert {f"image{name[-4:]}": part == "test" for name, part in assigned.items()} == expected


@pytest.mark.parametrize("name, options", [("brats2019", {"task": "regions"}), ("brats2020", {})])
def test_brats_channels_and_regions(name, options, tmp_path):
    case = f"{name.replace('brats20', 'BraTS')}_Training_001"
    touch(tmp_path, *(f"{case}/{case}_{sequence}.nii.gz" for sequence in ("flair", "t1", "t1ce", "t2", "seg")))
    found = find(name, tmp_path, **options)
    endings = [path.name.removeprefix(case) for path in found.cases[case].images]
    named = dict(zip(found.about.channels, endings, strict=True))
    assert named == {"FLAIR": "_flair.nii.gz", "T1": "_t1.nii.gz", "T1CE": "_t1ce.nii.gz", "T2": "_t2.nii.gz"}
    # in the source 1 is necrosis, 2 edema, 4 enhancing tumor
    source_of = {value: key for key, value in found.about.label_values.items()}
    regions = {r: {source_of[v] for v in values} for r, values in found.about.labels.items() if r != "background"}
    assert regions == {"whole tumor": {1, 2, 4}, "tumor core": {1, 4}, "enhancing tumor": {4}}


def test_brats_in_nii_stays_nii(tmp_path):
    touch(tmp_path, *(f"c1/c1_{sequence}.nii" for sequence in ("flair", "t1", "t1ce", "t2", "seg")))
    for name in ("brats2019", "brats2020"):
        assert find(name, tmp_path).about.file_ending == ".nii"
    touch(tmp_path, *(f"c2/c2_{sequence}.nii.gz" for sequence in ("flair", "t1", "t1ce", "t2", "seg")))
    for name in ("brats2019", "brats2020"):
        assert find(name, tmp_path).about.file_ending == ".nii.gz"


def test_brats2019_whole_tumour_and_regions(tmp_path):
    download = tmp_path / "download"
    split = published_split("brats2019")
    raw = convert("brats2019", download, **brats2019(download))
    assert parts(raw)["Tr"] == {*split["train"][:2], split["val"][0]}  # validation cases have labels, too
    assert parts(raw)["Un"] == set(split["train"][2:5]) and parts(raw)["Ts"] == {split["test"][0]}
    label = read(raw / "labelsTr" / f"{split['train'][0]}.nii.gz")
    assert np.array_equal(label, volume(0)[1])  # 1, 2 and 4 are the whole tumour
    assert (raw / "splits_final.json").exists()

    raw = convert("brats2019", download, task="regions", overwrite=True, num_labeled=2)
    name = split["train"][0]
    assert len(list((raw / "imagesTr").glob(f"{name}_000?.nii.gz"))) == 4
    label = read(raw / "labelsTr" / f"{name}.nii.gz")
    assert (label[5, 5, 5], label[9, 5, 5], label[4, 4, 4], label[0, 0, 0]) == (2, 3, 1, 0)


def test_brats2020_finds_the_oddly_named_mask(tmp_path):
    download = tmp_path / "download"
    options = brats2020(download)
    raw = convert("brats2020", download, num_labeled="all", protocol="all")
    assert options and len(parts(raw)["Tr"]) == 5
    assert read(raw / "labelsTr" / "BraTS20_Training_355.nii.gz").max() == 3


def test_brats2020_validation_data_are_unlabeled(tmp_path):
    own = [f"BraTS20_Training_{i:03d}" for i in range(1, 11)]
    touch(tmp_path, *(f"MICCAI_BraTS2020_TrainingData/{name}/{name}_flair.nii" for name in own))
    alone = assign(find("brats2020", tmp_path), None, "published")
    others = [f"BraTS20_Validation_{i:03d}" for i in range(1, 11)]
    touch(tmp_path, *(f"MICCAI_BraTS2020_ValidationData/{name}/{name}_flair.nii" for name in others))
    found = find("brats2020", tmp_path)
    assert assign(found, None, "published") == alone | dict.fromkeys(others, "unlabeled")
    assert list(assign(found, "all", "published").values()).count("labeled") == 8


def test_msd_lung_is_split_by_seed(tmp_path):
    raw = convert("msd_lung", tmp_path / "m", **msd_lung(tmp_path / "m"))
    assert {part: len(names) for part, names in parts(raw).items()} == {"Tr": 2, "Un": 3, "Ts": 1}
    again = convert("msd_lung", tmp_path / "m", num_labeled=2, overwrite=True)
    assert parts(again) == parts(raw)


def test_lits_reads_both_batches(tmp_path):
    lits2017(tmp_path / "l")
    raw = convert("lits2017", tmp_path / "l", num_labeled="all", protocol="all")
    assert parts(raw) == {"Tr": {f"liver_{i:03d}" for i in (0, 1, 2, 10, 28, 130)}}
    assert set(np.unique(read(raw / "labelsTr" / "liver_130.nii"))) == {0, 1, 2}


def test_lits_masks_may_lie_elsewhere_and_copies_do_not_count(tmp_path):
    touch(tmp_path, "a/volume-1.nii", "a/volume-1 (copy).nii", "b/segmentation-1.nii", "a/volume-2.nii")
    cases = find("lits2017", tmp_path).cases
    assert {name: case.label for name, case in cases.items()} == {
        "liver_001": tmp_path / "b" / "segmentation-1.nii",
        "liver_002": tmp_path / "a" / "segmentation-2.nii",  # where it was looked for
    }


def test_acdc_patient_with_a_bad_info_fails_alone(tmp_path):
    download = tmp_path / "download"
    acdc(download)
    bad = sorted((download / "training").iterdir())[0]
    (bad / "Info.cfg").write_text("ED 1\n")
    with pytest.raises(ValueError, match=rf"case {bad.name}_frame01: .*Info.cfg: has no line `ED: NUMBER`") as error:
        convert("acdc", download, num_labeled="all")
    assert len(str(error.value).splitlines()) == 3  # both frames, and the dataset without them
    converted = set().union(*parts(tmp_path / "raw" / "Dataset801_ACDC").values())
    assert converted and not any(name.startswith(bad.name) for name in converted)


def test_acdc_frames_are_end_diastole_and_end_systole(tmp_path):
    download = tmp_path / "download"
    split = published_split("acdc")
    raw = convert("acdc", download, **acdc(download))
    first = split["train"][1]  # an end systole
    assert first.endswith("frame02") and first in parts(raw)["Tr"]
    patient = first.partition("_")[0]
    frames = (download / "training" / patient).glob("*_frame[0-9][0-9].nii.gz")
    (frame,) = (file for file in frames if "frame01" not in file.name)
    assert (raw / "imagesTr" / f"{first}_0000.nii.gz").samefile(frame)
    assert parts(raw)["Ts"] == set(split["test"][:2])


@pytest.mark.parametrize("name, count", [("qata_cov19", 5), ("mosmed_plus", 2)])
def test_texts_come_with_their_images(name, count, tmp_path):
    download = tmp_path / "download"
    raw = convert(name, download, **MINIATURES[name](download))
    found = json.loads((raw / "texts.json").read_text())
    assert len(found) == count and set(found) <= set().union(*parts(raw).values())
    if name == "qata_cov19":
        assert found["a1"] == "Infection 0, left lung." and found["a4"] == "Infection 3, left lung."
    case = sorted(parts(raw)["Ts"])[0]
    assert set(np.unique(read(raw / "labelsTs" / f"{case}.png"))) == {0, 1}


def test_qata_quarter_is_labeled(tmp_path):
    pictures(tmp_path, {"Train Set": [f"a{i}" for i in range(8)], "Test Set": ["b1"]})
    assigned = assign(find("qata_cov19", tmp_path), None, "published")
    assert list(assigned.values()).count("labeled") == 2


def test_gray_pictures_are_linked_and_others_read(tmp_path):
    download = tmp_path / "download"
    pictures(download, {"Train Set": ["a", "b", "c"]})
    folder = download / "Train Set" / "Images"
    save(np.repeat(read(folder / "b.png")[..., None], 3, -1), folder / "b.png", is_vector=True)
    (folder / "c.png").write_bytes(b"no picture")
    cases = find("qata_cov19", download).cases
    assert cases["a"].images == (folder / "a.png",) and isinstance(cases["b"].images[0], Read)
    assert cases["c"].images == (folder / "c.png",)  # refused when it is read
    with pytest.raises(ValueError, match=r"case c: .*c\.png: cannot be read"):
        convert("qata_cov19", download, num_labeled=1)
    raw = tmp_path / "raw" / "Dataset801_QaTaCOV19"
    assert (raw / "imagesTr" / "a_0000.png").samefile(folder / "a.png")
    assert np.array_equal(read(raw / "imagesUn" / "b_0000.png"), volume(1, 255, (SIZE, SIZE))[0])


def test_masks_of_a_lossy_copy_are_cut_at_half(tmp_path):
    masks = {"good": [0, 255, 255, 0], "binary": [0, 1, 1, 0], "lossy": [3, 254, 255, 120], "classes": [0, 1, 2, 0]}
    for name, values in masks.items():
        save(np.array(values, np.uint8).reshape(2, 2), tmp_path / f"{name}.png")
    found = {name: read_mask(tmp_path / f"{name}.png") for name in masks}
    lossy, note = found.pop("lossy")
    assert sitk.GetArrayFromImage(lossy).ravel().tolist() == [0, 255, 255, 0] and "lossy.png" in note
    for name, mask in found.items():  # values that mean something else are left to the check of label values
        assert sitk.GetArrayFromImage(mask).ravel().tolist() == masks[name]


def test_images_without_text_and_texts_without_image_are_reported(tmp_path, capsys):
    download = tmp_path / "download"
    pictures(download, {"Train Set": ["a1", "a2"]})
    texts(download / "train.xlsx", ["mask_a1.png", "z9"])
    (download / "~$train.xlsx").write_bytes(b"Excel has it open")
    convert("qata_cov19", download, dry_run=True)
    printed = capsys.readouterr().out
    assert "1 of 2 images have no text: a2" in printed and "1 of 2 texts have no image: z9" in printed
    (download / "train.xlsx").write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"train.xlsx: cannot be read \(.*\): download it again$"):
        convert("qata_cov19", download, dry_run=True)


def test_monuseg_takes_only_annotated_images(tmp_path):
    touch(
        tmp_path, "Tissue Images/a.tif", "MoNuSegTestData/b.tif", "mine/c.tif", "mine/c.xml", "mine/d.tif", "e.tif"
    )  # fmt: skip
    found = find("monuseg", tmp_path)
    assert (found.train, found.test) == (["a"], ["b", "c"])
    assert found.about.notes == ("2 .tif without an annotation are left out: e.tif, mine/d.tif",)


def test_monuseg_polygons(tmp_path):
    download = tmp_path / "download"
    options = monuseg(download)
    empty = "<Region><Vertices/></Region>"
    (download / "MoNuSegTestData" / "TCGA-T1.xml").write_text(XML.format(empty + SQUARE))
    raw = convert("monuseg", download, **options)
    expected = np.zeros((SIZE, SIZE), np.uint8)
    expected[2:6, 4:10] = 1  # y from 2 to 5, x from 4 to 9, with their borders
    assert np.array_equal(read(raw / "labelsTs" / "TCGA-T1.tif"), expected)


def test_a_vertex_that_is_no_number(tmp_path):
    from nnunet_semiseg.dataset_conversion.monuseg import rasterise

    monuseg(tmp_path)
    image = next(tmp_path.rglob("TCGA-T1.tif"))
    image.with_suffix(".xml").write_text(XML.format('<Region><Vertices><Vertex X="a" Y="1"/></Vertices></Region>'))
    with pytest.raises(ValueError, match="TCGA-T1.xml: not an annotation of Aperio ImageScope"):
        rasterise(image.with_suffix(".xml"), image)


def test_hecktor_pet_is_on_the_grid_of_the_ct(tmp_path):
    download = tmp_path / "download"
    hecktor_(download)
    pet = hecktor.resample_to(
        download / "imagesTr" / "CHUM-000__PT.nii.gz", download / "imagesTr" / "CHUM-000__CT.nii.gz"
    )
    assert pet.GetSize() == (SIZE,) * 3 and pet.GetSpacing() == (1, 1, 1)
    image = volume(0)[0]
    voxels = sitk.GetArrayFromImage(pet)
    assert voxels[4, 6, 8] == image[4, 6, 8]  # a point of both grids
    assert voxels[4, 6, 9] == pytest.approx((image[4, 6, 8] + image[4, 6, 10]) / 2)


@pytest.mark.parametrize(
    "files",
    [
        ("imagesTr/CHUM-001__CT.nii.gz", "imagesTr/CHUM-001__PT.nii.gz", "labelsTr/CHUM-001.nii.gz"),
        ("CHUM-001/CHUM-001__CT.nii.gz", "CHUM-001/CHUM-001__PT.nii.gz", "CHUM-001/CHUM-001.nii.gz"),
    ],
    ids=["2022", "2025"],
)
def test_hecktor_channels(files, tmp_path):
    touch(tmp_path, *files, "imagesTs/CHUM-002__CT.nii.gz")
    ((name, case),) = find("hecktor", tmp_path).cases.items()
    ct, pet, label = (tmp_path / file for file in files)
    assert (name, case.images[0], case.label) == ("CHUM-001", ct, label)
    assert case.images[1] == Read(hecktor.resample_to, (pet, ct))
