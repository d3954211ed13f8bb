"""WordLlama's embeddings in place of an open_clip model: no download, no network, no order of words."""

import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from training import make_trainer

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.text_effect import empty_features
from nnunet_semiseg.files import write_json
from nnunet_semiseg.text import static_words
from nnunet_semiseg.text.encoder import load_text_tower
from nnunet_semiseg.text.prompt_learner import PromptLearner, build_prompt_learner, embed_prompts, load_embeddings
from nnunet_semiseg.text.prompts import read_prompts
from nnunet_semiseg.text.static_words import WordTower, load_word_tower, wordllama_folder
from nnunet_semiseg.trainers.amvlm import AMVLMTrainer
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegTrainer
from nnunet_semiseg.vlm.model import AMVLM
from nnunet_semiseg.vlm.towers import load_towers

WORDS = {"text_model": "wordllama", "text_pretrained": "openai"}
SETTINGS = SimpleNamespace(**WORDS, text_cache_dir=None, text_embeddings=None, n_ctx=2)
LABELS = {"labels": {"background": 0, "liver": 1, "spleen": 2}}


class Letters:
    """A tokenizer for which each letter is a token: a is 2, b is 3."""

    def enable_padding(self, pad_id):
        assert pad_id == 0

    def no_truncation(self):
        pass

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        longest = max(map(len, texts))
        return [SimpleNamespace(ids=[ord(c) - 95 for c in t] + [0] * (longest - len(t))) for t in texts]


@pytest.fixture
def letters():
    return WordTower(torch.tensor([[9.0, 9.0], [9.0, 9.0], [1.0, 0.0], [0.0, 3.0]]), Letters())


def test_a_text_is_the_mean_of_its_words_and_of_its_context_by_hand(letters):
    ids = letters.tokenize(["aab", "b", ""], n_ctx=1)
    assert ids.tolist() == [[1, 2, 2, 3], [1, 3, 0, 0], [1, 0, 0, 0]]
    embeddings = letters.embed_tokens(ids).clone()
    embeddings[:, 0] = torch.tensor([2.0, 1.0])  # the context, in the placeholder's place
    expected = [[(2 + 1 + 1 + 0) / 4, (1 + 0 + 0 + 3) / 4], [2 / 2, (1 + 3) / 2], [2.0, 1.0]]
    assert letters(embeddings, ids).tolist() == expected
    plain = letters.tokenize(["aab", ""])
    assert letters(letters.embed_tokens(plain), plain).tolist() == [pytest.approx([2 / 3, 1.0]), [0, 0]]


def test_the_context_learns_and_the_table_is_neither_trained_nor_saved(letters):
    learner = PromptLearner(letters, {"a": ("a",), "b": ("ab", "bb")}, n_ctx=2)
    assert list(learner.state_dict()) == ["ctx"] and not list(letters.parameters()) and not letters.state_dict()
    learner()[1, 0].backward()
    assert learner.ctx.grad[1].abs().sum() > 0 and learner.ctx.grad[0].abs().sum() == 0
    assert torch.equal(learner.ctx.grad[1, 0], learner.ctx.grad[1, 1])  # where context stands does not matter


def test_it_reads_the_wheels_own_files_and_asks_no_network(monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "socket", no_network)
    tower = load_text_tower("wordllama", "openai")
    assert tower.trained and tower.width == 256 and "wordllama" not in sys.modules  # it would change Python's logging
    ids = tower.tokenize(["the left atrium", "a  Tumour", "left\natrium"])
    features = tower(tower.embed_tokens(ids), ids)
    # what wordllama 0.4.0's own `embed` says of these
    own = [[0.532074, -0.2902832, 0.01486969, 0.5375824], [0.02971802, 0.26470643, 0.02564697, -0.12944336]]
    torch.testing.assert_close(features[:2, :4], torch.tensor(own))
    assert tower.tokenize.words(ids).sum(1).tolist() == [4, 5, 4]  # a newline is a word, though no known one


def test_the_embeddings_know_what_words_mean():
    tower = load_word_tower()

    def alike(a, b):
        ids = tower.tokenize([a, b])
        return float(F.cosine_similarity(*tower(tower.embed_tokens(ids), ids), dim=0))

    assert alike("the heart", "cardiac muscle") > alike("the heart", "a wooden table") + 0.1
    untrained = load_text_tower("wordllama", "none")
    assert not untrained.trained and torch.equal(untrained.table, load_text_tower("wordllama", "none").table)


def test_classes_that_differ_in_the_order_of_words_alone_are_refused(tmp_path):
    content = LABELS | {"semiseg": {"prompts": {"liver": "left of the right one", "spleen": "right of the left one"}}}
    message = 'd.json: the prompts of "liver" and "spleen" have the same words, and wordllama does not know'
    with pytest.raises(UserError, match=message):
        build_prompt_learner(SETTINGS, content, "d.json")
    with pytest.raises(UserError, match=message):
        embed_prompts(content, "wordllama", "openai", None, tmp_path / "x.safetensors", "d.json")
    content["semiseg"]["prompts"]["spleen"] = ["left of the right one", "the spleen"]
    assert build_prompt_learner(SETTINGS, content, "d.json").feature_shape == (3, 256)


def test_embeddings_for_another_machine(tmp_path):
    file = tmp_path / "x.safetensors"
    assert embed_prompts(LABELS, "wordllama", "openai", None, file) is True
    plain = PromptLearner(load_word_tower(), read_prompts(LABELS), n_ctx=0)
    torch.testing.assert_close(load_embeddings(file, read_prompts(LABELS)), plain())


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"x")
    with pytest.raises(UserError, match="weights.pt: wordllama has its own weights: leave this out"):
        load_text_tower("wordllama", str(weights))
    monkeypatch.setattr(static_words, "wordllama_folder", lambda: tmp_path)
    with pytest.raises(UserError, match="l2_supercat_256.safetensors: no such file.* `pip install --force-reinstall"):
        load_word_tower()
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the text encoder wordllama is not installed: run `pip install wordllama`"):
        wordllama_folder()


def test_a_training_goes_on_and_keeps_what_prediction_needs(ready, monkeypatch):
    trainer_class, dataset = TextSemiSegTrainer, ready()
    trainer = make_trainer(trainer_class, dataset, **WORDS)
    trainer.on_train_start()
    trainer.network.train()
    before = trainer.prompt_learner.ctx.detach().clone()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert torch.isfinite(out["loss"]) and not torch.equal(trainer.prompt_learner.ctx, before)
    file = dataset.results / "checkpoint.pth"
    trainer.save_checkpoint(str(file))
    saved = torch.load(file, weights_only=False)
    assert saved["init_args"]["plans"]["semiseg"]["text_model"] == "wordllama"  # a name, and no table
    assert list(saved["semiseg"]["auxiliary"]) == ["prompt_learner.ctx"]
    assert saved["network_weights"]["guidance.features"].shape == (len(read_prompts(trainer.dataset_json)), 256)
    again = make_trainer(trainer_class, dataset, goes_on=True, **WORDS)
    again.initialize()
    again.load_checkpoint(str(file))
    assert torch.equal(again.prompt_learner(), trainer.prompt_learner())
    run = SimpleNamespace(trainer=trainer_class.__name__, checkpoint=file)
    empty, meaning = empty_features(run, saved, saved["network_weights"]["guidance.features"])
    torch.testing.assert_close(
        empty, F.normalize(trainer.prompt_learner.ctx.detach().mean(1), dim=1)
    )  # no word is left
    assert meaning.startswith("an empty text")
    monkeypatch.setattr(static_words, "wordllama_folder", None)  # from here on nothing can be read
    network = trainer_class.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels, 3, True
    )
    network.load_state_dict(saved["network_weights"])


@pytest.mark.parametrize("dims", [2, 3])
def test_amvlm_with_an_image_network_of_timms_and_words(dims, ready, tmp_path):
    clip, tokenizer, config = load_towers("timm:test_resnet", "none", None, None, {"model": ""})
    vlm = AMVLM(clip, tokenizer, dim=16, hidden=32)
    save_file(vlm.state_dict(), tmp_path / "vlm.safetensors")
    write_json(config, tmp_path / "open_clip_config.json")
    write_json({"settings": {"dim": 16, "hidden": 32, "text_model": "wordllama"}}, tmp_path / "vlm.json")
    dataset = ready(dims=dims, size=24 if dims == 3 else 32)
    trainer = make_trainer(AMVLMTrainer, dataset, vlm=str(tmp_path), mask_gate=0, mask_labels="hard", text_slices=2)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.network.train()
    out = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(x) for x in out.values()) and out["text"] != 0 and out["mask"] != 0
    assert not any("table" in key for key in trainer.auxiliary.state_dict())
