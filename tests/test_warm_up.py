"""How long a training uses labels only."""

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import REGIONS, make_trainer

from nnunet_semiseg.trainers.semiseg import SemiSegTrainer
from nnunet_semiseg.training.distributed import Ranks
from nnunet_semiseg.training.warm_up import WarmUp

CPU = torch.device("cpu")
TWO = LabelManager({"background": 0, "a": 1, "b": 2}, None)
IGNORED = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)


def logits_of(labels: list[int]) -> torch.Tensor:
    """Logits (1, 3, 1, N) whose decisions are these."""
    return torch.nn.functional.one_hot(torch.tensor(labels), 3).float().T[None, :, None]


def target_of(labels: list[int]) -> torch.Tensor:
    return torch.tensor(labels)[None, None, None]


def warm_up(share=None, manager=TWO) -> WarmUp:
    return WarmUp(share, 100, manager, ["a", "b"], CPU)


@pytest.mark.parametrize("share, first_step", [(None, 40), (0.0, 0), (0.25, 25), (1.0, 100)])
def test_its_length_at_first(share, first_step):
    assert warm_up(share).first_step == first_step


def test_it_ends_after_the_epoch_in_which_every_class_is_learnt():
    part = warm_up()
    part.add(logits_of([0, 1, 1, 2]), target_of([0, 1, 1, 2]))
    part.add(logits_of([0, 1, 0, 0, 0, 0]), target_of([0, 1, 2, 2, 2, 2]))  # class 2: 1 found, 4 missed: 2 / (2 + 4)
    (line,) = part.end_epoch(10, Ranks())
    assert line == (
        "Dice on labelled patches: a 1.00, b 0.33; unlabelled images are used once it is 0.5 for every class,"
        " from step 40 on at the latest (warm_up)"
    )
    assert part.first_step == 40
    part.add(logits_of([0, 1, 2, 2]), target_of([0, 1, 2, 2]))  # what was seen in the epoch before does not count
    (line,) = part.end_epoch(20, Ranks())
    assert line == "Dice on labelled patches: a 1.00, b 1.00; unlabelled images are used from now on"
    assert part.first_step == 20
    assert part.end_epoch(30, Ranks()) == []


def test_it_does_not_end_too_early_or_too_late():
    part = warm_up()
    part.add(logits_of([0, 1, 2]), target_of([0, 1, 2]))
    part.end_epoch(9, Ranks())
    assert part.first_step == 40  # learnt before a tenth of the training
    part.add(logits_of([0, 0, 0]), target_of([0, 1, 2]))
    (line,) = part.end_epoch(40, Ranks())
    assert line == "Dice on labelled patches: a 0.00, b 0.00; unlabelled images are used from now on"
    assert part.first_step == 40


def test_a_class_that_no_patch_has_is_not_waited_for():
    part = warm_up()
    part.add(logits_of([0, 1, 0]), target_of([0, 1, 0]))
    part.end_epoch(20, Ranks())
    assert part.first_step == 20


def test_ignored_voxels_do_not_count():
    part = warm_up(manager=IGNORED)
    part.add(logits_of([0, 1, 2, 1, 1, 1]), target_of([0, 1, 2, 3, 3, 3]))
    assert part.sums.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_regions():
    part = WarmUp(None, 100, REGIONS, ["both", "b"], CPU)
    logits = torch.tensor([[1.0, 1, -1, -1], [1, -1, -1, 1]])[None, :, None]
    target = torch.tensor([[1.0, 1, 1, 0], [0, 1, 0, 1]])[None, :, None]
    part.add(logits, target)
    assert part.sums.tolist() == [[2, 1], [0, 1], [1, 1]]


def test_its_end_stays_in_a_training_that_is_continued(tiny_dataset):
    dataset = tiny_dataset(labeled=3, unlabeled=2)
    dataset.plan()
    trainer = make_trainer(SemiSegTrainer, dataset, num_epochs=10)
    trainer.initialize()
    assert (trainer.warm_up.first_step, trainer.uses_labels_only) == (8, True)
    trainer.step = 2
    trainer.warm_up.end_epoch(2, trainer.ranks)  # of classes that were in no patch
    assert (trainer.warm_up.first_step, trainer.uses_labels_only) == (2, False)
    assert trainer.searches == [1, 4, 7]
    file = str(dataset.results / "checkpoint.pth")
    trainer.save_checkpoint(file)
    resumed = make_trainer(SemiSegTrainer, dataset, num_epochs=10)
    resumed.initialize()
    resumed.load_checkpoint(file)
    assert resumed.warm_up.first_step == 2
