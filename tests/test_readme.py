"""What the README shows works."""

import math
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from training import CLASSES, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_method_in_the_readme_trains(tiny_dataset, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 25
    module = types.ModuleType("readme_method")
    monkeypatch.setitem(sys.modules, "readme_method", module)
    exec(code, module.__dict__)
    (its_test,) = re.findall(r"```\n(trainer = .*?)```", README, re.DOTALL)
    shared = {"CLASSES": CLASSES, "bare_trainer": bare_trainer, "terms_of": terms_of, "batch_of": batch_of}
    names = {"math": math, "pytest": pytest, "torch": torch} | shared
    exec(its_test, names | module.__dict__)
    dataset = tiny_dataset()
    dataset.plan()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(module.EntropyTrainer, dataset)
    trainer.on_train_start()
    trainer.step = 6  # the end of the ramp
    out = trainer.train_step(next(trainer.dataloader_train))
    assert list(out) == ["loss", "supervised", "entropy"] and torch.isfinite(out["loss"])
    assert 0 < out["entropy"] <= 0.1 * torch.tensor(3.0).log()  # three classes


COMMANDS = [line.strip() for line in README.splitlines() if re.match(r"    nnunet_semiseg ", line)]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_in_the_readme_are_understood(command, monkeypatch):
    parsed = []
    monkeypatch.setattr(cli, "COMMANDS", [as_recorder(f, parsed) for f in cli.COMMANDS])
    assert cli.main(shlex.split(command)[1:]) == 0 and len(parsed) == 1


def as_recorder(command, parsed):
    def recorder(parser):
        command(parser)
        return parsed.append

    recorder.__name__, recorder.__doc__ = command.__name__, command.__doc__
    return recorder


def test_there_are_commands_in_the_readme():
    assert len(COMMANDS) >= 4
