"""The demo: its data are what they claim to be, and the whole of it runs."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk
from commands import Popen

from nnunet_semiseg import demo
from nnunet_semiseg.errors import UserError

CASES = 12
ORGANS = sorted(set(demo.LABELS.values()) - {0})


@pytest.fixture(scope="module")
def cases():
    return [demo.make_case(np.random.default_rng([0, i])) for i in range(CASES)]


def test_cases_are_deterministic_and_differ(cases):
    image, labels = demo.make_case(np.random.default_rng([0, 1]))
    assert np.array_equal(image, cases[1][0]) and np.array_equal(labels, cases[1][1])
    assert not np.array_equal(labels, cases[0][1])
    assert (image.dtype, labels.dtype, image.shape) == (np.float32, np.uint8, demo.SHAPE)


def test_other_scanners_change_the_image_and_not_the_labels(cases):
    own, labels = cases[0]
    other, same = demo.make_case(np.random.default_rng([0, 0]), other_scanner=True)
    assert np.array_equal(labels, same)
    contrasts = [image[labels == 3].mean() - image[labels == 1].mean() for image in (own, other)]
    assert abs(contrasts[0] - contrasts[1]) > 0.1


def test_only_labeled_cases_are_of_the_first_scanner(tmp_path, monkeypatch):
    asked = []
    made = demo.make_case
    monkeypatch.setattr(demo, "make_case", lambda rng, **kind: asked.append(kind["other_scanner"]) or made(rng, **kind))
    demo.write_dataset(tmp_path, 1, 2, 1)
    assert asked == [False, True, True, True]


def test_every_case_has_every_organ_and_sizes_vary(cases):
    volumes = np.array([[np.count_nonzero(labels == organ) for organ in ORGANS] for _, labels in cases])
    assert volumes.min() > 50
    assert (volumes.std(0) / volumes.mean(0) > 0.15).all()


def best_threshold_dice(image, mask, bins=64):
    """The highest Dice of any interval of intensities, chosen with the reference at hand."""
    edges = np.quantile(image, np.linspace(0, 1, bins + 1))
    inside, outside = (np.concatenate(([0], np.histogram(image[m], edges)[0].cumsum())) for m in (mask, ~mask))
    hits, false = (np.triu(c[None] - c[:, None]) for c in (inside, outside))  # of the intervals from i to j > i
    return (2 * hits / (hits + false + mask.sum())).max()


def test_intensities_overlap(cases):
    """No threshold, not even the best one for each case and organ, comes near a segmentation."""
    dice = [[best_threshold_dice(image, labels == organ) for organ in ORGANS] for image, labels in cases]
    assert np.mean(dice, 0).max() < 0.7
    assert np.mean(dice) < 0.55


def test_labels_of_unlabeled_cases_are_written_nowhere(tmp_path):
    demo.write_dataset(tmp_path, 2, 3, 1)
    expected = {"dataset.json", "imagesTs/ts_000_0000.nii.gz", "labelsTs/ts_000.nii.gz"}
    expected |= {f"imagesTr/tr_00{i}_0000.nii.gz" for i in range(2)} | {f"labelsTr/tr_00{i}.nii.gz" for i in range(2)}
    expected |= {f"imagesUn/un_00{i}_0000.nii.gz" for i in range(3)}
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()} == expected
    for file in (tmp_path / "imagesUn").iterdir():  # an image, no label map under an image's name
        assert sitk.ReadImage(file).GetPixelID() == sitk.sitkFloat32
    image = sitk.ReadImage(tmp_path / "labelsTr" / "tr_000.nii.gz")
    assert image.GetSpacing() == demo.SPACING[::-1] and image.GetSize() == demo.SHAPE[::-1]
    assert json.loads((tmp_path / "dataset.json").read_text())["numTraining"] == 2


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="exists already: remove it, or choose another"):
        demo.run_demo(tmp_path)
    with pytest.raises(UserError, match=r"mine.txt: is a file: name a folder with -o$"):
        demo.run_demo(tmp_path / "mine.txt" / "demo")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_failing_command_shows_its_last_lines(tmp_path, capsys):
    runner = demo.Runner(demo.Console(), tmp_path / "logs", dict(os.environ))
    with pytest.raises(UserError, match=r"exit status 3.*logs.step\.txt"):
        runner.run("step", ["python", "-c", "print('first\\n' + 99 * 'more\\n' + 'the reason'); raise SystemExit(3)"])
    printed = capsys.readouterr().out
    assert "| the reason" in printed and "| first" not in printed
    assert (tmp_path / "logs" / "step.txt").read_text().startswith("first")


def test_table():
    values = {(demo.BASELINE, "liver"): (0.5, np.nan), (demo.METHOD, "liver"): (0.75, 1.0)}
    rows = [
        {"trainer": trainer, "case": str(i), "label": organ, "dice": value, "hd95_mm": 10.0}
        for trainer in demo.TRAINERS
        for organ in ("liver", "spleen", "kidney")
        for i, value in enumerate(values.get((trainer, organ), (0.25, 0.25)))
    ]
    table = [line.split() for line in demo.format_table(rows).splitlines()]
    assert table[0] == ["2", "test", "cases", *demo.TRAINERS, "difference"]
    assert ["liver", "0.500", "0.875", "+0.375"] in table  # nan, both empty, is left out
    assert ["mean", "0.333", "0.458", "+0.125"] in table
    assert ["mean", "10.00", "10.00", "+0.00"] in table


@pytest.mark.slow
def test_the_whole_demo(tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(mine))
    monkeypatch.setattr(demo.subprocess, "Popen", Popen)
    output = tmp_path / "with a space"
    demo.run_demo(output, cases=(3, 2, 2), num_epochs=2, num_iterations_per_epoch=1)

    assert not any(mine.iterdir()), "the user's own folders are left alone"
    printed = capsys.readouterr().out
    assert (
        "UNTRAINED" not in printed
        and "trained embeddings of wordllama" in printed
        and str(output / "overlay.png") in printed
    )
    for command in ("nnunet_semiseg plan_and_preprocess -d 999", "nnUNetv2_train 999", "nnUNetv2_predict -d 999"):
        assert f"$ {command}" in printed
    assert (output / "overlay.png").read_bytes().startswith(b"\x89PNG")
    assert len((output / "metrics.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    assert not list(output.rglob("*un_00*[0-9].nii.gz")) or all(
        file.parent.name == "imagesUn" for file in output.rglob("*un_00*.nii.gz")
    )
