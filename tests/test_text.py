"""Prompts, text tower, prompt learner: on tiny towers with random weights, and without the internet."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nnunet_semiseg.commands.text import EMBED_OPTIONS
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.text.encoder import TextTower, load_text_tower
from nnunet_semiseg.text.prompt_learner import (
    EmbeddingLearner,
    PromptLearner,
    build_prompt_learner,
    embed_prompts,
    load_embeddings,
    save_embeddings,
)
from nnunet_semiseg.text.prompts import class_names, read_prompts
from nnunet_semiseg.vlm.pretraining import OPTIONS

TEXTS = ["liver", "a computerized tomography of the pancreas", "left kidney"]
PROMPTS = {"background": ("background",), "liver": ("liver", "the liver of a patient"), "spleen": ("spleen",)}
LABELS = {"labels": {"background": 0, "liver": 1, "spleen": 2}}
DIM, WIDTH, CONTEXT = 6, 32, 16


def write_model(folder, text=(), **model):
    """A folder with the configuration of a tiny model, in open_clip's format."""
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
    text = {"context_length": CONTEXT, "width": WIDTH, "heads": 2, "layers": 2} | dict(text)
    config = {"embed_dim": DIM, "vision_cfg": vision, "text_cfg": text} | model
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return str(folder)


def write_weights(folder, name="open_clip_model.safetensors", seed=7):
    """Weights drawn anew, saved as open_clip has them, and the whole model."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).eval()
    save_file(model.state_dict(), os.path.join(folder, name))
    return model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("text") / "clip")


@pytest.fixture
def tower(clip_folder):
    return load_text_tower(clip_folder, "none")


def same_as_open_clip(model, tower, tokenizer):
    ids = tower.tokenize(TEXTS)
    ours = tower(tower.embed_tokens(ids), ids)
    with torch.no_grad():
        theirs = model.encode_text(tokenizer(TEXTS), normalize=False)
    assert ours.shape == (len(TEXTS), theirs.shape[1])
    assert theirs.std(0).min() > 1e-5  # the texts differ, so equality says something
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return ids


# ---- classes and prompts


def test_classes_follow_the_segmentation_heads():
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    labels = {"spleen": 2, "background": 0, "liver": 1, "ignore": 3}
    assert class_names({"labels": labels}) == ["background", "liver", "spleen"]
    assert len(class_names({"labels": labels})) == LabelManager(labels, None).num_segmentation_heads


def test_regions_keep_their_order_and_have_a_background():
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    labels = {"whole": [1, 2, 3], "background": 0, "core": [2, 3], "enhancing": 3, "ignore": 4}
    names = class_names({"labels": labels})
    assert names == ["background", "whole", "core", "enhancing"]
    regions = [tuple(r) if isinstance(r, list) else r for r in (labels[name] for name in names[1:])]
    assert LabelManager(labels, [1, 2, 3]).foreground_regions == regions


def test_prompts_default_to_names_and_come_in_the_order_of_the_classes():
    assert read_prompts(LABELS) == {k: (k,) for k in ("background", "liver", "spleen")}
    given = {"spleen": ["the spleen", " a spleen "], "liver": "the liver"}
    prompts = read_prompts(LABELS | {"semiseg": {"prompts": given}})
    assert list(prompts.items()) == [
        ("background", ("background",)),
        ("liver", ("the liver",)),
        ("spleen", ("the spleen", "a spleen")),
    ]


@pytest.mark.parametrize(
    "section, message",
    [
        ({"prompts": {"liver": "x", "spleeen": "y"}}, '"spleeen".* did you mean spleen'),
        ({"prompts": {"liver": "x"}}, '"spleen" has no prompt'),
        ({"prompts": {"liver": "x", "spleen": " "}}, '"spleen" is empty'),
        ({"prompts": {"liver": "x", "spleen": []}}, '"spleen" is empty'),
        ({"prompts": {"liver": "x", "spleen": 3}}, '"spleen": 3 is not a text'),
        ({"prompts": {"liver": "x", "spleen": ["y", None]}}, "is not a text"),
        ({"prompts": ["x"]}, "must map"),
        ({"prompt": {"liver": "x"}}, 'rename it to "prompts"'),
        ("x", "must be like"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(section, message):
    with pytest.raises(UserError, match=message) as error:
        read_prompts(LABELS | {"semiseg": section}, source="raw/dataset.json")
    assert str(error.value).startswith("raw/dataset.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [{"a": 1}, {"background": 0, "a": 1, "b": 1}])
def test_labels_without_background_or_with_a_value_twice_are_refused(labels):
    with pytest.raises(UserError, match='dataset.json: .* value.* "labels"'):
        class_names({"labels": labels})


# ---- the tower


@pytest.mark.parametrize(
    "text, model, cut",
    [
        ({}, {}, True),  # CLIP, its text parts attributes of the model
        ({}, {"quick_gelu": True}, True),
        ({}, {"custom_text": True}, True),
        (
            {"proj_type": "none", "width": DIM * 4, "heads": 2},
            {"embed_dim": DIM * 4, "custom_text": True},
            True,
        ),
        ({"pool_type": "eos", "eos_id": 49407, "proj_bias": True}, {"custom_text": True}, True),
        ({"no_causal_mask": True, "pool_type": "last"}, {"custom_text": True}, False),  # as SigLIP
        ({"embed_cls": True}, {"custom_text": True}, False),  # as CoCa
    ],
)
def test_features_without_context_equal_open_clips(tmp_path, text, model, cut):
    import open_clip

    folder = write_model(tmp_path / "model", text, **model)
    whole = write_weights(folder)
    tower = load_text_tower(folder, "openai")  # a folder passes over the tag
    ids = same_as_open_clip(whole, tower, open_clip.get_tokenizer(f"local-dir:{folder}"))
    assert tower.trained
    assert (ids.shape[1] < CONTEXT) == cut
    assert not any("visual" in name for name, _ in tower.named_parameters())


def test_cutting_the_padding_off_changes_nothing(tower):
    ids = tower.tokenize(TEXTS)
    padded = F.pad(ids, (0, CONTEXT - ids.shape[1]))
    assert ids.shape[1] < CONTEXT
    torch.testing.assert_close(
        tower(tower.embed_tokens(ids), ids), tower(tower.embed_tokens(padded), padded), rtol=1e-5, atol=1e-6
    )


def test_placeholders_stand_between_start_and_text(tower):
    plain, ids = tower.tokenize(TEXTS), tower.tokenize(TEXTS, n_ctx=3)
    assert tower.tokenize.start == 1
    assert torch.equal(ids[:, :1], plain[:, :1]) and torch.equal(ids[:, 4:], plain[:, 1:])
    assert (ids[:, 1:4] != 0).all()  # not padding, which some towers mask
    assert torch.equal(ids.argmax(1), plain.argmax(1) + 3)  # the end token, where CLIP pools
    assert (tower.tokenize([""], 3).argmax(1) == 4).all()  # also without any text


def test_context_tokens_equal_words_with_these_embeddings(tower):
    """Four placeholders given the embeddings of words are these words."""
    ids = tower.tokenize(["liver of a young patient"])
    words = tower.tokenize(["patient"], n_ctx=4)
    embeddings = tower.embed_tokens(words).clone()
    embeddings[:, 1:5] = tower.embed_tokens(ids)[:, 1:5]
    torch.testing.assert_close(tower(embeddings, words), tower(tower.embed_tokens(ids), ids))


def test_too_long_prompts_are_refused_and_named(tower):
    fits = "a " * (CONTEXT - 2)
    assert tower.tokenize([fits]).shape == (1, CONTEXT)
    assert tower.tokenize(["a " * (CONTEXT - 6)], n_ctx=4).shape == (1, CONTEXT)
    for text, n_ctx in [(fits + "b", 0), (fits, 1), ("b " * 500, 0)]:
        of_these = f", {n_ctx} of" if n_ctx else ":"
        with pytest.raises(UserError, match=f'^"{text[:70].strip()}.*too long.*{CONTEXT} tokens{of_these}'):
            tower.tokenize(["liver", text], n_ctx)
    with pytest.raises(UserError, match='^dataset.json: prompt "a a .* is too long: .*fewer context tokens than 1'):
        PromptLearner(tower, {"background": ("a",), "organ": (fits,)}, n_ctx=1)
    with pytest.raises(UserError, match='^dataset.json: prompt "a a .* is too long: .*: shorten it$'):
        PromptLearner(tower, {"background": ("a",), "organ": (fits + "b",)}, n_ctx=0)


def test_words_are_neither_start_nor_end_nor_padding(tower):
    ids = tower.tokenize(["liver", "a small liver"])
    words = tower.tokenize.words(ids)
    assert words.shape == ids.shape and words.sum(1).tolist() == [1, 3] and not words[:, 0].any()


def test_an_untrained_tower_is_the_same_every_time(clip_folder):
    torch.manual_seed(1)
    expected_next = torch.rand(1)
    torch.manual_seed(1)
    first = load_text_tower(clip_folder, "none")
    assert torch.equal(torch.rand(1), expected_next)  # and leaves the random stream alone
    second = load_text_tower(clip_folder, "none")
    assert not first.trained
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_file_gives_the_weights(tmp_path, clip_folder):
    import open_clip

    folder = write_model(tmp_path / "model")
    whole = write_weights(folder, "elsewhere.ckpt.safetensors")
    tower = load_text_tower(clip_folder, os.path.join(folder, "elsewhere.ckpt.safetensors"))
    assert tower.trained
    same_as_open_clip(whole, tower, open_clip.get_tokenizer(f"local-dir:{folder}"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is on its way out, the files remain
def test_openais_torchscript_files_load_and_mean_quick_gelu(tmp_path, clip_folder):
    import open_clip

    torch.manual_seed(3)
    whole = open_clip.create_model(f"local-dir:{clip_folder}", load_weights=False, force_quick_gelu=True).eval()

    class Weights(torch.nn.Module):  # the weights of a model in an archive, as OpenAI published theirs
        def forward(self, x):
            return x

    archive = Weights()
    for name, child in whole.named_children():
        archive.add_module(name, child)
    for name, parameter in whole.named_parameters(recurse=False):
        archive.register_parameter(name, parameter)
    file = tmp_path / "ViT.pt"
    torch.jit.trace(archive, torch.ones(1)).save(str(file))
    tower = load_text_tower(clip_folder, str(file))
    same_as_open_clip(whole, tower, open_clip.get_tokenizer(f"local-dir:{clip_folder}"))


def test_hugging_face_towers(tmp_path):
    transformers = pytest.importorskip("transformers")
    import open_clip

    folder = tmp_path / "model"
    write_model(folder, {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": "mlp"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "x", "a", "b", *" ".join(TEXTS).split()]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    transformers.BertConfig(vocab_size=len(words), **sizes).save_pretrained(folder)
    whole = write_weights(str(folder))
    tower = load_text_tower(str(folder), None)
    ids = same_as_open_clip(whole, tower, open_clip.get_tokenizer(f"local-dir:{folder}"))
    assert tower.tokenize.start == 1 and ids.shape[1] == 8
    with pytest.raises(UserError, match="too long"):
        tower.tokenize(["a " * (CONTEXT - 1)])
    learner = PromptLearner(tower, {"background": ("x",), "liver": TEXTS[:2]}, n_ctx=2)
    learner()[:, 0].sum().backward()
    assert (learner.ctx.grad.abs().sum(-1) > 0).all()


def test_hugging_face_towers_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("open_clip.hf_model.transformers", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_model(tmp_path / "model", {"hf_model_name": "bert", "hf_tokenizer_name": "bert"})
    with pytest.raises(UserError, match="pip install transformers"):
        load_text_tower(folder, "none")


# ---- weights that cannot be had


def test_no_internet_names_three_ways_out(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = time.monotonic()
    with pytest.raises(UserError) as error:
        load_text_tower("ViT-B-32", "openai", str(tmp_path))
    message = str(error.value)
    assert "\n" not in message
    assert "--set text_pretrained=FILE --set text_model=ViT-B-32-quickgelu" in message
    assert "--set text_cache_dir=DIR" in message
    assert "nnunet_semiseg embed_prompts -d ID -o FILE.safetensors" in message
    assert "--set text_embeddings=FILE.safetensors" in message
    assert time.monotonic() - before < 5
    with pytest.raises(UserError, match="--set text_model=FOLDER"):
        load_text_tower("hf-hub:microsoft/BiomedCLIP", None, str(tmp_path))


def test_a_cache_folder_filled_elsewhere_needs_no_internet(tmp_path, monkeypatch):
    import open_clip
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--me--tiny"  # as huggingface_hub lays it out
    for folder in (cached / "refs", cached / "snapshots"):
        folder.mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    folder = write_model(cached / "snapshots" / "0123")
    whole = write_weights(folder)
    tower = load_text_tower("hf-hub:me/tiny", "openai", str(tmp_path))
    same_as_open_clip(whole, tower, open_clip.get_tokenizer(f"local-dir:{folder}"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text_tower("hf-hub:me/tiny", "openai", str(tmp_path / "other"))


@pytest.mark.parametrize("status, offline", [(200, False), (403, False), (503, True), (None, True)])
def test_the_cache_is_used_at_once_when_the_hub_does_not_answer(monkeypatch, status, offline):
    import huggingface_hub

    from nnunet_semiseg.text.open_clip_models import _hub_or_cache

    class Session:
        def head(self, url, timeout):
            assert timeout <= 5
            if status is None:
                raise OSError("no route")
            return SimpleNamespace(status_code=status)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with _hub_or_cache(True):
        assert huggingface_hub.constants.HF_HUB_OFFLINE == offline
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_bad_sources_are_refused(tmp_path, clip_folder):
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    for model, pretrained, message in [
        ("ViT-B-33", "openai", "text_model=ViT-B-33.*did you mean ViT-B-32"),
        (str(tmp_path), "openai", "no open_clip_config.json"),
        ("ViT-B-32", "opnai", "text_pretrained=opnai: is neither a file nor a tag.*openai"),
        ("ViT-B-32", None, "one of its tags: openai"),
        (clip_folder, "openai", "weights cannot be loaded"),  # a folder without weights
        (clip_folder, str(tmp_path / "broken.pt"), "broken.pt: not a readable checkpoint"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_text_tower(model, pretrained)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, model, pretrained, message",
    [
        (EMBED_OPTIONS, "ViT-B-33", "openai", "^-model ViT-B-33: is neither"),
        (EMBED_OPTIONS, "ViT-B-32", "opnai", "^-pretrained opnai: is neither"),
        (EMBED_OPTIONS, "ViT-B-32", "openai", "-pretrained FILE -model ViT-B-32-quickgelu.*-cache_dir DIR. "),
        (OPTIONS, "ViT-B-32", "opnai", "^--model ViT-B-32:opnai: is neither"),
        (OPTIONS, "ViT-B-32", "openai", r"use a local checkpoint \(--model ViT-B-32-quickgelu:FILE\)"),
        (OPTIONS, "ViT-B-32", "laion2b_e16", r"use a local checkpoint \(--model ViT-B-32:FILE\)"),
        (OPTIONS, "hf-hub:a/b", None, "^--model hf-hub:a/b: the weights cannot be loaded.*--model FOLDER"),
    ],
)
def test_messages_name_the_options_of_their_command(tmp_path, monkeypatch, options, model, pretrained, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as error:
        load_text_tower(model, pretrained, str(tmp_path), options)
    assert "text_model=" not in str(error.value) and "text_pretrained=" not in str(error.value)


# ---- the learner


def test_every_context_token_learns_and_the_tower_does_not(tower):
    torch.manual_seed(0)
    learner = PromptLearner(tower, PROMPTS, n_ctx=4).train()
    assert list(learner.state_dict()) == ["ctx"] and [n for n, _ in learner.named_parameters()] == ["ctx"]
    assert learner.ctx.shape == (3, 4, WIDTH) and learner.feature_shape == (3, DIM)
    before, frozen = learner.ctx.detach().clone(), [p.clone() for p in tower.parameters()]
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    features = learner()
    (features * torch.randn(3, DIM)).sum().backward()
    optimizer.step()
    assert (learner.ctx.grad.abs().amax(-1) > 0).all()
    assert ((learner.ctx - before).abs().amax(-1) > 0).all()
    assert not any(module.training for module in tower.modules())
    assert not tower.train().training
    assert all(p.grad is None and not p.requires_grad for p in tower.parameters())
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), frozen, strict=True))


def test_a_classs_context_reaches_no_other_class(tower):
    learner = PromptLearner(tower, PROMPTS)
    learner()[1, 0].backward()
    assert learner.ctx.grad[1].abs().sum() > 0
    assert learner.ctx.grad[[0, 2]].abs().sum() == 0


def test_prompts_of_a_class_are_averaged_after_normalisation(tower):
    learner = PromptLearner(tower, PROMPTS, n_ctx=2)

    def feature(k, text):
        ids = tower.tokenize([text], n_ctx=2)
        embeddings = tower.embed_tokens(ids).clone()
        embeddings[0, 1:3] = learner.ctx[k]
        return F.normalize(tower(embeddings, ids)[0], dim=0)

    liver = (feature(1, "liver") + feature(1, "the liver of a patient")) / 2
    expected = torch.stack([feature(0, "background"), liver / liver.norm(), feature(2, "spleen")])
    torch.testing.assert_close(learner(), expected, rtol=1e-5, atol=1e-6)


def test_features_are_normalised_float32_also_under_autocast(tower):
    learner = PromptLearner(tower, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = learner()
    assert features.dtype == torch.float32
    assert torch.equal(features, learner())
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_moving_the_learner_moves_the_tower(tower):
    learner = PromptLearner(tower, PROMPTS).to("meta")
    assert {p.device.type for p in tower.parameters()} == {"meta"}
    assert {b.device.type for b in learner.buffers()} == {learner.ctx.device.type} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_are_the_same_on_a_gpu(tower):
    learner = PromptLearner(tower, PROMPTS)
    expected = learner()
    with torch.autocast("cuda"):
        features = learner.to("cuda")()
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_learner_resumes_from_its_own_state(clip_folder, tower):
    learner = PromptLearner(tower, PROMPTS)
    again = PromptLearner(load_text_tower(clip_folder, "none"), PROMPTS)
    again.load_state_dict(learner.state_dict())
    assert torch.equal(again(), learner())


def test_an_offset_learns_from_embeddings():
    torch.manual_seed(0)
    embeddings = torch.randn(3, DIM)
    learner = EmbeddingLearner(embeddings)
    torch.testing.assert_close(learner(), F.normalize(embeddings, dim=1))
    assert list(learner.state_dict()) == ["offset"] and learner.feature_shape == (3, DIM)
    (learner() * torch.randn(3, DIM)).sum().backward()
    assert (learner.offset.grad.abs().amax(-1) > 0).all()


# ---- embeddings made beforehand, and settings


def test_embeddings_come_back_and_others_are_refused(tmp_path):
    path = tmp_path / "text.safetensors"
    embeddings = torch.randn(3, DIM)
    save_embeddings(path, embeddings, PROMPTS, "ViT-B-32 openai")
    assert torch.equal(load_embeddings(path, PROMPTS), embeddings)
    assert [p.name for p in tmp_path.iterdir()] == ["text.safetensors"]
    (tmp_path / "broken").write_bytes(b"x")
    for file, prompts, message in [
        (tmp_path / "missing", PROMPTS, "missing: no such file"),
        (tmp_path / "broken", PROMPTS, "broken: not a readable file"),
        (
            path,
            {"background": ("background",), "liver": ("liver",)},
            "for the classes background, liver, spleen, but",
        ),
        (path, dict(reversed(PROMPTS.items())), "made for the classes"),
        (
            path,
            PROMPTS | {"spleen": ("a spleen",)},
            r'other prompts for spleen \(\["spleen"\], now \["a spleen"\]\)',
        ),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_embeddings(file, prompts)
        assert f"embed_prompts -d ID -o {file}" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no folder"):
        save_embeddings(tmp_path / "nowhere" / "x", embeddings, PROMPTS, "m")
    for bad in (embeddings[:2], embeddings * torch.nan):
        save_embeddings(path, bad, PROMPTS, "m")
        with pytest.raises(UserError, match="finite"):
            load_embeddings(path, PROMPTS)


def test_learners_from_settings(tmp_path, clip_folder):
    settings = SimpleNamespace(
        text_model=clip_folder, text_pretrained="none", text_cache_dir=None, text_embeddings=None, n_ctx=3
    )
    learner = build_prompt_learner(settings, LABELS)
    assert isinstance(learner, PromptLearner) and learner.ctx.shape == (3, 3, WIDTH) and not learner.trained
    path = tmp_path / "text.safetensors"
    assert embed_prompts(LABELS, clip_folder, "none", None, path) is False
    settings.text_embeddings = str(path)
    learner = build_prompt_learner(settings, LABELS)
    assert isinstance(learner, EmbeddingLearner) and learner.feature_shape == (3, DIM) and not learner.trained
    plain = PromptLearner(load_text_tower(clip_folder, "none"), read_prompts(LABELS), n_ctx=0)
    torch.testing.assert_close(learner(), plain())


def test_open_clip_is_imported_where_it_is_used():
    code = (
        "import sys; sys.modules['open_clip'] = sys.modules['huggingface_hub'] = None\n"
        "import nnunet_semiseg.text.encoder, nnunet_semiseg.text.prompt_learner, nnunet_semiseg.text.prompts"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tower_needs_no_open_clip_model_around_it(tower):
    assert isinstance(tower, TextTower) and tower.width == WIDTH
