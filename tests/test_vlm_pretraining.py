"""Vision-language pre-training: retrieval, momentum, gradients, resume, wrong use, and what comes after it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training import write_text_tower

from nnunet_semiseg import cli
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.text.open_clip_models import load_clip
from nnunet_semiseg.trainers.amvlm import AMVLMTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.vlm import pretraining
from nnunet_semiseg.vlm.model import AMVLM
from nnunet_semiseg.vlm.overlays import write_text_masks
from nnunet_semiseg.vlm.pairs import random_crop
from nnunet_semiseg.vlm.pretraining import pretrain, split_model
from nnunet_semiseg.vlm.task import PretrainingSettings, PretrainingTask, retrieval
from nnunet_semiseg.vlm.text_masks import load_vlm

PLANS = "nnUNetSemiSegSmallPlans"
SHORT = ["num_epochs=3", "batch_size=2", "dim=16", "hidden=32", "num_workers=0", "held_out=0.3", "learning_rate=1e-3"]


def test_retrieval_by_hand():
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [0.0, 0.0, 1.0]])
    result = retrieval(image, text, ["a", "b", "c"])
    # image 1 finds its own text, 0.4 > 0; text 1 finds image 0 first
    assert result["image_to_text_recall@1"] == 1 and result["text_to_image_recall@1"] == pytest.approx(2 / 3)
    assert result["image_to_text_recall@5"] == result["text_to_image_recall@5"] == 1
    assert retrieval(image, text, ["a", "a", "c"])["text_to_image_recall@1"] == 1  # the same text is as right


def test_models_by_name_tag_and_path():
    assert split_model("ViT-B-32:openai") == ("ViT-B-32", "openai")
    assert split_model("hf-hub:a/b") == ("hf-hub:a/b", None)
    assert split_model("/a/folder") == ("/a/folder", None) and split_model("/a/folder:none") == ("/a/folder", "none")


@pytest.fixture
def towers(tmp_path):
    folder = write_text_tower(tmp_path / "towers")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"image_size": 32, "patch_size": 8}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def make_task(towers, **settings):
    torch.manual_seed(0)
    chosen = PretrainingSettings(dim=16, hidden=32, **settings)
    return PretrainingTask(AMVLM(*load_clip(str(towers), "none"), 16, 32), chosen)


@pytest.mark.parametrize("term", ["itc", "css", "local", "icl"])
def test_each_term_trains_both_towers(term, towers):
    task = make_task(towers, **{f"{name}_weight": float(name == term) for name in ("itc", "css", "local", "icl")})
    task.train()
    terms = task(torch.randn(3, 3, 32, 32), task.model.tokenize(["one lesion", "two", "a b c d"]))
    assert list(terms) == [term]
    terms[term].backward()
    for tower in (task.model.visual, task.model.text):
        assert sum(p.grad.abs().sum() for p in tower.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in task.momentum.parameters())
    assert not any(m.training for m in task.momentum.modules())


def test_momentum_towers_follow(towers):
    task = make_task(towers, momentum=0.9)
    before = [p.clone() for p in task.momentum.parameters()]
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(1)
    task.update_momentum()
    for new, old, online in zip(task.momentum.parameters(), before, task.model.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


def test_padding_takes_no_part(towers):
    """What a text tower puts at padding changes no term: only the words and CLS count."""
    task = make_task(towers).eval()
    images, ids = torch.randn(3, 3, 32, 32), task.model.tokenize(["one lesion", "two", "a b c d"])
    torch.manual_seed(1)
    first = task(images, ids)
    encode = task.model.encode_text

    def disturbed(ids):
        encoding = encode(ids)
        noise = torch.nn.functional.normalize(torch.randn_like(encoding.tokens), dim=2)
        encoding.tokens.data = torch.where(encoding.valid[..., None], encoding.tokens, noise)
        return encoding

    state = torch.random.get_rng_state()
    task.model.encode_text = disturbed
    torch.random.set_rng_state(state)
    torch.manual_seed(1)
    second = {}
    with torch.random.fork_rng():
        second = task(images, ids)
    for name in ("itc", "local", "css"):
        torch.testing.assert_close(first[name], second[name], msg=name)


@pytest.fixture
def dataset(tiny_dataset):
    made = tiny_dataset(dims=2, size=32, labeled=4, unlabeled=6)
    texts = {f"tr_{i:03d}": f"{i} lesions" for i in range(4)} | {f"un_{i:03d}": f"{i} dark spots" for i in range(6)}
    (made.raw / "texts.json").write_text(json.dumps(texts))
    made.plan()
    return made


def run(dataset, towers, output, *settings, **kwargs):
    chosen = {"device": "cpu", "plans": PLANS} | kwargs
    return pretrain(dataset.id, f"{towers}:none", output, [*SHORT, *settings], **chosen)


def test_an_interrupted_pretraining_ends_where_an_uninterrupted_one_does(dataset, towers, tmp_path, monkeypatch):
    straight = run(dataset, towers, tmp_path / "straight", "accumulation=2")
    about = json.loads((straight / "vlm.json").read_text())
    assert len(about["held_out"]) == 3 and not about["trained"] and (straight / "progress.png").stat().st_size > 0

    class Killed(Exception):
        pass

    train_epoch = pretraining.Pretraining.train_epoch

    def dies(self, task):
        if self.epoch == 2:
            raise Killed
        return train_epoch(self, task)

    monkeypatch.setattr(pretraining.Pretraining, "train_epoch", dies)
    with pytest.raises(Killed):
        run(dataset, towers, tmp_path / "killed", "accumulation=2")
    monkeypatch.setattr(pretraining.Pretraining, "train_epoch", train_epoch)
    resumed = run(dataset, towers, tmp_path / "killed", "accumulation=2")
    for name in ("vlm.safetensors", "training_state.safetensors"):
        a, b = load_file(straight / name), load_file(resumed / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    vlm = load_vlm(resumed)
    saved = load_file(resumed / "vlm.safetensors")["heads.text_cls.0.weight"]
    assert torch.equal(vlm.heads["text_cls"][0].weight, saved)
    with pytest.raises(UserError, match="killed: holds a pre-training with other settings"):
        run(dataset, towers, tmp_path / "killed", "accumulation=1")


def test_volumes_are_learnt_from_slice_by_slice(tiny_dataset, towers, tmp_path):
    made = tiny_dataset(labeled=2, unlabeled=4)
    texts = {f"tr_{i:03d}": "a" for i in range(2)} | {f"un_{i:03d}": "b" for i in range(4)}
    (made.raw / "texts.json").write_text(json.dumps(texts))
    made.plan()
    run(made, towers, tmp_path / "out", "num_epochs=1", "slice_axis=2", "held_out=0", configuration="3d_fullres")
    assert (tmp_path / "out" / "vlm.safetensors").is_file()


def test_wrong_use_is_one_line_before_anything_is_written(dataset, towers, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["pretrain_vlm", "-d", str(dataset.id), "-p", PLANS, "-device", "cpu", "-o", str(out)]
    for words, expected in (
        (["--model", f"{towers}:none", "--set", "batch_sise=2"], "batch_sise"),
        (["--model", f"{towers}:none", "--set", "batch_size=64"], "9 pairs are too few for batches of 64"),
        (["--model", f"{towers}:none", "-c", "3d_fullres"], "-c 3d_fullres: nnUNetSemiSegSmallPlans has 2d"),
        (["--model", "ViT-B-33:openai"], "--model ViT-B-33"),
        (["--model", str(tmp_path)], "the folder has no open_clip_config.json"),
    ):
        assert cli.main([*common, *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and len(error.splitlines()) == 1, error
    assert not out.exists()


def test_crops_are_parts_of_the_image():
    image = torch.arange(1600.0).view(1, 40, 40)
    sizes = set()
    for _ in range(30):
        crop = random_crop(image, 0.8)
        sizes.add(crop.shape[1])
        assert crop.shape[1] == crop.shape[2] and 32 <= crop.shape[1] <= 40
        top, left = divmod(int(crop[0, 0, 0]), 40)
        assert torch.equal(crop, image[:, top : top + crop.shape[1], left : left + crop.shape[2]])
    assert len(sizes) > 3 and torch.equal(random_crop(image, 1.0), image)


@pytest.mark.slow
def test_two_processes_under_torchrun(dataset, towers, tmp_path):
    words = ["-m", "nnunet_semiseg.cli", "pretrain_vlm", "-d", dataset.id, "-p", PLANS, "-device", "cpu", "-o"]
    words += [tmp_path / "out", "--model", f"{towers}:none", "--set", *SHORT]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("epoch 3 of 3") == 1 and load_vlm(tmp_path / "out") is not None


def test_text_masks_can_be_looked_at(trained, tmp_path):
    _, model, _ = trained(AMVLMTrainer, dims=2, size=32)
    files = write_text_masks(model, tmp_path / "masks", n_cases=1)
    assert [file.name for file in files] == ["un_000.png"] and files[0].stat().st_size > 5000
    _, other, _ = trained(SupervisedTrainer, dims=2, size=32, dataset_id=902)
    with pytest.raises(UserError, match="has no text masks"):
        write_text_masks(other, tmp_path / "none")
