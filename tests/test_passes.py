"""How a network's passes run: in mixed precision on a CPU, or one sample at a time."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from training import TRAINERS, make_trainer

from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.training.passes import run_in_bfloat16, run_sample_by_sample


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


def test_what_an_encoder_gives_its_decoders_stays_in_bfloat16():
    network = Halves()
    run_in_bfloat16(network)
    features = network.encode(torch.ones(2, 1))
    assert features[0].dtype == torch.bfloat16
    assert network.decode(features[0]).dtype == network(torch.ones(2, 1)).dtype == torch.float32


class Halves(nn.Module):
    """Notes how many samples each pass sees; the second feature is for some networks only."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.seen = nn.Linear(1, 3), nn.Linear(3, 2), []

    def encode(self, x):
        self.seen.append(("encode", len(x)))
        return [self.first(x), None]

    def decode(self, features, factor=1.0):
        self.seen.append(("decode", len(features)))
        return factor * self.second(features.square())

    def forward(self, x):
        return self.decode(self.encode(x)[0])


@pytest.mark.parametrize("memory", ["kept", "small"])
@pytest.mark.parametrize("halves", [False, True])
def test_one_sample_after_the_other_is_the_same(memory, halves):
    """Outputs and gradients; each sample has a pass of its own, and runs again in the backward pass."""
    torch.manual_seed(0)
    network, x = Halves(), torch.randn(3, 1, requires_grad=True)
    network(x).square().sum().backward()
    expected = [x.grad.clone(), *(p.grad.clone() for p in network.parameters())]
    network.zero_grad(), network.seen.clear()
    x.grad = None
    if memory == "small":
        run_sample_by_sample(network)
    output = network.decode(network.encode(x)[0], factor=1.0) if halves else network(x)
    sizes = [size for _, size in network.seen]
    assert output.shape == (3, 2) and sizes == ([1] * 6 if memory == "small" else [3] * 2)
    output.square().sum().backward()
    assert len(network.seen) == (12 if memory == "small" else 2)
    torch.testing.assert_close([x.grad, *(p.grad for p in network.parameters())], expected)
    network.seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(network(x), output)
    assert network.seen == [("encode", 3), ("decode", 3)]  # without gradients nothing would be kept


def test_a_copy_goes_one_by_one_with_its_own_weights():
    network = Halves()
    run_sample_by_sample(network)
    teacher = deepcopy(network)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert not network(torch.ones(1, 1)).any() and teacher(torch.ones(1, 1)).any()


@pytest.mark.parametrize("trainer_class", [SupervisedTrainer, *TRAINERS], ids=lambda t: t.__name__)
def test_setting_reaches_every_trainer(trainer_class, ready):
    dataset, losses = ready(dims=2, size=32), {}
    for on in (False, True):
        trainer = make_trainer(trainer_class, dataset, bfloat16_on_cpu=on)
        trainer.on_train_start()
        trainer.network.train()
        batch = next(trainer.dataloader_train)
        losses[on] = float(trainer.train_step(batch)["loss"])
    assert losses[True] != losses[False]  # rounded
    assert losses[True] == pytest.approx(losses[False], abs=0.05)  # and no more than that
