"""A training step as on a GPU, where there is none: what would be there are fake tensors, which hold no values.

Mixing devices raises, and so does reading a value, for which the CPU would wait.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as for_real
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import TRAINERS, make_trainer, towers

from nnunet_semiseg.text.open_clip_models import load_clip
from nnunet_semiseg.vlm.model import AMVLM
from nnunet_semiseg.vlm.task import PretrainingSettings, PretrainingTask

aten = torch.ops.aten


class FakeGPU(TorchDispatchMode):
    """Within a FakeTensorMode: tensors of the CPU are real, and none comes from the GPU but on a way of its own."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten._pin_memory.default:
            return args[0]
        if function is aten.copy_.default and (*args, *kwargs.values())[-1] is True:
            return args[0]  # non_blocking
        takes_fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if not takes_fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with for_real():
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        assert "cpu" not in devices, f"{function}: takes a tensor from the GPU, for which the CPU waits"
        return result


def to(module: nn.Module, device) -> nn.Module:
    """`Module.to`, which cannot exchange real tensors for fake ones."""
    towers = [part.tower for part in module.modules() if hasattr(part, "tower")]  # which are no children
    for part in (*module.modules(), *(part for tower in towers for part in tower.modules())):
        for name, p in part._parameters.items():
            part._parameters[name] = None if p is None else nn.Parameter(p.detach().to(device), p.requires_grad)
        part._buffers |= {name: b.to(device) for name, b in part._buffers.items() if b is not None}
    return module


@pytest.fixture
def on_fake_gpu(monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True), FakeGPU():
        yield


def test_the_fake_gpu_finds_what_waits_and_what_is_mixed(on_fake_gpu):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert here.sum().item() == 3 and (here.to("cuda", non_blocking=True) + there).device.type == "cuda"
    with pytest.raises(DataDependentOutputException):
        there.sum().item()
    with pytest.raises(AssertionError, match="for which the CPU waits"):
        there.cpu()
    with pytest.raises(RuntimeError, match="at least two devices"):
        there + here
    with torch.autocast("cuda"):
        assert (torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")).dtype == torch.float16


OPTIONS = {
    "MeanTeacherTrainer": dict(text=True),
    "UAMTTrainer": dict(text=True),
    "BCPTrainer": dict(text=True),
    "URPCTrainer": dict(text=True),
    "CPSTrainer": dict(text=True),
    "DTCTrainer": dict(text=True),
    "MCNetTrainer": dict(text=True),
    "CCTTrainer": dict(perturbations=["object_mask", "context_mask", "cutout"]),
    "TextSemiSegTrainer": dict(dca="foreground", tmr="copy"),
    "STLUNetTrainer": dict(mixing_beta=0.5, confidence_threshold=0.8),
    "SemiCMLTrainer": dict(modality_dropout=0.5),
    "AMVLMTrainer": dict(mask_cosines="relative", texts="classes", mask_labels="hard"),
}


@pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda t: t.__name__)
def test_a_step_mixes_no_devices_and_waits_for_nothing(trainer_class, ready, request, monkeypatch):
    take_steps(trainer_class, ready(regions=True), request, monkeypatch)


@pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda t: t.__name__)
def test_nor_does_one_in_2d_with_other_settings(trainer_class, ready, request, monkeypatch):
    dataset = ready(dims=2, size=32, channels=1 + (trainer_class.__name__ == "SemiCMLTrainer"))
    take_steps(trainer_class, dataset, request, monkeypatch, **OPTIONS.get(trainer_class.__name__, {}))


def test_a_step_of_the_pretraining(on_fake_gpu):
    _, vlm = towers()
    model = AMVLM(*load_clip(str(vlm), "none"), 16, 32)
    task = PretrainingTask(model, PretrainingSettings(dim=16, hidden=32)).to("cuda")
    images, ids = torch.randn(3, 3, 32, 32), model.tokenize(["one lesion", "two", "a b c d"])
    with torch.autocast("cuda"):
        terms = task.train()(images.to("cuda"), ids.to("cuda"))
    assert len(terms) == 4 and all(term.device.type == "cuda" for term in terms.values())
    task.update_momentum()


def leaves_of(tensors: list) -> list[torch.Tensor]:
    """What gets a gradient from a backward pass through the graphs of these tensors or gradient edges."""
    functions, seen, leaves = [x.grad_fn if isinstance(x, torch.Tensor) else x.node for x in tensors], set(), []
    while functions:
        function = functions.pop()
        if function not in seen:
            seen.add(function)
            leaves += [function.variable] if hasattr(function, "variable") else []
            functions += [f for f, _ in function.next_functions if f is not None]
    return leaves


def take_steps(trainer_class, dataset, request, monkeypatch, **settings):
    here = make_trainer(trainer_class, dataset, dca_start=0.0, **settings)
    here.on_train_start()
    batch = next(here.dataloader_train)
    trainer = make_trainer(trainer_class, dataset, dca_start=0.0, **settings)
    trainer.device = torch.device("cuda:0")
    request.getfixturevalue("on_fake_gpu")
    trainer.initialize()
    trainer.network.train()
    assert {p.device.type for p in trainer.trainable} == {"cuda"}

    # autograd's own and the fused optimizer need the device
    def grad(outputs, inputs, *args, **kwargs):
        return tuple(torch.zeros_like(x) for x in tree_leaves(inputs))

    def backward(tensors, gradients=None):
        for leaf in leaves_of(tree_leaves(tensors, is_leaf=lambda x: isinstance(x, GradientEdge))):
            leaf.grad = torch.zeros_like(leaf)

    def fused_sgd(*args, **kwargs):
        assert {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)} == {"cuda"}

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)
    for trainer.step in range(6):
        out = trainer.train_step(batch)
        assert all(term.device.type == "cuda" and term.ndim == 0 for term in out.values())
        assert sum(p.grad is not None for p in trainer.trainable) > 0.9 * len(trainer.trainable)
