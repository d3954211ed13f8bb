"""Vision-language pre-training: retrieval, momentum, gradients, resume, wrong use, and what comes after it."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import write_text_tower, write_vlm
from watching import no_room_for_files_of

from nnunet_semiseg import cli
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import BusyError, DiskError, only_one
from nnunet_semiseg.text.open_clip_models import load_clip
from nnunet_semiseg.trainers.amvlm import AMVLMTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.vlm import losses, pretraining
from nnunet_semiseg.vlm.model import AMVLM, repeat_words
from nnunet_semiseg.vlm.pairs import Pairs, random_crop
from nnunet_semiseg.vlm.pretrained import load_vlm, read_state
from nnunet_semiseg.vlm.pretraining import pretrain
from nnunet_semiseg.vlm.task import PretrainingSettings, PretrainingTask, gather, retrieval
from nnunet_semiseg.vlm.text_mask_pictures import (
    how_well_labels_are_found,
    load_text_masks,
    plot_masks,
    write_text_masks,
)
from nnunet_semiseg.vlm.towers import load_towers, split_model

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
    assert split_model("hf-hub:a/b:none") == ("hf-hub:a/b", "none")
    assert split_model("/a/folder") == ("/a/folder", None) and split_model("/a/folder:none") == ("/a/folder", "none")


def test_no_internet_for_a_network_of_timm(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": True, "HF_HUB_CACHE": str(tmp_path)}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    with pytest.raises(
        UserError, match="^--model timm:resnet18: cannot be loaded .*--model timm:resnet18:none.$"
    ) as error:
        load_towers("timm:resnet18", None, None, str(tmp_path), pretraining.OPTIONS)
    assert "\n" not in str(error.value)


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
    towers_of = (task.momentum.visual, task.momentum.text, task.momentum.distributions)
    assert not any(m.training for part in towers_of for m in part.modules())


def test_heads_end_centred_and_padding_does_not_count(towers):
    """Outputs have mean 0 and spread 1 in each dimension before they are normalised, over words alone."""
    torch.manual_seed(0)
    model = make_task(towers).model.train()
    assert [type(m).__name__ for m in model.heads["text_cls"]] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    features, valid = 5 + torch.randn(3, 4, 16), torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    (a, _, b, _), second, (_, c, _, _) = features
    # at places 1 and 3 of the first text comes its second word: 1 % 2 = 3 % 2 = 1
    repeated = torch.stack([torch.stack([a, b, b, b]), second, torch.stack([c, c, c, c])])
    assert torch.equal(repeat_words(features, valid), repeated)
    outputs = model.heads["text_tokens"](repeat_words(features, valid).flatten(0, 1))
    torch.testing.assert_close(outputs.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.std(0, unbiased=False), torch.ones(16), atol=1e-2, rtol=0)
    projected = model.project("text_tokens", features, valid)
    expected = torch.nn.functional.normalize(outputs, dim=1).view(3, 4, 16)
    torch.testing.assert_close(projected, expected * valid[..., None])
    features[~valid] = 900.0
    assert torch.equal(model.project("text_tokens", features, valid), projected)


def test_the_terms_are_added_as_in_the_public_code(towers, monkeypatch):
    """L_local = 2 + 3, L_ICL = (4 + (5 + 6) / 2) / 2, L_CSS = (7 + 8) / 2, each times its weight."""

    def says(*numbers):
        values = iter(numbers)
        return lambda *_: torch.tensor(float(next(values)))

    task = make_task(towers, itc_weight=0, local_weight=0.1, icl_weight=0.1, css_weight=0.5)
    monkeypatch.setattr(losses, "local_contrast", says(2, 3))
    monkeypatch.setattr(losses, "distribution_contrast", says(4))
    monkeypatch.setattr(losses, "intra_modal_contrast", says(5, 6))
    monkeypatch.setattr(losses, "similarity_supervision", says(7, 8))
    terms = task(torch.randn(2, 3, 32, 32), task.model.tokenize(["one lesion", "two"]))
    expected = {"local": 0.5, "css": 0.5 * 7.5, "icl": 0.1 * (4 + 5.5) / 2}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


def test_momentum_towers_follow(towers):
    task = make_task(towers, momentum=0.9)
    before = [p.clone() for p in task.momentum.parameters()]
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(1)
        task.model.visual.register_buffer("mean", torch.tensor(5.0))  # as a batch norm's
        task.momentum.visual.register_buffer("mean", torch.tensor(0.0))
    task.update_momentum()
    assert task.momentum.visual.mean == 5
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
    return pretrain(
        dataset.id,
        f"{towers}:none",
        output,
        [*(s for s in SHORT if s.split("=")[0] not in {t.split("=")[0] for t in settings}), *settings],
        **chosen,
    )


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
    unfinished = "killed: the pre-training is not finished, 2 of 3 epochs are done: run the same"
    with pytest.raises(UserError, match=unfinished):
        load_vlm(tmp_path / "killed")
    shutil.copy(straight / "vlm.safetensors", tmp_path / "killed")  # as it was before only finished ones were models
    with pytest.raises(UserError, match=unfinished):
        load_vlm(tmp_path / "killed")
    monkeypatch.setattr(pretraining.Pretraining, "train_epoch", train_epoch)
    resumed = run(dataset, towers, tmp_path / "killed", "accumulation=2")
    for name in ("vlm.safetensors", "training_state.safetensors"):
        a, b = load_file(straight / name), load_file(resumed / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    vlm = load_vlm(resumed)
    saved = load_file(resumed / "vlm.safetensors")["heads.text_cls.0.weight"]
    assert torch.equal(vlm.heads["text_cls"][0].weight, saved)
    killed = tmp_path / "killed"
    with pytest.raises(
        UserError, match="killed: holds a pre-training with other values of accumulation, crop: remove this folder"
    ):
        run(dataset, towers, killed, "accumulation=1", "crop=1")
    assert run(dataset, towers, killed, "accumulation=2", "num_workers=1") == killed  # no result depends on that
    texts = json.loads((dataset.raw / "texts.json").read_text())
    (dataset.raw / "texts.json").write_text(json.dumps(texts | {"un_000": "another text"}))
    with pytest.raises(UserError, match="killed: holds a pre-training with other values of texts"):
        run(dataset, towers, killed, "accumulation=2")
    (dataset.raw / "texts.json").write_text(json.dumps(texts))
    state = killed / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(UserError, match="training_state.safetensors: cannot be read .*: remove .* to begin again"):
        run(dataset, towers, killed, "accumulation=2")


def test_the_schedule_continues_at_the_same_place_with_another_number_of_processes(capsys):
    """Two processes have 30 steps in all, and one has 60. So 20 of the former are 40 of the latter.

    OneCycleLR begins with 1 / 25 of the highest rate, and ends with a ten-thousandth of that.
    """

    def training(steps):
        it = pretraining.Pretraining.__new__(pretraining.Pretraining)
        it.task, it.scaler, it.sampler, it.rank = torch.nn.Linear(1, 1), torch.amp.GradScaler(enabled=False), None, 0
        it.device, it.optimizer = torch.device("cpu"), torch.optim.AdamW(it.task.parameters())
        it.scheduler = torch.optim.lr_scheduler.OneCycleLR(it.optimizer, 1.0, steps, cycle_momentum=False)
        return it

    def take(it, steps):
        for _ in range(steps):
            it.optimizer.step()
            it.scheduler.step()

    two, one = training(30), training(60)
    take(two, 20)
    content = {"groups": two.optimizer.state_dict()["param_groups"], "scheduler": two.scheduler.state_dict()}
    content |= {"scaler": {}, "epoch": 2, "history": {}}
    tensors = {f"task.{k}": v for k, v in two.task.state_dict().items()} | {"random.cpu": torch.get_rng_state()}
    one.restore(content, tensors)
    assert one.scheduler.last_epoch == 40 and "another number of processes" in capsys.readouterr().out
    take(one, 19)
    assert one.scheduler.get_last_lr() == [pytest.approx(1 / 25 / 10_000)]


def test_a_pretraining_that_has_just_begun_is_no_model(tmp_path):
    folder = write_vlm(tmp_path / "vlm")
    (folder / "vlm.safetensors").unlink()
    (folder / "vlm.json").write_text(json.dumps({"settings": {"dim": 16, "hidden": 32, "num_epochs": 5}}))
    with pytest.raises(UserError, match="vlm: the pre-training is not finished, 0 of 5 epochs are done"):
        load_vlm(folder)


def test_a_pretraining_without_a_finite_loss_ends_and_keeps_the_epoch_before(dataset, towers, tmp_path, monkeypatch):
    train_epoch, out = pretraining.Pretraining.train_epoch, tmp_path / "out"

    def breaks(self, task):
        means = train_epoch(self, task)
        return means | ({"icl": float("nan"), "loss": float("nan")} if self.epoch == 1 else {})

    monkeypatch.setattr(pretraining.Pretraining, "train_epoch", breaks)
    message = "out: epoch 2: the loss is nan .of icl.: .* begin in another folder .-o. with a smaller learning_rate"
    with pytest.raises(UserError, match=message):
        run(dataset, towers, out)
    assert read_state(out)["epoch"] == 1 and not (out / "vlm.safetensors").exists()


def test_two_pretrainings_and_a_full_disk(dataset, towers, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with only_one(out / "training.lock", "pre-trains"), pytest.raises(BusyError, match="out/training.lock: process"):
        run(dataset, towers, out)
    assert not list(out.iterdir())
    with no_room_for_files_of(20_000), pytest.raises(DiskError, match="training_state.safetensors: cannot be written"):
        run(dataset, towers, out)
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.lock"))


def test_a_damaged_model_is_said_to_be_one(tmp_path):
    folder = write_vlm(tmp_path / "vlm")
    weights = folder / "vlm.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="vlm.safetensors: cannot be read .*: name the folder that"):
        load_vlm(folder)
    for content, words in (
        ("{}", 'has no "settings"'),
        ('{"settings": 5}', '"settings" is 5, but must be an object'),
        ('{"settings": {"hidden": 8}}', '"settings" has no "dim"'),
        ('{"settings": {"dim": "a", "hidden": 8}}', "\"dim\" is 'a', but must be a whole number"),
        ('{"settings": {"dim": 0, "hidden": 8}}', "dim and hidden must be 1 or more"),
        ("[" * 100_000, "not valid JSON"),
    ):
        (folder / "vlm.json").write_text(content)
        with pytest.raises(UserError, match=f"vlm.json: .*{words}.*: name the folder that"):
            load_vlm(folder)


def test_a_hugging_face_text_tower_comes_back_without_what_it_was_made_of(dataset, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "bert"
    folder.mkdir()
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16}
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": "mlp", "context_length": 12}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "0", "1", "2", "lesions", "dark", "spots"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertConfig(vocab_size=len(words), **sizes).save_pretrained(folder)
    output = run(dataset, folder, tmp_path / "out", "num_epochs=1")
    before = load_vlm(output)
    shutil.rmtree(folder)
    after = load_vlm(output.rename(tmp_path / "moved"))
    ids = before.tokenize(["2 dark spots"])
    assert torch.equal(ids, after.tokenize(["2 dark spots"])) and len(set(ids[0].tolist())) > 4
    assert torch.equal(before.encode_text(ids).cls, after.encode_text(ids).cls)


@pytest.mark.parametrize("epochs, warmup", [(10, 0.1), (2, 0.5), (1, 0.0), (3, 1.0)])
def test_a_warmup_as_long_as_a_step_or_as_all(epochs, warmup, dataset, towers, tmp_path):
    settings = f"num_epochs={epochs}", f"warmup={warmup}", "batch_size=7"  # one step an epoch
    assert (run(dataset, towers, tmp_path / "out", *settings) / "vlm.safetensors").is_file()


def test_a_last_short_window_counts_as_much():
    """Three batches in windows of two: gradients are the mean of two, and then of one."""

    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(1, 1, bias=False)

        def forward(self, x, _):
            return {"itc": (self.model.weight * x).sum()}

        def update_momentum(self):
            pass

    seen, task = [], Task()
    weight = task.model.weight
    optimizer = SimpleNamespace(
        step=lambda: seen.append(weight.grad.item()), zero_grad=lambda set_to_none: setattr(weight, "grad", None)
    )
    loader = [(torch.tensor([x]), torch.zeros(1)) for x in (0.1, 0.3, 0.5)]
    own = SimpleNamespace(
        settings=SimpleNamespace(accumulation=2), task=task, sampler=None, epoch=0, rank=0, loader=loader,
        device=torch.device("cpu"), scaler=torch.amp.GradScaler(enabled=False), optimizer=optimizer,
        scheduler=SimpleNamespace(step=lambda: None),
    )  # fmt: skip
    pretraining.Pretraining.train_epoch(own, task)
    assert seen == pytest.approx([0.2, 0.5])


def test_itc_has_the_momentum_towers_keys(towers):
    """With momentum towers that know one direction only, what is contrasted is the same for all."""
    task = make_task(towers, itc_weight=1, css_weight=0, local_weight=0, icl_weight=0).eval()
    images, ids = torch.randn(3, 3, 32, 32), task.model.tokenize(["one lesion", "two", "a b c d"])
    with torch.no_grad():
        for head in task.momentum.heads.values():
            head[-2].weight.zero_()
            head[-2].bias.fill_(1.0)
    assert task(images, ids)["itc"].item() == pytest.approx(math.log(3), abs=1e-5)


def test_within_a_modality_gradients_reach_both_towers_and_padding_none(towers):
    """L_ICL without its part between the distributions."""
    task = make_task(towers, itc_weight=0, css_weight=0, local_weight=0, icl_weight=1)
    images, ids = torch.randn(3, 3, 32, 32), task.model.tokenize(["one lesion", "two", "a b c d"])
    calls = []
    intra = losses.intra_modal_contrast

    def recorded(cls, tokens, valid, t):
        calls.append((cls.requires_grad, tokens.requires_grad, valid))
        return intra(cls, tokens, valid, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "intra_modal_contrast", recorded)
        task(images, ids)
    (_, _, all_patches), (_, _, of_words) = calls
    assert all(cls and tokens for cls, tokens, _ in calls) and all_patches.all()
    assert torch.equal(of_words, task.model.tokenize.words(ids)) and not of_words.all()


def test_tokens_and_what_they_find_have_distributions_of_their_own_and_weights_from_cls(towers):
    task = make_task(towers, css_weight=1, itc_weight=0, local_weight=0, icl_weight=0).eval()
    images, ids = torch.randn(2, 3, 32, 32), task.model.tokenize(["one lesion", "a b c d"])
    image, text = task.model(images, ids)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "similarity_supervision", lambda *args: seen.append(args) or torch.zeros(()))
        task(images, ids)
    t = task.settings.temperature
    for (name, own, other), args in zip((("image", image, text), ("text", text, image)), seen, strict=True):
        tokens, found, of_tokens, of_found, weights, valid, temperature = args
        torch.testing.assert_close(found, losses.counterparts(own.tokens, other.tokens, other.valid, t))
        expected = task.model.distribution(name, other.cls, found, own.valid)[1]
        torch.testing.assert_close(of_found, expected)
        assert not torch.allclose(of_tokens[0], of_found[0])
        scores = (own.tokens @ own.cls[..., None])[..., 0] / t
        attention = scores.masked_fill(~own.valid, -torch.inf).softmax(1)
        torch.testing.assert_close(weights, losses.token_weights(attention, own.valid))
        assert torch.equal(tokens, own.tokens) and torch.equal(valid, own.valid) and temperature == t


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_taken_across_the_axis_that_was_asked_for(axis, towers):
    """A volume that changes along one axis only: its slices across that axis are flat."""
    shape = [1, 5, 6, 7]
    along = torch.arange(float(shape[axis + 1])).view(*[-1 if i == axis else 1 for i in range(3)])
    data = SimpleNamespace(load_case=lambda case: (along.expand(shape).numpy(),))
    model = AMVLM(*load_clip(str(towers), "none"), 16, 32)
    for crop in (None, 0.9):
        flat = [Pairs(data, {"a": "b"}, ["a"], model, other, crop)[0][0].std((1, 2)).max() < 1e-3 for other in range(3)]
        assert flat == [other == axis for other in range(3)]


def test_gradients_come_back_from_all_processes(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        x = torch.ones(2, 3, requires_grad=True)
        (2 * gather(x)).sum().backward()
        assert x.grad is not None and (x.grad == 2).all()
    finally:
        torch.distributed.destroy_process_group()


def test_an_overlay_shows_the_mask_before_and_after_pamr():
    image, raw, mask = torch.zeros(4, 4), torch.full((1, 4, 4), 0.25), torch.full((1, 4, 4), 0.75)
    text, before, after = plot_masks(image, raw, mask, ["costs $^$ two"]).axes
    assert text.get_title() == "costs $^$ two" and len(text.images) == 1
    assert (before.images[1].get_array() == 0.25).all() and (after.images[1].get_array() == 0.75).all()


def test_how_well_labels_are_found_by_hand():
    """Slices of 2 x 2; the label is the first pixel, and pixel 3 of the first case is ignored."""
    image = np.array([[[[0.9, 0.1], [0.5, 1.0]]]])
    labels = {"a": [[1, 0], [0, 2]], "b": [[1, 0], [0, 0]], "c": [[0, 0], [0, 0]]}
    trained = SimpleNamespace(
        data=SimpleNamespace(load_case=lambda case: (image, [[labels[case]]])),
        labeled_cases=list(labels), texts={case: {"lesion": [case]} for case in "ab"} | {"c": {"lesion": ["a"]}},
        labels=[1], ignore_label=2,
        # the text "a" means the image, "b" its opposite; before PAMR there is nothing
        of=lambda image, texts: (torch.zeros_like(image), image if texts["lesion"] == ["a"] else -image),
    )  # fmt: skip
    found = how_well_labels_are_found(trained)
    # case a: 0.9 is above 0.1 and 0.5; case b: -0.9 is above -1.0 alone, one pair of three; case c has no label
    assert found["before PAMR"] == 0.5 and found["after it"] == pytest.approx((1 + 1 / 3) / 2)
    # case a with "b": below both; case b with "a": above two of three
    assert found["with the next case's text"] == pytest.approx((0 + 2 / 3) / 2)
    assert how_well_labels_are_found(SimpleNamespace(labeled_cases=["x"], texts={})) == {}


def test_the_largest_slice_of_a_volume_is_looked_at_and_every_region_counts():
    label = np.zeros((1, 3, 2, 2), int)
    label[0, 2], label[0, 1, 0, 0] = [[1, 2], [0, 0]], 1
    image = np.zeros((1, 3, 2, 2))
    image[0, 2] = [[0.9, 0.2], [0.1, 0.5]]
    trained = SimpleNamespace(
        data=SimpleNamespace(load_case=lambda case: (image, label)),
        labeled_cases=["a"], texts={"a": {}}, labels=[(1, 2), (2,)], ignore_label=None,
        of=lambda image, texts: (image.repeat(2, 1, 1), image.repeat(2, 1, 1)),
    )  # fmt: skip
    # (1, 2): 0.9 above both, 0.2 above 0.1 alone: 3 of 4; 2: 0.2 above 0.1 alone: 1 of 3
    assert how_well_labels_are_found(trained)["before PAMR"] == pytest.approx((3 / 4 + 1 / 3) / 2)


def test_the_default_weights_are_the_papers():
    s = PretrainingSettings()
    assert (s.itc_weight, s.css_weight, s.local_weight, s.icl_weight) == (1.0, 0.5, 0.1, 0.1)


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
        (["--model", f"{towers}:none", "-c", "3d_fullres"], "no configuration 3d_fullres: use 2d"),
        (["--model", "ViT-B-33:openai"], "--model ViT-B-33"),
        (["--model", str(tmp_path)], "the folder has no open_clip_config.json"),
        (["--model", f"{towers}:none", "--set", "dim=5"], "setting dim=5: must be even"),
        (["--model", f"{towers}:none", "--set", "seed=5000000000"], "seed=5000000000: must be"),
        (["--model", f"{towers}:none", "--set", *(f"{n}_weight=0" for n in ("itc", "css", "local", "icl"))], "above 0"),
        (["--model", "timm:resnet1"], "--model timm:resnet1: is not a model of timm: did you mean resnet1"),
        (["--model", f"{towers}:none", "--set", "text_model=bert"], "text_model=bert: must be wordllama, or"),
        (["--model", f"{towers}:none", "--set", "fold=7"], "splits_final.json: has no fold 7"),
        (["--model", f"{towers}:none", "--set", "num_labeled=9"], "the fold has 4 labelled training cases"),
        (["--model", f"{towers}:none", "-o", str(dataset.raw / "dataset.json")], "dataset.json: is a file: name a"),
    ):
        assert cli.main([*common, *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and len(error.splitlines()) == 1, error
    assert not out.exists()


def test_an_image_network_of_timms_with_words_and_labels(dataset, tmp_path):
    """Without a ViT, without a download; and what labels it saw is written down."""
    output = run(dataset, "timm:test_resnet", tmp_path / "out", "num_epochs=1", "fold=0", "num_labeled=2")
    about, weights = json.loads((output / "vlm.json").read_text()), load_file(output / "vlm.safetensors")
    assert about["settings"]["text_model"] == "wordllama" and len(about["mask_cases"]) <= 2
    folds = json.loads((dataset.preprocessed / "splits_final.json").read_text())
    assert set(about["mask_cases"]) <= set(folds[0]["train"])
    assert not any(key.startswith("text.") for key in weights)  # they come with the package
    seen = f"It used the labels of {len(about['mask_cases'])} cases: it is for trainings of fold 0 with num_labeled=2."
    assert pretraining.what_it_saw(output) == seen
    vlm = load_vlm(output.rename(tmp_path / "moved"))
    ids = vlm.tokenize(["two lesions", "lesions two", "a dark spot"])
    first, second, third = vlm.encode_text(ids).cls
    torch.testing.assert_close(first, second)  # it knows no order
    assert not torch.allclose(first, third, atol=1e-2) and not list(vlm.text.parameters())
    image = vlm.encode_image(torch.randn(1, 3, *vlm.image_size))
    assert image.tokens.shape == (1, vlm.grid[0] * vlm.grid[1], 16)


def test_some_labels_are_left_to_the_training(dataset):
    def seen(share):
        cases = [f"tr_{i}" for i in range(8)]
        return pretraining.cases_with_masks(dataset.name, cases, PretrainingSettings(mask_held_out=share))[0]

    assert len(seen(0.25)) == 6 and len(seen(0)) == 8 and seen(0.25) == seen(0.25)


@pytest.mark.parametrize("name, depth", [("test_vit", 1), ("test_resnet", 2), ("test_convnext", 2)])
def test_patches_are_of_16_pixels_where_a_network_has_such(name, depth):
    """Of images of 160 pixels; the deepest features of the others are of 32."""
    options = {"model": "", "pretrained": "", "cache_dir": ""}
    model = AMVLM(*load_towers(f"timm:{name}", "none", None, None, options)[:2], 16, 32)
    assert (model.depth, model.grid) == (depth, (10, 10))


def test_labels_are_seen_where_they_may_be(towers):
    """A label of two columns of four on a grid of 4 x 4 patches; the last pixels are ignored."""
    label = np.zeros((1, 1, 32, 32), int)
    label[..., :12], label[..., 28:] = 1, 2
    data = SimpleNamespace(load_case=lambda case: (np.random.rand(1, 1, 32, 32), label))
    model = AMVLM(*load_clip(str(towers), "none"), 16, 32)
    pairs = Pairs(data, {"a": "b", "c": "d"}, ["a", "c"], model, 0, None, ["a"], 2)
    assert pairs[0][2].tolist() == [[1, 0.5, 0, 0]] * 4 and (pairs[1][2] == -1).all()
    assert 0 < Pairs(data, {"a": "b"}, ["a"], model, 0, 0.5, ["a"], 2)[0][2].mean() < 1  # cut with the image
    task = make_task(towers, itc_weight=1, css_weight=0, local_weight=0, icl_weight=0, mask_weight=2)
    images, ids, areas = (torch.stack(x) for x in zip(pairs[0], pairs[1], strict=True))
    terms = task(images, ids, areas)
    assert list(terms) == ["itc", "mask"] and terms["mask"] > 0
    assert task(images, ids, torch.full_like(areas, -1))["mask"] == 0


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
    masks = load_text_masks(model)
    files = write_text_masks(masks, tmp_path / "masks", n_cases=1)
    assert [file.name for file in files] == ["un_000.png"] and files[0].stat().st_size > 5000
    assert all(0 <= area <= 1 for area in how_well_labels_are_found(masks).values())
    with pytest.raises(UserError, match="is a file: name a folder"):
        write_text_masks(masks, files[0])
    _, other, _ = trained(SupervisedTrainer, dims=2, size=32, dataset_id=902)
    with pytest.raises(UserError, match="has no text masks"):
        load_text_masks(other)


def test_what_a_loaders_process_could_not_read_is_one_line(monkeypatch):
    """torch hands it on with the stack of that process."""
    handed_on = (
        "Caught UserError in DataLoader worker process 0.\nTraceback ...\nnnunet_semiseg.errors.UserError: /a/b.*: no"
    )
    training = pretraining.Pretraining.__new__(pretraining.Pretraining)
    training.settings, training.sampler, training.epoch, training.task = PretrainingSettings(), None, 0, None
    monkeypatch.setattr(training, "load", lambda: None)
    for text, line in {handed_on: "/a/b.*: no", "/a/c: half": "/a/c: half"}.items():
        monkeypatch.setattr(training, "train_epoch", Mock(side_effect=UserError(text)))
        with pytest.raises(UserError) as error:
            training.run()
        assert str(error.value) == line
