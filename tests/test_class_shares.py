import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import CLASSES, REGIONS

from nnunet_semiseg.training.class_shares import ClassShares, shares_of
from nnunet_semiseg.training.decisions import Decisions
from nnunet_semiseg.training.distributed import Ranks


def test_shares_of_classes_and_of_regions():
    target = torch.tensor([[0, 0, 1], [2, 2, 2]])[None, None]
    assert shares_of(target, 3, False).tolist() == pytest.approx([2 / 6, 1 / 6, 3 / 6])
    assert shares_of(target, 3, False, target != 0).tolist() == pytest.approx([0, 1 / 4, 3 / 4])
    regions = torch.stack((target[0, 0] > 0, target[0, 0] == 2, target[0, 0] == 9))[None]  # the last: ignored
    assert shares_of(regions, 2, True).tolist() == pytest.approx([4 / 6, 3 / 6])


def epoch(shares: ClassShares, labels: list[float], pseudo: list[float], progress: float = 0.5) -> list[str]:
    shares.add_labels(torch.tensor(labels))
    shares.add_pseudo_labels(torch.tensor(pseudo))
    return shares.end_epoch(progress, Ranks())


def test_a_class_that_vanishes_is_named_once_until_it_is_back():
    shares = ClassShares(["front", "back"], torch.device("cpu"))
    healthy, dead = [0.9, 0.06, 0.04], [0.94, 0.06, 0.0019]
    (line,) = epoch(shares, healthy, healthy)
    assert line == "share of voxels in pseudo-labels (in labels), %: front 6.00 (6.00), back 4.00 (4.00)"
    _, warning = epoch(shares, healthy, dead)
    assert warning == (
        "WARNING: back vanishes from the pseudo-labels: it has 0.190 % of their voxels, and 4.000 % of the voxels in"
        " labels"
    )
    assert len(epoch(shares, healthy, dead)) == 1  # said once
    assert len(epoch(shares, healthy, healthy)) == 1  # it is back
    assert len(epoch(shares, healthy, dead)) == 2


def test_the_mean_is_of_the_epoch_and_nothing_is_missed_at_the_beginning():
    shares = ClassShares(["a"], torch.device("cpu"))
    shares.add_pseudo_labels(torch.tensor([0.9, 0.1]))
    assert epoch(shares, [0.8, 0.2], [0.7, 0.3])[0].endswith("a 20.00 (20.00)")
    assert len(epoch(shares, [0.8, 0.2], [1.0, 0.0], progress=0.05)) == 1
    shares.add_labels(torch.tensor([0.8, 0.2]))
    assert shares.end_epoch(0.5, Ranks()) == []  # there were no pseudo-labels


def test_decisions_are_counted():
    """Three of eight voxels are class 1; the smaller component is not."""
    logits = torch.zeros(1, 2, 8)
    logits[0, 1] = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1])
    logits = logits.view(1, 2, 1, 8)
    decide = Decisions(CLASSES, ["a"], torch.device("cpu"))
    assert decide(logits).sum() == 4
    decide.heads = [1]
    assert decide(logits)[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    decide.count_labels(torch.ones(1, 1, 1, 8))
    assert decide.shares.end_epoch(1.0, Ranks())[0].endswith("a 43.75 (100.00)")  # (4 + 3) / 16


def test_voxels_that_are_ignored_are_not_counted():
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    decide = Decisions(manager, ["a"], torch.device("cpu"))
    decide.count_labels(torch.tensor([0, 1, 2, 2]).view(1, 1, 4, 1))
    decide.count(torch.tensor([0, 0, 0, 1]).view(1, 1, 4, 1))
    assert decide.shares.end_epoch(1.0, Ranks())[0].endswith("a 25.00 (50.00)")


def test_regions_are_counted_each():
    decide = Decisions(REGIONS, ["both", "b"], torch.device("cpu"))
    decide(torch.tensor([[1.0, 1], [-1, 1]]).view(1, 2, 2, 1))
    decide.count_labels(torch.tensor([[1, 1], [1, 0]]).view(1, 2, 2, 1))
    assert decide.shares.end_epoch(1.0, Ranks())[0].endswith("both 100.00 (100.00), b 50.00 (50.00)")
