"""Text-SemiSeg's text module in other methods: `--set text=true`."""

import pytest
import torch
from training import TRAINERS, make_trainer

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.text_alignment import category_alignment_loss
from nnunet_semiseg.settings.base import OptionalTextSettings
from nnunet_semiseg.trainers.ua_mt import UAMTTrainer

WITH_TEXT = [t for t in TRAINERS if issubclass(t.settings_class, OptionalTextSettings)]
every_trainer_with_text = pytest.mark.parametrize("trainer_class", WITH_TEXT, ids=lambda t: t.__name__)


def test_those_that_the_paper_extended():
    names = {t.__name__.removesuffix("Trainer") for t in WITH_TEXT}
    assert names == {"MeanTeacher", "UAMT", "DTC", "MCNet", "CPS", "BCP", "URPC"}


@every_trainer_with_text
@pytest.mark.parametrize("regions", [False, True])
def test_the_module_is_trained_and_a_checkpoint_holds_what_prediction_needs(trainer_class, ready, regions):
    dataset = ready(dims=2, size=32, regions=regions)
    trainer = make_trainer(trainer_class, dataset, text=True)
    trainer.on_train_start()
    trainer.network.train()
    learner, guidance = trainer.auxiliary["prompt_learner"], trainer.network.guidance
    before = [p.clone() for p in (learner.ctx, guidance.project.weight, guidance.interaction.class_embedding)]
    out = trainer.train_step(next(trainer.dataloader_train))
    assert out["cog"] > 0
    after = (learner.ctx, guidance.project.weight, guidance.interaction.class_embedding)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    file = str(dataset.results / "checkpoint.pth")
    trainer.save_checkpoint(file)
    saved = torch.load(file, weights_only=False)
    torch.testing.assert_close(saved["network_weights"]["guidance.features"], learner().detach())
    assert saved["init_args"]["plans"]["semiseg_found"]["text_shape"] == [3, 16]  # the background, too


@every_trainer_with_text
def test_cog_is_the_alignment_of_every_output(trainer_class, ready, monkeypatch):
    trainer = make_trainer(trainer_class, ready(dims=2, size=32), text=True, warm_up=0.0)
    trainer.on_train_start()
    trainer.network.train()
    seen = []

    def recording(features, p, text):
        seen.append((features.shape[0], p.shape[1], text.shape[0]))
        return category_alignment_loss(features, p, text)

    monkeypatch.setattr("nnunet_semiseg.training.text_guided.category_alignment_loss", recording)
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    outputs = {"CPSTrainer": 2, "MCNetTrainer": 3}.get(trainer_class.__name__, 1)
    assert seen == [(len(batch["data"]), 3, 3)] * (2 * outputs)  # of both streams


@every_trainer_with_text
def test_text_with_nothing_left_of_it_is_refused(trainer_class):
    with pytest.raises(UserError, match="text=true tmr=off csa=false: the text would have no effect: set text=false"):
        trainer_class.settings_class(text=True, tmr="off", csa=False)
    trainer_class.settings_class(tmr="off", csa=False)


@every_trainer_with_text
@pytest.mark.parametrize("settings", [dict(text=True, csa=False), dict(text=False)])
def test_without(trainer_class, ready, settings):
    trainer = make_trainer(trainer_class, ready(dims=2, size=32), **settings)
    trainer.on_train_start()
    trainer.network.train()
    assert "cog" not in trainer.train_step(next(trainer.dataloader_train))
    assert (trainer.network.guidance is None) != settings["text"]
    assert ("prompt_learner" in trainer.auxiliary) == settings["text"]


def test_the_teacher_has_the_text_of_the_step_before(ready):
    trainer = make_trainer(UAMTTrainer, ready(dims=2, size=32), text=True)
    trainer.on_train_start()
    first = trainer.prompt_learner().detach()
    torch.testing.assert_close(trainer.teacher.guidance.features, first)
    trainer.network.train()
    for _ in range(2):
        before = trainer.prompt_learner().detach()
        trainer.train_step(next(trainer.dataloader_train))
        torch.testing.assert_close(trainer.teacher.guidance.features, before)
    assert not torch.equal(before, first)
