"""Mixed precision on a CPU."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from training import TRAINERS, make_trainer

from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training.bfloat16 import run_in_bfloat16


class Scale(nn.Module):
    def __init__(self, weight: float):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.linear.weight, weight)

    def forward(self, x, times=1):
        return [self.linear(x), {"more": times * self.linear(x)}]


def test_forward_rounds_to_bfloat16_and_returns_float32():
    network, x = Scale(1 + 2**-10), torch.tensor([[3.0]])  # bfloat16 keeps 8 bits: the weight becomes 1
    assert network(x)[0].item() == 3 + 3 * 2**-10
    run_in_bfloat16(network)
    first, second = network(x, times=2)
    assert first.dtype == second["more"].dtype == torch.float32
    assert (first.item(), second["more"].item()) == (3, 6)
    assert not torch.is_autocast_enabled("cpu")


def test_gradients_reach_the_float32_weights():
    network = Scale(2.0)
    run_in_bfloat16(network)
    network(torch.tensor([[3.0]]))[0].sum().backward()
    assert network.linear.weight.grad.dtype == torch.float32
    assert network.linear.weight.grad.item() == 3


def test_a_copy_uses_its_own_weights():
    network = Scale(1.0)
    run_in_bfloat16(network)
    teacher = deepcopy(network)
    nn.init.constant_(network.linear.weight, 5.0)
    assert teacher(torch.ones(1, 1))[0].item() == 1
    assert network(torch.ones(1, 1))[0].item() == 5


@pytest.mark.parametrize("trainer_class", [SupervisedTrainer, *TRAINERS], ids=lambda t: t.__name__)
def test_setting_reaches_every_trainer(trainer_class, tiny_dataset, monkeypatch):
    dataset = tiny_dataset()
    dataset.plan()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    losses = {}
    for on in (False, True):
        trainer = make_trainer(trainer_class, dataset, bfloat16_on_cpu=on)
        trainer.on_train_start()
        trainer.network.train()
        batch = next(trainer.dataloader_train)
        losses[on] = float(trainer.train_step(batch)["loss"])
    assert losses[True] != losses[False]  # rounded
    assert losses[True] == pytest.approx(losses[False], abs=0.05)  # and no more than that
