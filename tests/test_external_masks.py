"""`add_masks`: another model's masks, brought to our values, checked, and measured on labelled cases."""

import json
import os
import signal

import numpy as np
import pytest
import SimpleITK as sitk
from test_cli import write_plans

from nnunet_semiseg import cli
from nnunet_semiseg.data import external_masks
from nnunet_semiseg.data.external_masks import add_masks, dice, map_values, parse_map, table
from nnunet_semiseg.data.prepared_masks import weigh
from nnunet_semiseg.errors import UserError

CLASSES = {"kidney": [1], "tumour": [2], "organ": [1, 2]}


@pytest.fixture
def dataset(tiny_dataset):
    return tiny_dataset(labeled=2, unlabeled=1, test=1)


def write_masks(dataset, folder, change=lambda x: x, cases=("tr_000", "tr_001", "un_000")):
    """The true labels, changed, as another model's; unlabelled cases have that of tr_000."""
    folder.mkdir(exist_ok=True)
    for case in cases:
        source = "tr_000" if case.startswith(("un", "ts")) else case
        label = sitk.ReadImage(str(dataset.raw / "labelsTr" / f"{source}.nii.gz"))
        mask = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(label)))
        mask.CopyInformation(label)
        sitk.WriteImage(mask, str(folder / f"{case}.nii.gz"))
    return folder


def test_dice_and_weights_by_hand():
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert dice(a, b) == 0.5 and dice(a, ~a) == 0 and dice(a & False, b & False) is None
    measured = {
        "x": {"kidney": 0.9, "tumour": 0.2},
        "y": {"kidney": 0.7, "tumour": 0.7},
        "z": {"kidney": None, "tumour": 0.5},
    }
    result = weigh(measured, ["kidney", "tumour"])
    assert result["kidney"] == {"dice": pytest.approx(0.8), "cases": 2, "weight": pytest.approx(0.8)}
    assert result["tumour"] == {"dice": pytest.approx(1.4 / 3), "cases": 3, "weight": 0}
    nothing = weigh({"x": {"kidney": None}}, ["kidney"])
    assert nothing == {"kidney": {"dice": None, "cases": 0, "weight": 0}}
    lines = table(result | {"organ": nothing["kidney"]}).splitlines()
    assert [line.split() for line in lines] == [
        ["class", "labelled", "cases", "Dice", "weight"],
        ["kidney", "2", "0.800", "0.800"],
        ["tumour", "3", "0.467", "0.000"],
        ["organ", "0", "–", "0.000"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_values_are_mapped_and_others_are_background(tmp_path):
    values = parse_map(["5=tumour", "7=kidney"], CLASSES)
    assert values == {5: 2, 7: 1}
    array = np.array([0, 5, 7, 1, 9.0])
    assert map_values(tmp_path, array, values, [0, 1, 2]).tolist() == [0, 2, 1, 0, 0]
    assert map_values(tmp_path, array[:1], {}, [0, 1, 2]).tolist() == [0]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["5=gallbladder"],
            '--map 5=gallbladder: the dataset has no class "gallbladder": its classes are kidney, t',
        ),
        (["5=kidny"], "did you mean kidney"),
        (["5=organ"], "organ is a region of several values"),
        (["5=kidney", "5=tumour"], "the value 5 is named twice"),
        (["kidney"], "--map kidney: write VALUE=CLASS"),
        (["x=kidney"], "write VALUE=CLASS"),
    ],
)
def test_a_map_that_cannot_be_is_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        parse_map(words, CLASSES)
    assert "\n" not in str(error.value)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(dataset, tmp_path, monkeypatch):
    folder = write_masks(dataset, tmp_path / "masks")
    monkeypatch.setattr(external_masks, "_add_case", die)
    with pytest.raises(UserError, match=f"^{folder}: a worker was killed, .* with a smaller -np$"):
        add_masks(dataset.id, "other", folder, num_processes=1)
    assert not list((dataset.raw / "external").iterdir())


def test_masks_are_written_in_our_values_and_measured(dataset, tmp_path, capsys):
    def other(label):  # its kidneys are 5; it takes half of the tumours' voxels for something else
        mask = np.where(label == 1, 5, 0)
        tumour = np.argwhere(label == 2)
        mask[tuple(tumour[: len(tumour) // 4].T)] = 7
        return mask.astype(np.float32)

    folder = write_masks(dataset, tmp_path / "masks", other)
    (folder / "ts_000.nii.gz").write_bytes((folder / "tr_000.nii.gz").read_bytes())  # of a test case: passed over
    words = ["add_masks", "-d", str(dataset.id), "--name", "other", "-i", str(folder), "-np", "0"]
    assert cli.main([*words, "--map", "5=kidney", "7=tumour"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((dataset.raw / "external" / "other" / "masks.json").read_text())
    # a quarter is found, and nothing wrong: 2 q / (q + 1) = 0.4
    assert record["classes"]["kidney"] == {"dice": 1, "cases": 2, "weight": 1}
    assert record["classes"]["tumour"]["dice"] == pytest.approx(0.4, abs=0.02)
    assert record["classes"]["tumour"]["weight"] == 0 and "Dice below 0.5 gives the weight 0" in printed
    assert sorted(record["dice"]) == ["tr_000", "tr_001"] and printed.count("1.000") == 2
    written = sorted(f"{f.parent.name}/{f.name}" for f in (dataset.raw / "external").rglob("*.nii.gz"))
    assert written == ["imagesTr/tr_000.nii.gz", "imagesTr/tr_001.nii.gz", "imagesUn/un_000.nii.gz"]
    mask = sitk.ReadImage(str(dataset.raw / "external" / "other" / "imagesUn" / "un_000.nii.gz"))
    label = sitk.ReadImage(str(dataset.raw / "labelsTr" / "tr_000.nii.gz"))
    assert np.unique(sitk.GetArrayFromImage(mask)).tolist() == [0, 1, 2] and mask.GetSpacing() == label.GetSpacing()
    assert sorted(f.name for f in (dataset.raw / "external").iterdir()) == ["other"]


@pytest.mark.parametrize(
    "plans, following",
    [
        ([], "plan_and_preprocess -d 901 -c 3d_fullres -pl SemiSegPlannerSmall"),
        (["nnUNetSemiSegPlans"], "preprocess_unlabeled -d 901 -plans_name nnUNetSemiSegPlans"),
        (["a", "nnUNetPlans"], "preprocess_unlabeled -d 901 -plans_name nnUNetPlans"),
    ],
)
def test_the_next_command_names_plans_that_exist(plans, following, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name in plans:
        write_plans(dataset, name)
    folder = write_masks(dataset, tmp_path / "masks")
    assert cli.main(["add_masks", "-d", "901", "--name", "other", "-i", str(folder), "-np", "0"]) == 0
    assert capsys.readouterr().out.endswith(f"\nnext: nnunet_semiseg {following}\n")


def test_the_record_changes_with_each_mask(dataset, tmp_path):
    folder = write_masks(dataset, tmp_path / "masks")
    add_masks(dataset.id, "other", folder)
    record = dataset.raw / "external" / "other" / "masks.json"
    first = record.read_bytes()
    add_masks(dataset.id, "other", folder)
    assert record.read_bytes() == first
    add_masks(dataset.id, "other", write_masks(dataset, folder, lambda x: 0 * x, ["un_000"]))
    assert record.read_bytes() != first  # else the preprocessed mask of un_000 would not be made again


def test_regions_are_measured_too(tiny_dataset, tmp_path):
    dataset = tiny_dataset(labeled=1, unlabeled=1, regions=True)
    result = add_masks(dataset.id, "old", write_masks(dataset, tmp_path / "masks", cases=["tr_000"]))
    assert {name: row["weight"] for name, row in result.items()} == {"organ": 1, "tumour": 1}


def test_masks_of_labelled_cases_are_measured_while_imagesun_is_empty(tiny_dataset, tmp_path):
    dataset = tiny_dataset(labeled=1, unlabeled=0)
    (dataset.raw / "imagesUn").mkdir()
    (dataset.raw / "imagesUn" / ".DS_Store").touch()
    result = add_masks(dataset.id, "other", write_masks(dataset, tmp_path / "masks", cases=["tr_000"]))
    assert result["kidney"]["weight"] == result["tumour"]["weight"] == 1


def test_what_does_not_fit_is_one_line_and_masks_of_before_stay(dataset, tmp_path, capsys):
    good = write_masks(dataset, tmp_path / "good")
    add_masks(dataset.id, "other", good)
    before = (dataset.raw / "external" / "other" / "masks.json").read_bytes()

    def moved(file):
        image = sitk.ReadImage(str(file))
        image.SetOrigin((5, 0, 0))
        sitk.WriteImage(image, str(file))

    def refused(expected, change=lambda x: x, also=lambda folder: None, cases=("tr_000", "un_000"), name="other"):
        folder = write_masks(dataset, tmp_path / f"bad{len(list(tmp_path.iterdir()))}", change, cases)
        also(folder)
        assert cli.main(["add_masks", "-d", str(dataset.id), "--name", name, "-i", str(folder), "-np", "0"]) == 1
        error = capsys.readouterr().err
        assert expected in error and all(line.startswith("error: ") for line in error.splitlines()), error
        return error

    two = refused(
        "has the value 3, but the classes of dataset.json have 0, 1, 2: name the value of each class with --map",
        lambda x: x + 1,
    )
    assert len(two.splitlines()) == 2  # each file has its line
    refused("tr_000.nii.gz: has values that are not whole numbers", lambda x: x * 0.5)
    refused("un_000.nii.gz: origin (5, 0, 0) differs from", also=lambda f: moved(f / "un_000.nii.gz"))
    refused("tr_000.nii.gz: cannot be read", also=lambda f: (f / "tr_000.nii.gz").write_bytes(b"x"))
    refused("has no mask of a labelled case: run the other model on imagesTr", cases=["un_000"])
    rename = lambda f: (f / "un_000.nii.gz").rename(f / "un_00.nii.gz")  # noqa: E731
    refused("un_00.nii.gz: there is no case un_00: did you mean un_000? rename it", also=rename)
    twice = lambda f: (f / "tr_000.nii").write_bytes(b"x")  # noqa: E731
    refused("belongs to the same case: remove one of them", also=twice)
    refused(
        "has no mask of a case in imagesTr or imagesUn: put a label file there for each case, such as tr_0", cases=[]
    )
    refused("--name ../x: use letters, digits", name="../x")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        add_masks(dataset.id, "other", tmp_path / "nowhere")
    label = dataset.raw / "labelsTr" / "tr_000.nii.gz"
    whole = sitk.ReadImage(str(label))
    for content, problem in ((whole[1:], "its size differs from that of the image"), (None, "cannot be read")):
        label.unlink()
        if content is not None:
            sitk.WriteImage(content, str(label))
        with pytest.raises(UserError, match=f"tr_000.nii.gz: {problem}"):
            add_masks(dataset.id, "other", good)
    assert (dataset.raw / "external" / "other" / "masks.json").read_bytes() == before
    assert sorted(f.name for f in (dataset.raw / "external").iterdir()) == ["other"]
    assert not list(dataset.raw.glob("*.lock"))
