"""`review`: estimates, reasons and lists worked out by hand, and one review for real of an untrained model."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from training import PLANS

from nnunet_semiseg import cli
from nnunet_semiseg.data.known_reviews import known_reviews
from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json, write_json
from nnunet_semiseg.review import estimates, lists, review, signs
from nnunet_semiseg.review.calibration import Line, calibrate
from nnunet_semiseg.review.labels import digest_of
from nnunet_semiseg.review.members import Ensemble, find_members
from nnunet_semiseg.review.request import _only_trainer
from nnunet_semiseg.review.table import Reviewed, tabulate
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer

LABELS = {"background": 0, "a": 1, "b": 2}


def test_agreement_is_the_mean_dice_of_all_pairs():
    members = [np.array([[1, 1, 0, 0]]), np.array([[1, 0, 0, 0]]), np.array([[0, 1, 1, 1]])]
    # a: 2 * 1 / 3, 2 * 1 / 5, 0 / 4; of b nobody sees anything
    found = estimates.agreement(members, LABELS)
    assert found == {"a": pytest.approx((2 / 3 + 2 / 5 + 0) / 3), "b": 1.0}
    both = estimates.agreement([np.array([[1, 2, 0]]), np.array([[2, 2, 0]])], {"background": 0, "both": (1, 2)})
    assert both == {"both": 1.0}
    assert estimates.agreement([np.zeros((1, 3))] * 2, LABELS) == {"a": 1.0, "b": 1.0}


def test_probabilities_say_which_dice_is_expected():
    mask = np.array([[1, 1, 0]])
    p = {"a": np.array([[0.9, 0.7, 0.4]]), "b": np.array([[0.0, 0.2, 0.1]])}
    found = estimates.expected_dice(mask, p, LABELS)
    assert found == {"a": pytest.approx(2 * 1.6 / (2.0 + 2)), "b": pytest.approx(0.8)}
    assert estimates.certainty(mask, p, LABELS) == {"a": pytest.approx(0.8), "b": pytest.approx(0.8)}


def test_the_map_of_uncertainty_is_entropy_in_per_cent():
    classes = np.array([[0.5, 1.0, 0.9], [0.5, 0.0, 0.1]])
    assert estimates.uncertainty_map(classes, regions=False).tolist() == [100, 0, 47]  # -0.9 log2 0.9 - 0.1 log2 0.1
    regions = np.array([[0.9, 1.0], [0.5, 0.0]])
    assert estimates.uncertainty_map(regions, regions=True).tolist() == [100, 0]


def seen(mask, image=None) -> signs.Signs:
    mask = np.array(mask)
    image = np.full((1, *mask.shape), 7.0) if image is None else image
    return signs.see(mask, image, LABELS, [10, 10, 10])


def test_a_case_is_held_against_labelled_ones():
    one = seen([[[1, 1, 0], [0, 0, 2]], [[0, 0, 0], [0, 0, 0]]])
    assert (one.volumes, one.islands) == ({"a": 2.0, "b": 1.0}, {"a": 1, "b": 1})
    two = seen([[[1, 1, 1], [0, 0, 2]], [[0, 0, 0], [0, 0, 0]]])
    usual = signs.Usual.of([one, two], "ml")
    assert (usual.volumes, usual.always) == ({"a": (2.0, 3.0), "b": (1.0, 1.0)}, {"a", "b"})
    assert signs.reasons(one, usual, ["CT"]) == []
    other = seen([[[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]], np.full((1, 2, 2, 3), 9.0))
    assert signs.reasons(other, usual, ["CT"]) == [
        "b is missing, but all labelled cases have it",
        "a: 6 ml, labelled ones have 2 to 3",
        "CT: intensities unlike the labelled ones",
    ]
    apart = seen([[[1, 0, 1], [0, 0, 2]], [[0, 0, 0], [0, 0, 0]]])
    assert signs.reasons(apart, usual, ["CT"]) == ["a: 2 islands, labelled ones have at most 1"]
    picture = signs.see(np.ones((1, 2, 2)), np.ones((1, 1, 2, 2)), LABELS, [999, 5, 4])
    assert picture.volumes["a"] == pytest.approx(0.8)  # cm2


def test_a_partly_ignored_label_says_nothing_about_whole_classes():
    labels = LABELS | {"ignore": 3}

    def seen(mask):
        return signs.see(np.array([mask]), np.full((1, 1, 2, 4), 7.0), labels, [10, 10, 10])

    whole = seen([[1, 1, 0, 0], [0, 0, 0, 2]])
    partial = seen([[1, 0, 1, 3], [3, 3, 3, 3]])  # b may be among the ignored voxels, and a may be one part
    assert whole.is_whole and not partial.is_whole
    usual = signs.Usual.of([whole, partial], "cm2")
    assert (usual.volumes, usual.islands) == ({"a": (2.0, 2.0), "b": (1.0, 1.0)}, {"a": 1, "b": 1})
    assert usual.always == {"a", "b"}
    unknown = signs.Usual.of([partial], "cm2")
    assert (unknown.volumes, unknown.islands, unknown.always) == ({}, {}, set())
    assert signs.reasons(seen([[1, 0, 1, 0], [0, 0, 0, 0]]), unknown, ["CT"]) == []


def test_the_dice_of_a_partly_ignored_label_is_that_of_its_other_voxels():
    mask, label = np.array([[1, 1, 1, 2]]), np.array([[1, 3, 0, 3]])
    # of the first and the third voxel: 2 * 1 / 3; nobody sees b there
    assert review.dice(mask, label, LABELS | {"ignore": 3}) == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert review.dice(mask, np.array([[1, 0, 0, 2]]), LABELS) == {"a": 0.5, "b": 1.0}


def test_a_line_is_drawn_through_unseen_cases_and_judged_without_each():
    x = [{"a": v} for v in (0.2, 0.4, 0.6, 0.8)]
    calibration, sentence = calibrate(x, [{"a": v["a"] / 2 + 0.3} for v in x])
    assert calibration("a", 1.0) == pytest.approx(0.8) and calibration.error == pytest.approx(0)
    assert sentence.startswith("Calibrated on 4 labelled cases") and "an error of 0.000" in sentence
    calibration, _ = calibrate(x, [{"a": v} for v in (0.0, 1.0, 0.0, 1.0)])
    # through the other three: 0.5 + 0.75 (x - 0.6) - ..., worked out with numpy.polyfit, slopes below 0 made 0
    errors = []
    for i, y in enumerate((0.0, 1.0, 0.0, 1.0)):
        rest = [j for j in range(4) if j != i]
        slope, offset = np.polyfit([x[j]["a"] for j in rest], [float(j % 2) for j in rest], 1)
        slope, offset = (slope, offset) if slope > 0 else (0, np.mean([j % 2 for j in rest]))
        errors.append(abs(np.clip(offset + slope * x[i]["a"], 0, 1) - y))
    assert calibration.error == pytest.approx(np.mean(errors)) and calibration.error > 0.5
    assert Line.fit([1, 1], [0.2, 0.4]) == Line(pytest.approx(0.3), 0.0)
    assert Line.fit([0, 1], [1.0, 0.0]) == Line(0.5, 0.0)


@pytest.mark.parametrize("n, words", [(0, "no labelled cases were"), (1, "one labelled case was"), (3, "3 labelled")])
def test_too_few_cases_are_no_calibration(n, words):
    calibration, sentence = calibrate([{"a": 1.0}] * n, [{"a": 1.0}] * n)
    assert calibration is None and sentence.startswith(f"Not calibrated: {words}")


def test_lists_for_two_purposes():
    dices = {"p": 0.5, "q": 0.9, "r": 0.5, "s": 0.55}
    assert lists.for_correction(dices, {"p": [], "q": ["x"], "r": ["x"], "s": []}) == ["r", "p", "s", "q"]
    # p and r are neighbours far from what is labelled: after the first of them the other one waits
    features = {"p": [10.0], "q": [5.0], "r": [10.1], "s": [-9.0]}
    assert lists.for_labelling(dices, features, [[0.0]]) == ["r", "s", "q", "p"]
    assert sorted(lists.at_random(list(dices))) == ["p", "q", "r", "s"] == sorted(dices)
    assert lists.at_random(list(dices)) == lists.at_random(list(dices)[::-1]) != lists.at_random(list(dices), 1)


def test_what_all_agree_not_to_see_counts_as_wrong():
    def case(name, mask, agreement, dice=None):
        estimate = {"a": agreement, "b": 1.0}
        return Reviewed(name, {"agreement": estimate}, seen(mask), [], True, dice, estimate)

    whole, half = [[[1, 2], [0, 0]], [[0, 0], [0, 0]]], [[[1, 0], [0, 0]], [[0, 0], [0, 0]]]
    labeled = [case(f"l{i}", whole, 0.2 * i, {"a": 0.1 * i, "b": 1.0}) for i in range(4)]
    table = tabulate([case("x", whole, 0.5), case("y", half, 1.0)], labeled, "correction", ["CT"])
    assert table.is_calibrated and table.classes == ["a", "b"]
    rows = table.rows.set_index("case")
    assert list(rows.index) == ["y", "x"]  # 0.25 on average, and 0.625
    assert rows.loc["y", ["dice a", "dice b", "dice"]].tolist() == pytest.approx([0.5, 0.0, 0.25])
    assert rows.loc["x", ["dice a", "dice b", "dice"]].tolist() == pytest.approx([0.25, 1.0, 0.625])
    assert rows.loc["x", "agreement"] == pytest.approx(0.75)
    assert "b is missing" in rows.loc["y", "reasons"] and "a: little agreement (0.50)" in rows.loc["x", "reasons"]
    assert not tabulate([case("x", whole, 0.5)], labeled[:3], "random", ["CT"]).is_calibrated


def test_members_are_the_first_kind_that_there_is(trained):
    _, run, trainer = trained(SupervisedTrainer)
    trainer.inference_allowed_mirroring_axes = (0, 1)
    trainer.save_checkpoint(str(run.checkpoint))

    def found(kind, mirroring):
        kind, members = find_members(run, kind, mirroring)
        return kind, [(m.name, m.flips) for m in members]

    assert found("auto", mirroring=False) == ("single", [("last", ())])
    flips = [(), (0,), (1,), (0, 1)]
    mirrored = ("mirroring", [("last", f) for f in flips])
    assert found("auto", mirroring=True) == mirrored
    best = run.checkpoint.with_name("checkpoint_best.pth")
    best.write_bytes(run.checkpoint.read_bytes())
    assert found("auto", False)[0] == "single"  # the last epoch was the best: it would agree with itself
    trainer.current_epoch += 1
    trainer.save_checkpoint(str(best))
    assert found("auto", False) == ("snapshots", [("last", ()), ("best", ())]) and found("auto", True) == mirrored
    other = run.model_folder.with_name(run.model_folder.name.replace(PLANS, f"{PLANS}_seed1")) / run.folder.name
    other.mkdir(parents=True)
    (other / run.checkpoint.name).write_bytes(run.checkpoint.read_bytes())
    assert found("auto", False) == ("seeds", [("as in the plans", ()), ("seed1", ())])
    assert found("auto", True) == ("seeds", [(name, f) for f in flips for name in ("as in the plans", "seed1")])
    with pytest.raises(UserError, match="--ensemble folds: this ensemble has fewer than two members"):
        find_members(run, "folds", True)


@pytest.mark.parametrize("kind, number", [("mirroring", 8), ("single", 1)])
def test_the_mask_is_that_of_nnunet(kind, number, trained):
    dataset, run, trainer = trained(SupervisedTrainer)
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)
    trainer.save_checkpoint(str(run.checkpoint))
    _, members = find_members(run, kind, mirroring=True)
    ensemble, nnunet = Ensemble(run, members, "cpu", mirroring=number == 1), load_predictor(run)
    if number > 1:  # nnU-Net's weights in a patch are so small at its edges that they round each member differently
        ensemble.predictor.use_gaussian = nnunet.use_gaussian = False
    found = ensemble.predict([str(dataset.image("un_000"))])
    expected = nnunet.predict_single_npy_array(found.image, found.properties)
    assert len(members) == number
    assert 100 < np.count_nonzero(expected) < expected.size - 100
    assert np.count_nonzero(found.mask != expected) <= (2 if number > 1 else 0)  # of 13824; two classes may be equal


def test_an_image_that_cannot_be_read_is_one_line(trained, capsys):
    dataset, _, _ = trained(SupervisedTrainer)
    image = dataset.image("un_000")
    content = image.read_bytes()
    for damaged in (content[: len(content) // 2], b"no image"):  # of the first SimpleITK reads zeros without an error
        image.write_bytes(damaged)
        assert cli.main(words(dataset)) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {image}: cannot be read (") and len(error.splitlines()) == 1
        assert error.endswith("replace the image or take its case out of imagesUn\n")


def words(dataset, *more: str) -> list[str]:
    model = ["-d", "901", "-c", "3d_fullres", "-f", "all", "-p", PLANS]
    return ["review", *model, "-device", "cpu", "--disable_tta", "--no_pbar", *more]


def test_an_untrained_model_is_reviewed(trained, capsys):
    dataset, run, trainer = trained(MeanTeacherTrainer)
    torch.manual_seed(0)
    for parameter in trainer.teacher.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    trainer.save_checkpoint(str(run.checkpoint))
    assert cli.main(words(dataset, "--num_parts", "2", "--part_id", "1")) == 0
    assert "other parts are at work" in capsys.readouterr().out
    assert cli.main(words(dataset, "-n", "1")) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 cases to predict, unlabelled and labelled: student and teacher" in printed
    output = dataset.results / "review" / f"MeanTeacherTrainer__{PLANS}__3d_fullres__fold_all"
    assert str(output / "review.html") in printed

    rows = pd.read_csv(output / "cases.csv")
    assert sorted(rows["case"]) == ["un_000", "un_001"] and (rows["dice"] <= rows["combined"]).all()
    first = read_json(output / "cases" / "un_000.json", "")["estimates"]
    assert 0 < first["agreement"]["kidney"] < 1  # of two that differ
    assert first["combined"] == {c: first["agreement"][c] * first["expected"][c] for c in ("kidney", "tumour")}
    page = (output / "review.html").read_text()
    assert page.count("data:image/png") == 1 and "Not calibrated: no labelled cases were kept" in page
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
    image = sitk.ReadImage(str(dataset.image("un_000")))
    for folder in ("masks", "uncertainty"):
        written = sitk.ReadImage(str(output / folder / "un_000.nii.gz"))
        assert (written.GetSize(), written.GetSpacing()) == (image.GetSize(), image.GetSpacing())
        voxels = sitk.GetArrayFromImage(written)
        assert 0 < voxels.max() <= (2 if folder == "masks" else 100)
    record = read_json(output / "cases" / "un_000.json", "")
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(output / "masks" / "un_000.nii.gz")))
    assert record["mask"] == digest_of(mask) and len(record["features"]) > 8

    before = (output / "cases" / "un_000.json").stat().st_mtime_ns
    (output / "masks" / "un_001.nii.gz").unlink()
    assert cli.main(words(dataset, "--for", "labelling")) == 0
    assert "1 of 4 cases to predict" in capsys.readouterr().out
    assert (output / "cases" / "un_000.json").stat().st_mtime_ns == before

    image, write = dataset.image("un_001"), review._write_images
    with pytest.MonkeyPatch.context() as patch:  # accept moves a case while the review runs
        patch.setattr(review, "_write_images", lambda *args: image.rename(image.with_name("away")) and write(*args))
        (output / "cases" / "un_000.json").unlink()
        (output / "cases" / "un_001.json").unlink()
        assert cli.main(words(dataset)) == 0
    assert "un_001: was moved or removed while the review ran" in capsys.readouterr().out
    assert pd.read_csv(output / "cases.csv")["case"].tolist() == ["un_000"]

    assert known_reviews(dataset.results) == {output: output.name}
    copy = shutil.copytree(output, dataset.raw.parent / "copy")
    assert cli.main(words(dataset, "-o", str(copy))) == 0
    assert "to predict" not in capsys.readouterr().out
    assert known_reviews(dataset.results) == {output: output.name, copy: output.name}


def test_validation_cases_that_change_need_no_new_prediction(trained, capsys):
    dataset, run, _ = trained(SupervisedTrainer, labeled=5)
    shutil.move(run.folder, run.folder.with_name("fold_0"))
    command = [word if word != "all" else "0" for word in words(dataset, "--ensemble", "single")]
    every = [f"tr_00{i}" for i in range(5)]

    def calibration(*validated: str) -> str:
        split = {"train": [case for case in every if case not in validated], "val": list(validated)}
        write_json([split], dataset.preprocessed / "splits_final.json")
        assert cli.main(command) == 0
        page = dataset.results / "review" / f"{run.model_folder.name}__fold_0" / "review.html"
        return re.findall("(?:Not c|C)alibrated[^:]*:", page.read_text())[0]

    assert calibration("tr_000") == "Not calibrated:"
    assert "7 of 7 cases to predict" in capsys.readouterr().out
    assert calibration(*every[1:]) == "Calibrated on 4 labelled cases that no member was trained on:"
    assert "to predict" not in capsys.readouterr().out
    assert calibration(*every) == "Calibrated on 5 labelled cases that no member was trained on:"


@pytest.mark.parametrize(
    "more, message",
    [
        (["-n", "0"], "-n 0: give a number of cases"),
        (["--num_parts", "2", "--part_id", "2"], "--part_id 2: give a number from 0 to 1"),
        (
            ["-tr", "SupervisedTrainer"],
            "checkpoint_final.pth: no such file: finish the training of SupervisedTrainer",
        ),
        (["-c", "nope"], "no configuration nope"),
        (["--ensemble", "folds"], "--ensemble folds: this ensemble has fewer than two members"),
        (["--ensemble", "single", "--estimate", "agreement"], "--estimate agreement: needs several predictions"),
    ],
)
def test_what_makes_no_sense_is_refused(more, message, trained, capsys):
    dataset, *_ = trained(MeanTeacherTrainer)
    assert cli.main(words(dataset, *more)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main("review -d 901 -c 3d_fullres --num_parts 0".split())
    assert "--num_parts: 0: give a whole number, 1 or more" in capsys.readouterr().err


def test_the_trainer_is_what_is_trained(trained):
    dataset, run, _ = trained(MeanTeacherTrainer)
    given = dataset.results, PLANS, "3d_fullres", "all"
    assert _only_trainer(*given) == "MeanTeacherTrainer"
    for trainer in ("UniMatchTrainer", "SemiSegTrainer"):
        folder = run.folder.parents[1] / run.model_folder.name.replace("MeanTeacherTrainer", trainer) / "fold_all"
        folder.mkdir(parents=True)
        (folder / run.checkpoint.name).touch()
        if trainer == "UniMatchTrainer":
            with pytest.raises(UserError, match="choose one with -tr MeanTeacherTrainer or -tr UniMatchTrainer"):
                _only_trainer(*given)
    assert _only_trainer(*given) == "SemiSegTrainer"
    with pytest.raises(UserError, match="has no trained model"):
        _only_trainer(*given[:3], "0")
