"""What is read from the sources about trainers and settings is what they are."""

import json
from dataclasses import MISSING, fields

import pytest

from nnunet_semiseg import cli
from nnunet_semiseg.deployment.distillation import DistillationSettings
from nnunet_semiseg.discovery import iter_classes
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.json_types import in_words
from nnunet_semiseg.settings.base import types_of
from nnunet_semiseg.settings.described import OF_COMMANDS, settings_named, trainers
from nnunet_semiseg.vlm.task import PretrainingSettings

CLASSES = {trainer.__name__: trainer.settings_class for trainer in iter_classes("trainers")}
ALL = CLASSES | {"distill": DistillationSettings, "pretrain_vlm": PretrainingSettings}


def test_every_trainer_is_described_and_no_other_class():
    assert set(trainers()) == set(CLASSES) and set(ALL) == {*trainers(), *OF_COMMANDS}


@pytest.mark.parametrize("name", ALL)
def test_names_types_and_defaults_are_those_of_the_dataclass(name):
    described, types = settings_named(name), types_of(ALL[name])
    assert list(described) == [f.name for f in fields(ALL[name])]
    for field in fields(ALL[name]):
        setting = described[field.name]
        assert setting.type == in_words(types[field.name]) and field.default is not MISSING
        text = field.default if isinstance(field.default, str) else json.loads(setting.default)
        expected = json.loads(json.dumps(field.default))
        assert text == (pytest.approx(expected, rel=1e-2) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", ALL)
def test_every_setting_says_in_sentences_what_it_means(name):
    for setting in settings_named(name).values():
        assert setting.meaning[:1].isupper() or setting.meaning[:1] == "`", setting
        assert setting.meaning.endswith(".") and len(setting.meaning) > 20, setting


def test_what_a_trainer_needs_beside_images_is_told():
    found = {name: (t.text, t.has_teacher) for name, t in trainers().items()}
    assert found["SupervisedTrainer"] == ("no", False) and found["MeanTeacherTrainer"] == ("optional", True)
    assert found["TextSemiSegTrainer"] == ("always", False)


@pytest.mark.parametrize(
    "name, message",
    [
        ("UAMTTrainr", "no such trainer: did you mean UAMTTrainer"),
        ("x", "no such trainer: nnunet_semiseg list_trainers shows all"),
        ("nnUNetTrainer", "nnU-Net's own trainers have no settings: use SupervisedTrainer"),
    ],
)
def test_an_unknown_trainer_is_one_line(name, message):
    with pytest.raises(UserError, match=f"^{name}: {message}"):
        settings_named(name)


def test_the_commands_print_them(capsys):
    assert cli.main(["settings", "UAMTTrainer"]) == 0
    printed = capsys.readouterr().out
    lines = "mc_passes=8 (a whole number of 0 or more)\n    The number of passes with dropout that measure where"
    assert lines in printed and "perturbations" not in printed
    assert cli.main(["settings"]) == 0
    everything = capsys.readouterr().out
    assert everything.startswith("# all trainers\nnum_epochs=1000 (a whole number of 1 or more)\n")
    assert "# all trainers but SupervisedTrainer\nunlabeled_batch_size=null" in everything
    assert cli.main(["list_trainers"]) == 0
    listed = capsys.readouterr().out
    assert "MeanTeacherTrainer   Mean Teacher (NeurIPS 2017): the student agrees" in listed
    prose = [line for line in (printed + everything + listed).splitlines() if "_sides=" not in line]
    assert max(map(len, prose)) <= 80
