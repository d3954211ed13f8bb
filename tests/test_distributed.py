"""Two processes with half a batch each train as one with all of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, multiprocessing
from torch.nn import functional as F
from torch.utils._pytree import tree_map, tree_map_only
from training import CLASSES, PLANS, TRAINERS, make_trainer, nnunet_loss, towers

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.segmentation import soft_label_loss
from nnunet_semiseg.trainers.cps import CPSTrainer
from nnunet_semiseg.trainers.mcf import MCFTrainer
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.self_training import SelfTrainingTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegTrainer
from nnunet_semiseg.training.distributed import Ranks, part
from nnunet_semiseg.training.warm_up import WarmUp

# Without what joins the samples of a batch: mixes of one with another, contrasts, means over what a batch holds of a
# kind. They see half as many samples in half a batch.
ALONE = {
    "ADMTTrainer": dict(cutmix=0.0, match_threshold=0.4, period=2),  # so that both teachers move
    "AMVLMTrainer": dict(mask_gate=0.0, turns=False),
    "BCPTrainer": dict(box=0.0, warm_up=0.0),
    "CCTTrainer": dict(perturbations=["noise", "dropout"], consistency_weight=0.1),
    "FixMatchTrainer": dict(match_threshold=0.4),
    "MCFTrainer": dict(review_weight=0.0),
    "SemiCMLTrainer": dict(contrast_weight=0.0, relearning_start=0.0, threshold=0.2),
    "SemiSegTrainer": dict(box=0.0, warm_up=0.0, turns=False),
    "TextSemiSegTrainer": dict(dca_start=0.0),
    # a network agrees with itself so well that rounding decides on which side of the kink of a soft Dice it is
    "TraCoCoTrainer": dict(cutmix=0.0, match_threshold=0.4, translation_weight=0.001),
    "UAMTTrainer": dict(mc_passes=0),
    "UniMatchTrainer": dict(match_threshold=0.4, cutmix=0.0),
    "URPCTrainer": dict(consistency_weight=0.1),
}
STEPS = 3
TOLERANCE = 1e-6
"""of weights, in float64; losses take probabilities in float32"""


def run(rank: int, function, folder: Path, *args) -> None:
    """A process of two, or the only one: what the function returns goes to a file."""
    torch.set_num_threads(1)
    if rank >= 0:
        distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(function(*args), folder / f"{rank}.pt")
    part()


def in_two_processes(function, folder: Path, *args) -> list:
    """What the function returns in each of two processes that have met."""
    context = multiprocessing.get_context("fork")  # torch is there already
    processes = [context.Process(target=run, args=(rank, function, folder, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def batch_for(trainer: nnUNetTrainer, seed: int) -> dict:
    """The batch of both ranks; what is drawn is the same in every process."""
    torch.manual_seed(seed)
    shape = trainer.configuration_manager.patch_size

    def draw():
        return torch.randn(2, 1, *shape)

    scales = trainer._get_deep_supervision_scales()
    sizes = [[round(n * s) for n, s in zip(shape, scale, strict=True)] for scale in scales]
    mostly = torch.tensor([-1.0, 1.0]).view(2, 1, *[1] * len(shape))  # background in one sample, tumour in the other
    target = [(F.interpolate(draw(), size) + mostly).sign().add(1).short() for size in sizes]
    views = {name: draw() for name in getattr(trainer, "views", ())}
    batch = {"data": draw(), "target": target, "views": views, "cases": ["un_000", "un_001"]}
    if type(trainer).__name__ == "SelfTrainingTrainer":
        return batch | {"extra": {"pseudo": [t.flip(0) for t in target]}}
    return batch | {"extra": trainer.target_maker()(batch, batch) if views else {}}


@contextmanager
def same_draws() -> Iterator[None]:
    """Samples have the same channels dropped: those of half a batch and of a whole one are then dropped alike."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dropout", "dropout2d", "dropout3d"):
            real = getattr(F, name)
            patch.setattr(F, name, lambda x, p, real=real: x * real(torch.ones_like(x[:1]), p))
        yield


def rivals(trainer) -> list:
    """The decoders of a method that remembers which one is better."""
    if isinstance(trainer, TextSemiSegTrainer):
        return [trainer.network.decoder, *trainer.network.other_decoders]
    return [network.decoder for network in trainer.networks] if isinstance(trainer, MCFTrainer) else []


def train(trainer_class, dataset, settings: dict) -> dict:
    """Three steps of the last epoch; returns all that must be the same afterwards."""
    settings = {**settings, "num_epochs": 2, "num_iterations_per_epoch": STEPS, **ALONE.get(trainer_class.__name__, {})}
    trainer = make_trainer(trainer_class, dataset, **settings)
    trainer.initialize()
    trainer.current_epoch, trainer.step = 1, STEPS
    if with_towers := trainer_class.__name__ == "AMVLMTrainer":  # which take float32
        trainer.finest_loss.dc.batch_dice = False  # towards soft labels, MONAI's sees the samples of this process
        trainer.texts.masks = lambda images, *args, real=trainer.texts.masks: real(images.float(), *args)
    for name in ("network", "teacher") if with_towers else ("network", "teacher", "auxiliary"):
        if getattr(trainer, name, None) is not None:
            getattr(trainer, name).double()  # decisions, of pseudo-labels too, are then not a matter of rounding
    for i, decoder in enumerate(rivals(trainer)):  # each is better at another sample
        for layer in decoder.seg_layers:
            layer.bias.data[2 * i] += 3
    trainer.network.train()
    outputs = []
    with same_draws():
        for seed in range(STEPS):
            batch, ranks = batch_for(trainer, seed), trainer.ranks
            batch = tree_map_only(torch.FloatTensor, torch.Tensor.double, batch)
            if ranks.of > 1:
                batch = tree_map_only(torch.Tensor, lambda x, r=ranks: x[r.number : r.number + 1], batch)
                batch["cases"] = [batch["cases"][ranks.number]]
            torch.manual_seed(seed)
            outputs.append(trainer.train_step(batch))
    trainer.current_epoch = 0
    trainer.on_train_epoch_end(outputs)
    log = trainer.logger.local_logger.my_fantastic_logging
    state = {"network": trainer.network.state_dict(), "method_state": getattr(trainer, "method_state", {})}
    state |= {"auxiliary": trainer.auxiliary.state_dict()} if hasattr(trainer, "auxiliary") else {}
    state |= {"teacher": trainer.teacher.state_dict()} if getattr(trainer, "teacher", None) is not None else {}
    state |= {"log": {k: torch.tensor(v) for k, v in log.items() if k.startswith("loss/") or k == "train_losses"}}
    return {k: tree_map(torch.clone, v) for k, v in state.items()}


def leave_out_gradients(patch) -> None:
    reduce = Ranks.mean_gradients  # of the first network: the second, an auxiliary module, comes after it
    patch.setattr(Ranks, "mean_gradients", lambda self, p: reduce(self, p[: len(p) // 2]))


def leave_out_weights(patch) -> None:
    copy = Ranks.copy_first
    patch.setattr(Ranks, "copy_first", lambda self, network, *auxiliary: copy(self, network))


def leave_out_teacher(patch) -> None:
    copy, initialize = Ranks.copy_first, MeanTeacherTrainer.initialize

    def too_late(self):
        initialize(self)
        copy(self.ranks, self.network)

    patch.setattr(Ranks, "copy_first", lambda self, *modules: None)
    patch.setattr(MeanTeacherTrainer, "initialize", too_late)


def leave_out_means(patch) -> None:
    patch.setattr(Ranks, "mean", lambda self, x: x)


LEFT_OUT = [
    (CPSTrainer, leave_out_gradients, {"auxiliary"}),
    (CPSTrainer, leave_out_weights, {"auxiliary"}),
    (MeanTeacherTrainer, leave_out_teacher, {"teacher"}),
    (MCFTrainer, leave_out_means, {"method_state", "log"}),
    (TextSemiSegTrainer, leave_out_means, {"method_state", "log"}),
]


def train_all(dataset, settings: dict, left_out: list) -> dict:
    """What is left of every trainer, and of some without a part of what makes them equal, by name."""
    states = {t.__name__: train(t, dataset, settings) for t in (SupervisedTrainer, *TRAINERS)}
    for trainer_class, leave_out, _ in left_out:
        with pytest.MonkeyPatch.context() as patch:
            leave_out(patch)
            states[trainer_class, leave_out.__name__] = train(trainer_class, dataset, settings)
    return states


def differences(a: dict, b: dict) -> dict[str, float]:
    """The greatest difference in each part."""
    assert {k: v.keys() for k, v in a.items()} == {k: v.keys() for k, v in b.items()}
    return {
        part: max(((x.double() - b[part][k].double()).abs().max().item() for k, x in v.items() if x.numel()), default=0)
        for part, v in a.items()
    }


@pytest.mark.slow
def test_two_ranks_of_one_sample_end_as_one_rank_of_two(ready, tmp_path):
    """In weights, auxiliary modules, teacher, method state and logged terms; and where one is left out, they do not."""
    dataset = ready(dims=2, size=32, labeled=2, unlabeled=2)
    text, vlm = towers()
    settings = {"text_model": str(text), "vlm": str(vlm)}
    ranks = in_two_processes(train_all, tmp_path, dataset, settings, LEFT_OUT)
    alone = train_all(dataset, settings, [])
    for name, state in alone.items():
        for rank in ranks:
            found = differences(rank[name], state)
            if name == "AMVLMTrainer":  # float32, by Adam, which divides by small gradients: three steps of 3e-4
                assert found.pop("auxiliary") < 5e-5
            assert max(found.values()) < TOLERANCE, (name, found)
    for trainer_class, leave_out, parts in LEFT_OUT:
        found = [differences(rank[trainer_class, leave_out.__name__], alone[trainer_class.__name__]) for rank in ranks]
        for left_out in parts:
            assert any(d[left_out] > 10 * TOLERANCE for d in found), (trainer_class, leave_out.__name__, found)


def exchange(folder: Path) -> dict:
    """All that ranks exchange, on numbers that can be worked out by hand."""
    ranks = Ranks()
    both, one, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0]) * (1 + ranks.number)
    if ranks.number:
        one.grad = torch.tensor([8.0, 4.0])
    ranks.mean_gradients([both, one, none])
    module = torch.nn.Linear(1, 1)
    module.register_buffer("mask", torch.tensor([ranks.number == 0]))
    torch.nn.init.constant_(module.weight, ranks.number + 5)
    ranks.copy_first(module)
    with ranks.one_first():
        if not ranks.number:
            time.sleep(0.2)
            (folder / "made").touch()
        was_there = (folder / "made").exists()
    warm_up = WarmUp(None, 100, CLASSES, ["a"], torch.device("cpu"))
    labels = torch.tensor([[1] + 9 * [0], 10 * [1]][ranks.number])  # the first finds its voxel, the second none of ten
    warm_up.add(F.one_hot(labels * (1 - ranks.number), 2).float().T[None], labels[None, None])
    warm_up.end_epoch(20, ranks)
    loss = nnunet_loss(False, weight_ce=0)
    loss.dc.batch_dice = loss.dc.ddp = True
    certain = torch.tensor([1.0, 0.5][ranks.number])  # a voxel of the only class: 1 here and 0.5 there, found with 0.5
    target = torch.stack((1 - certain, certain)).view(1, 2, 1, 1, 1)
    soft = soft_label_loss(loss, torch.zeros(1, 2, 1, 1, 1), target)
    return {
        "warm-up until": warm_up.first_step,
        "soft Dice": round(soft.item(), 4),
        "gradients": [p.grad if p.grad is None else p.grad.tolist() for p in (both, one, none)],
        "first": [float(module.weight), bool(module.mask)],
        "mean": ranks.mean(torch.tensor([2.0, 4.0]) * ranks.number).tolist(),
        "sum": ranks.sum(torch.tensor([2.0, 4.0]) * ranks.number).tolist(),
        "gathered": ranks.gather({"I am": ranks.number}),
        "parts": [ranks.part(None), ranks.part(6)],
        "was there": was_there,
        "seeds": [ranks.seed(7), ranks.seed(None)],
    }


def test_what_ranks_exchange(tmp_path):
    first, second = in_two_processes(exchange, tmp_path, tmp_path)
    seeds = first.pop("seeds"), second.pop("seeds")
    assert (
        first
        == second
        == {
            "warm-up until": 40,
            "soft Dice": -0.8,  # of both voxels: 2 (0.5 + 0.5) / (1 + 1.5)
            "gradients": [[1.5, 3.0], [4.0, 2.0], None],
            "first": [5.0, True],
            "mean": [1.0, 2.0],
            "sum": [2.0, 4.0],
            "gathered": [{"I am": 0}, {"I am": 1}],
            "parts": [None, 3],
            "was there": True,
        }
    )
    assert seeds[0] == [7, None] and seeds[1][0] not in (7, None) and seeds[1][1] is not None


def test_one_process_exchanges_nothing():
    ranks, p = Ranks(), torch.nn.Parameter(torch.zeros(2))
    x = torch.ones(2)
    ranks.mean_gradients([p])
    assert p.grad is None and ranks.mean(x) is not None and ranks.sum(x) is x
    assert ranks.gather("this") == ["this"] and ranks.part(3) == 3 and ranks.seed(None) is None
    assert ranks.device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    "settings, ranks, message",
    [
        ({}, 2, None),
        ({"unlabeled_batch_size": 4}, 2, None),
        (
            {},
            3,
            f"plans {PLANS}: 3d_fullres: batch_size=2: cannot be divided evenly by 3 processes: use 1 or 2 processes",
        ),
        (
            {"unlabeled_batch_size": 3},
            2,
            "setting unlabeled_batch_size=3: cannot be divided evenly by 2 processes",
        ),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(settings, ranks, message, ready, monkeypatch):
    dataset = ready()
    monkeypatch.setattr(Ranks, "__init__", lambda self: self.__dict__.update(number=0, of=ranks))
    with pytest.raises(UserError, match=message) if message else nullcontext():
        make_trainer(MeanTeacherTrainer, dataset, **settings)
    assert dataset.results.exists() == (message is None)


class Killed(Exception):
    pass


def train_twice(dataset) -> list[dict]:
    """A training without and one with an interruption, and what the second had printed."""
    straight = make_trainer(SelfTrainingTrainer, dataset)
    straight.run_training()
    broken = make_trainer(SelfTrainingTrainer, dataset)
    step = broken.train_step

    def dies_in_the_third_epoch(batch):
        if broken.step == 5:
            raise Killed
        return step(batch)

    broken.train_step = dies_in_the_third_epoch
    with pytest.raises(Killed):
        broken.run_training()
    resumed = make_trainer(SelfTrainingTrainer, dataset)
    resumed.load_checkpoint(resumed.output_folder + "/checkpoint_latest.pth")
    resumed.run_training()
    resumed.perform_actual_validation()
    return [{k: v.clone() for k, v in t.network.state_dict().items()} for t in (straight, resumed)]


@pytest.mark.slow
def test_two_ranks_go_on_where_they_were_and_one_goes_on_from_two(ready, tmp_path, capsys):
    """Each draws its own patches, labels its own cases and has its own random state; the first writes for both."""
    dataset = ready(dims=2, size=32, labeled=2, unlabeled=3)
    (straight, resumed), (other_straight, other_resumed) = in_two_processes(train_twice, tmp_path, dataset)
    for weights in (resumed, other_straight, other_resumed):
        assert all(torch.equal(straight[k], weights[k]) for k in straight)
    logs = dataset.results.rglob("training_log_*")
    assert len(list(logs)) == 3  # of both trainings and the one that went on, by the first rank alone
    trainer = make_trainer(SelfTrainingTrainer, dataset, goes_on=True)
    folder = Path(trainer.output_folder)
    assert {f.name for f in (folder / "pseudo_labels" / "round_1").glob("*.pkl")} == {f"un_00{i}.pkl" for i in range(3)}
    assert {f.stem for f in (folder / "validation").glob("*.png")} == {"tr_000", "tr_001"}
    capsys.readouterr()
    trainer.load_checkpoint(str(folder / "checkpoint_final.pth"))
    assert "trained in 2 processes so far, and from now on in 1" in capsys.readouterr().out
