"""What the training log says of the end; what TensorBoard gets; whose warnings are hidden."""

import sys
import warnings
from datetime import datetime
from types import ModuleType, SimpleNamespace

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from training import make_trainer

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.quiet import hide_foreign_warnings
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.training.log_lines import expected_end
from nnunet_semiseg.training.tensorboard import VARIABLE, TensorBoardLogger, is_wanted


def test_the_expected_end_is_that_of_the_last_ten_epochs():
    now = datetime(2026, 11, 27, 23, 30)
    durations = [500.0] * 9 + [60.0] * 8 + [0.0, 1000.0]  # the median: one slow epoch changes nothing
    assert expected_end(durations, 90, now) == "expected end: 2026-11-28 01:00, in 1:30:00"


def test_each_epoch_but_the_last_says_when_the_training_will_end(ready, monkeypatch):
    trainer = make_trainer(MeanTeacherTrainer, ready(), num_epochs=3)
    lines = []
    trainer.print_to_log_file = lambda *args, **kwargs: lines.append(" ".join(map(str, args)))
    log = trainer.logger.local_logger.my_fantastic_logging
    log["epoch_start_timestamps"], log["epoch_end_timestamps"] = [10.0, 20.0], [17.0, 27.0]
    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", lambda self: setattr(self, "current_epoch", 2))
    trainer.on_epoch_end()
    (line,) = lines
    assert line.startswith("expected end: 2") and line.endswith(", in 0:00:07")  # the third epoch of three
    trainer.num_epochs = 2
    trainer.on_epoch_end()
    assert lines == [line]


class Writer:
    written: list = []

    def __init__(self, folder, purge_step):
        self.written.append((folder, purge_step))

    def add_scalar(self, *args):
        self.written.append(args)

    def flush(self):
        pass


def test_tensorboard_gets_what_is_logged(tmp_path, monkeypatch):
    Writer.written = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    logger = TensorBoardLogger(str(tmp_path))
    assert Writer.written == []  # nothing is written before there is a number
    logger.log("epoch_end_timestamps", 1e9, 7)
    logger.log("loss/supervised", 0.5, 7)
    logger.log_summary("final_val/foreground_dice", 0.8)
    folder = str(tmp_path / "tensorboard")
    assert Writer.written == [(folder, 7), ("loss/supervised", 0.5, 7), ("final_val/foreground_dice", 0.8, 0)]


def test_tensorboard_is_asked_for_and_must_be_there(monkeypatch):
    assert not is_wanted()
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr("nnunet_semiseg.training.tensorboard.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{VARIABLE}=1: no package tensorboard: pip install tensorboard"):
        is_wanted()


def test_warnings_of_others_are_hidden_and_ours_are_not():
    theirs, ours = ModuleType("torch.jit._script"), ModuleType("nnunet_semiseg.training.batch")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_foreign_warnings()
        for module, category in ((theirs, FutureWarning), (ours, FutureWarning), (theirs, UserWarning)):
            warnings.warn_explicit("x", category, f"{module.__name__}.py", 1, module.__name__)
    assert [(w.filename, w.category) for w in shown] == [
        ("nnunet_semiseg.training.batch.py", FutureWarning),
        ("torch.jit._script.py", UserWarning),
    ]
