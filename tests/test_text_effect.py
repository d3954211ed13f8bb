"""What text changes: planted answers, and a trained model for real."""

import numpy as np
import pandas as pd
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from test_compare import request
from training import PLANS

from nnunet_semiseg import cli
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation import text_effect
from nnunet_semiseg.evaluation.jobs import Job
from nnunet_semiseg.evaluation.metrics import METRICS
from nnunet_semiseg.evaluation.request import TestSet
from nnunet_semiseg.runs import Run
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegTrainer


def test_the_verdict_is_plain():
    shares = {"shuffled": 0.0, "noise": 0.0, "empty": 0.0}
    same = pd.DataFrame({"low": 0.0, "high": 0.0}, index=list(shares))
    assert text_effect.verdict(shares, same).startswith("Text changes nothing:")
    few = text_effect.verdict(shares | {"noise": 0.0004}, same)
    assert few == "Text changes next to nothing: at most 0.040% of the foreground's voxels (noise prompts)."
    changed = shares | {"shuffled": 0.25}
    much = text_effect.verdict(changed, same)
    assert "shuffled 25.0%, noise 0.0%" in much and "does not matter to the result" in much
    worse, better = same.copy(), same.copy()
    worse.loc["shuffled"], better.loc["noise"] = (-0.2, -0.1), (0.01, 0.02)
    assert text_effect.verdict(changed, worse).endswith("It matters: Dice falls with shuffled prompts.")
    assert "no help: Dice is HIGHER with noise prompts" in text_effect.verdict(changed, better)


def test_the_job_with_other_prompts_leaves_the_first_one_as_it_is(tmp_path):
    job = Job("predict", "predicting", {"output": "a", "settings": {"noise": 0.0}})
    file = tmp_path / "empty.safetensors"
    other = text_effect.with_prompts(job, text_effect.Prompts("empty", torch.ones(2, 3), ""), file, tmp_path / "b")
    assert job.content == {"output": "a", "settings": {"noise": 0.0}} and file.is_file()
    settings = {"noise": 0.0, "features": [3.0, 3.0]}
    assert other.content == {"output": str(tmp_path / "b"), "features": str(file), "settings": settings}


def test_with_one_case_there_is_no_interval(tmp_path, monkeypatch):
    rows = [{"case": "a", "label": "x", **dict.fromkeys(METRICS, 0.5)}]
    monkeypatch.setattr(text_effect, "evaluate", lambda *_: rows)
    monkeypatch.setattr(text_effect, "changed_voxels", lambda *_: np.ones(1))
    monkeypatch.setattr(text_effect, "foreground_voxels", lambda *_: 10)
    variants = [text_effect.Prompts(name, torch.ones(1, 1), "") for name in ("true", "noise")]
    run = Run("Dataset901_Tiny", "2d", "0", "TextSemiSegTrainer", PLANS)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    folders = {variant.name: tmp_path for variant in variants}
    test_set = TestSet({"a": []}, tmp_path, False, {}, ".nii.gz", SimpleITKIO)
    report = text_effect.make_report(None, run, test_set, variants, folders, tmp_path)
    assert report.facts["data"] == "Dataset901_Tiny, 1 test case"
    assert report.sections[0].rows[1][3] == "+0.000 (no interval)"


@pytest.fixture
def model(trained):
    return trained(TextSemiSegTrainer, test=2)


def test_the_prompts(model, monkeypatch):
    _, run, trainer = model
    true, shuffled, noise, empty = text_effect.make_variants(run)
    with torch.no_grad():
        learnt = trainer.prompt_learner().cpu()
    torch.testing.assert_close(true.features, learnt)
    torch.testing.assert_close(shuffled.features, learnt[[2, 0, 1]])
    torch.testing.assert_close(noise.features.norm(dim=1), torch.ones(3))
    assert empty.features.shape == true.features.shape and empty.meaning.startswith("an empty text")
    # the learnt context of a class is all that still tells its text from another's
    assert not torch.allclose(empty.features, true.features) and empty.features.norm(dim=1).allclose(torch.ones(3))

    def no_weights(*_):
        raise UserError("no internet")

    monkeypatch.setattr(text_effect, "load_text_tower", no_weights)
    *_, empty = text_effect.make_variants(run)
    assert not empty.features.any() and "cannot be loaded here" in empty.meaning


def test_wrong_use(model, tmp_path):
    dataset, run, _ = model
    checkpoint = torch.load(run.checkpoint, weights_only=False)
    del checkpoint["network_weights"]["guidance.features"]
    torch.save(checkpoint, run.checkpoint)
    with pytest.raises(UserError, match="checkpoint_final.pth: this model has no text"):
        text_effect.text_effect(request(dataset, trainers=["TextSemiSegTrainer"]), tmp_path / "out")
    with pytest.raises(UserError, match=r"labelsTs: has no \*.nii.gz, but a test set is needed: add imagesTs and"):
        (dataset.raw / "labelsTs").rename(tmp_path / "labelsTs")
        text_effect.text_effect(request(dataset, trainers=["TextSemiSegTrainer"]), tmp_path / "out")
    (tmp_path / "labelsTs").rename(dataset.raw / "labelsTs")
    run.checkpoint.unlink()
    with pytest.raises(UserError, match="not trained: TextSemiSegTrainer"):
        text_effect.text_effect(request(dataset, trainers=["TextSemiSegTrainer"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(model, tmp_path):
    """Random weights that make much of the text: wrong prompts change the prediction."""
    dataset, run, _ = model
    checkpoint = torch.load(run.checkpoint, weights_only=False)
    for name, weight in checkpoint["network_weights"].items():
        if "interaction" in name:
            weight.mul_(20)
    torch.save(checkpoint, run.checkpoint)
    words = f"text_effect -d {dataset.id} -c 3d_fullres -f all -p {PLANS} -device cpu --disable_tta"
    assert cli.main([*words.split(), "-o", str(tmp_path / "out")]) == 0
    voxels = pd.read_csv(tmp_path / "out" / "voxels.csv", index_col="case")
    assert list(voxels) == ["true", "shuffled", "noise", "empty"] and list(voxels.index) == ["ts_000", "ts_001"]
    assert (voxels["true"] == 0).all() and np.all(voxels[["shuffled", "noise"]].sum() > 0)
    assert "Text changes what this model predicts" in (tmp_path / "out" / "report.md").read_text()
