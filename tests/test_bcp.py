import math
from types import SimpleNamespace

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import bare_trainer, batch_of, make_trainer, nnunet_loss, terms_of

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.copy_paste import draw_box, pairs, paste
from nnunet_semiseg.trainers.bcp import BCPTrainer
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.warm_up import WarmUp

BOX = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
BOX[:, :, :2] = True  # a quarter


@pytest.fixture
def behind_pretraining(monkeypatch):
    """Makes a trainer that mixes with the box; images are logits, and the teacher says what it is shown."""
    monkeypatch.setattr("nnunet_semiseg.trainers.bcp.draw_box", lambda x, share: BOX)

    def make(*args, **kwargs):
        trainer = bare_trainer(BCPTrainer, *args, **kwargs)
        trainer.warm_up = SimpleNamespace(first_step=0)
        trainer.loss = nnunet_loss(trainer.label_manager.has_regions)
        return trainer

    return make


def of_probability(*slices):
    """Logits whose probability of class 1 differs from slice to slice."""
    logits = torch.zeros(1, 2, 8, 8, 8)
    for i, p in enumerate(slices):
        logits[:, 1, i] = math.log(p / (1 - p))
    return logits


def within_and_around(within, around):
    """The same, of the box and of what is around it."""
    return of_probability(*[within] * 2, *[around] * 6)


def loss_by_hand(p):
    """Dice + CE of a volume that is class 1 everywhere, where class 1 has this probability."""
    return -2 * p / (1 + p) - math.log(p)


def test_a_box_of_two_thirds_at_a_random_place():
    boxes = [draw_box(torch.zeros(2, 1, 6, 9, 12), 2 / 3) for _ in range(10)]
    assert all(box.shape == (1, 1, 6, 9, 12) and box.sum() == 4 * 6 * 8 for box in boxes)
    assert len({tuple(box.nonzero()[0].tolist()) for box in boxes}) > 1
    assert draw_box(torch.zeros(1, 1, 8, 8), 0).sum() == 0 and draw_box(torch.zeros(1, 1, 8, 8), 1).all()


def test_paste_on_every_grid():
    fine = paste(BOX, torch.ones(2, 1, 8, 8, 8), torch.zeros(2, 1, 8, 8, 8))
    assert fine[:, 0, :, 0, 0].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 2
    coarse = paste(BOX, torch.ones(2, 1, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4))
    assert coarse[:, 0, :, 0, 0].tolist() == [[1, 0, 0, 0]] * 2


def test_the_losses_by_hand(behind_pretraining):
    """X_in is labelled around the box, X_out within it; everything is class 1, p differs within and around.

    Inwards: 0.9 within, of the unlabelled image, and 0.6 around; outwards: 0.7 within, of the labelled one, and 0.8.
    """
    images, strong = within_and_around(within=0.7, around=0.6), within_and_around(within=0.9, around=0.8)
    weak = of_probability(*[0.9] * 8)  # says class 1
    terms = terms_of(behind_pretraining(), batch_of(images, torch.ones(1, 1, 8, 8, 8), weak=weak, strong=strong))
    assert terms["supervised"].item() == pytest.approx(loss_by_hand(0.6) + loss_by_hand(0.7), abs=1e-4)
    assert terms["pseudo"].item() == pytest.approx(0.5 * (loss_by_hand(0.9) + loss_by_hand(0.8)), abs=1e-4)


def test_pseudo_labels_go_with_their_images(behind_pretraining):
    """The teacher says class 1 of the first of two samples and 0 of the other; outwards they are exchanged.

    Where the label is 0 everywhere Dice is 0. The labelled parts, of 0.01, do not matter.
    """
    images = of_probability(*[0.01] * 8).repeat(2, 1, 1, 1, 1)
    strong = torch.cat((within_and_around(within=0.9, around=0.8), within_and_around(within=0.2, around=0.3)))
    weak = torch.cat((of_probability(*[0.9] * 8), of_probability(*[0.1] * 8)))
    pseudo = terms_of(behind_pretraining(), batch_of(images, weak=weak, strong=strong))["pseudo"]
    inside, around = (loss_by_hand(0.9) - math.log(0.8)) / 2, (loss_by_hand(0.8) - math.log(0.7)) / 2
    assert pseudo.item() == pytest.approx(0.5 * (inside + around), abs=1e-4)


def test_pretraining_mixes_images_and_labels_alike():
    trainer = bare_trainer(BCPTrainer, progress=0, box=0.5)
    trainer.warm_up = WarmUp(0.5, 2, trainer.label_manager, ["a"], trainer.device)
    trainer.network, trainer.loss = lambda x: x, lambda output, targets: [output, *targets]
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1).expand(2, 1, 8, 8, 8)
    (terms,) = trainer.losses(batch_of(x, [x, x[:, :, ::2, ::2, ::2]]))
    image, fine, coarse = terms["supervised"]
    assert terms["pseudo"] == 0 and torch.equal(image, fine)
    for mixed in (fine, coarse):  # an eighth is of the other sample
        assert [(sample == other).float().mean() for sample, other in zip(mixed, (2, 1), strict=True)] == [0.125] * 2


def test_what_the_network_sees(ready, monkeypatch):
    trainer, boxes = make_trainer(BCPTrainer, ready(), warm_up=0.5), []
    monkeypatch.setattr(
        "nnunet_semiseg.trainers.bcp.draw_box", lambda x, share: (boxes.append(draw_box(x, share)), boxes[-1])[1]
    )
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    batch["data"] = torch.zeros_like(batch["data"]) + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1)
    batch["views"]["strong"] = torch.zeros_like(batch["data"]) + torch.tensor([3.0, 4.0]).view(2, 1, 1, 1, 1)
    batch, forward, seen = Batch.from_loader(batch, trainer.device), trainer.network.forward, []
    trainer.network.forward = lambda x: (seen.append(x), forward(x))[1]
    trainer.step = 2
    terms_of(trainer, batch)
    inside = boxes[0].expand(2, 1, *boxes[0].shape[2:])
    assert [seen[0][i][inside[i]].unique().tolist() for i in (0, 1)] == [[2], [1]]
    assert [seen[0][i][~inside[i]].unique().tolist() for i in (0, 1)] == [[1], [2]]
    trainer.step = 3
    trainer.draw_turn = lambda: lambda x: x
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.fill_(0.25)
    terms_of(trainer, batch)
    assert all((p == 0.25).all() for p in trainer.teacher.parameters())  # the teacher begins as the pre-training's end
    inside, mixes = boxes[1].expand(4, 1, *boxes[1].shape[2:]), torch.cat(seen[1:])
    assert [mixes[i][inside[i]].unique().tolist() for i in range(4)] == [[3], [4], [1], [2]]
    assert [mixes[i][~inside[i]].unique().tolist() for i in range(4)] == [[1], [2], [4], [3]]


def test_masks_are_on_coarse_grids_where_nnunets_labels_are():
    """The box pasted into the fine label, which nnU-Net then makes coarse, or into the coarse ones: the same."""
    torch.manual_seed(0)
    for size, share in ((24, 2 / 3), (24, 0.5), (20, 2 / 3)):
        a, b = torch.randint(0, 5, (2, 1, 1, size, size, size)).float()
        box = draw_box(a, share)
        fine = paste(box, a, b)
        coarser = DownsampleSegForDSTransform([[0.5] * 3, [0.25] * 3])
        a, b, fine = (coarser._apply_to_segmentation(x[0]) for x in (a, b, fine))
        for x, y, expected in zip(a, b, fine, strict=True):
            assert torch.equal(paste(box, x[None], y[None]), expected[None])


def test_every_output_of_deep_supervision_counts_with_its_weight(behind_pretraining):
    """Outputs of 8^3 and 4^3, in which the labelled part has p = 0.6 and 0.9; weights 2/3 and 1/3; of both mixes."""
    fine, coarse = of_probability(*[0.6] * 8), of_probability(*[0.9] * 8)[..., ::2, ::2, ::2]
    trainer = behind_pretraining(network=lambda x: [fine, coarse])
    trainer.loss, trainer.enable_deep_supervision = DeepSupervisionWrapper(trainer.loss, (2 / 3, 1 / 3)), True
    targets = [torch.ones(1, 1, n, n, n) for n in (8, 4)]
    terms = terms_of(trainer, batch_of(fine, targets, weak=fine, strong=fine))
    expected = 2 / 3 * loss_by_hand(0.6) + 1 / 3 * loss_by_hand(0.9)
    assert terms["supervised"].item() == pytest.approx(2 * expected, abs=1e-4)
    assert terms["pseudo"].item() == pytest.approx(0.5 * 2 * expected, abs=1e-4)


def test_more_unlabelled_samples_than_labelled_ones(behind_pretraining):
    x = torch.arange(4.0)
    assert [p.tolist() for p in pairs(x, 2)] == [[0, 1], [2, 0]]
    assert [p.tolist() for p in pairs(x[:2], 2)] == [[0, 1], [1, 0]]
    assert [p.tolist() for p in pairs(x, 1)] == [[0], [1]]

    seen, taught = [], []
    trainer = behind_pretraining(
        network=lambda x: (seen.append(x), x)[1],
        teacher=lambda x: (taught.append(x.flatten(1)[:, 0].tolist()), x)[1],
    )
    views = {view: x.view(4, 1, 1, 1, 1).expand(4, 2, 8, 8, 8) for view in ("weak", "strong")}
    terms_of(trainer, batch_of(torch.full((2, 2, 8, 8, 8), 9.0), **views))
    inwards, outwards = seen
    inside = BOX.expand(2, 2, 8, 8, 8)
    assert [inwards[i][inside[i]].unique().tolist() for i in (0, 1)] == [[0], [1]]
    assert [outwards[i][~inside[i]].unique().tolist() for i in (0, 1)] == [[2], [0]]
    assert taught == [[0, 1, 2]]


def test_the_largest_component_is_kept_where_it_is_asked_for(behind_pretraining):
    """The teacher says class 1 of one slice, and of a voxel far from it, which becomes background."""
    logits = of_probability(*[0.1] * 3, 0.9, *[0.1] * 4)
    logits[:, 1, 7, 7, 7] = 5
    for heads, voxels in (((), 65), ((1,), 64)):
        trainer = behind_pretraining()
        trainer.decide.heads = heads
        assert trainer.pseudo_label(logits).sum() == voxels


def test_the_unlabelled_part_of_a_mix_is_turned_with_its_label(behind_pretraining):
    """The teacher and the network say class 1, with 0.9, of the first slice: after a flip along it, of the last.

    It lies around the box in both mixes, or in the other the box, of the labelled image; all else is 0.1.
    """
    trainer = behind_pretraining()
    trainer.draw_turn = lambda: lambda x: x.flip(2)
    unlabeled, labeled = of_probability(0.9, *[0.1] * 7), of_probability(*[0.1] * 8)
    pseudo = terms_of(trainer, batch_of(labeled, weak=unlabeled, strong=unlabeled))["pseudo"]
    within = -math.log(0.9)  # X_in: two slices of background
    around = -math.log(0.9) - 2 * 0.9 / (0.9 + 0.1 * 5 + 1)  # X_out: five of background, one of class 1
    assert pseudo.item() == pytest.approx(0.5 * (within + around), abs=1e-3)


def test_the_defaults():
    s = BCPTrainer.settings_class()
    assert (s.warm_up, s.box, s.bcp_weight, s.largest_component) == (None, 2 / 3, 0.5, "auto")


def test_the_end_of_the_pretraining_stays_when_a_training_becomes_longer(ready):
    dataset = ready()
    trainer = make_trainer(BCPTrainer, dataset, num_epochs=3, num_iterations_per_epoch=3, warm_up=0.5)
    trainer.initialize()
    assert trainer.warm_up.first_step == 5  # of 4.5
    file = str(dataset.results / "checkpoint.pth")
    trainer.save_checkpoint(file)
    longer = make_trainer(BCPTrainer, dataset, num_epochs=12, num_iterations_per_epoch=3, warm_up=0.5)
    longer.initialize()
    longer.load_checkpoint(file)
    assert longer.warm_up.first_step == 5


@pytest.fixture
def everything_is_labelled(behind_pretraining, monkeypatch):
    """Nothing is pasted into the labelled images: one of the two mixes is labelled everywhere, the other nowhere."""

    def make(labels):
        monkeypatch.setattr("nnunet_semiseg.trainers.bcp.draw_box", lambda x, share: torch.zeros_like(BOX))
        return behind_pretraining(labels)

    return make


@pytest.mark.parametrize("wrong", [0.1, 0.9])
def test_ignored_voxels_do_not_count(wrong, everything_is_labelled):
    """Half of the voxels are class 1, of p = 0.6; what the network says of the others has no effect."""
    trainer = everything_is_labelled(LabelManager({"background": 0, "a": 1, "ignore": 2}, None))
    target = torch.ones(1, 1, 8, 8, 8)
    target[:, :, 4:] = 2
    images = of_probability(*[0.6] * 4, *[wrong] * 4)
    loss = terms_of(trainer, batch_of(images, target, weak=images, strong=images))["supervised"]
    assert loss.item() == pytest.approx(loss_by_hand(0.6), abs=1e-4)


@pytest.mark.parametrize("wrong", [0.1, 0.9])
def test_nor_do_those_of_regions(wrong, everything_is_labelled):
    """The same, of two regions that are both there; the last channel of the target says what is ignored."""
    trainer = everything_is_labelled(LabelManager({"background": 0, "both": (1, 2), "b": (2,), "ignore": 3}, [1, 2]))
    target = torch.ones(1, 3, 8, 8, 8)
    target[:, 2, :4] = 0
    logits = torch.full((1, 2, 8, 8, 8), math.log(0.6 / 0.4))
    logits[:, :, 4:] = math.log(wrong / (1 - wrong))
    loss = terms_of(trainer, batch_of(logits, target, weak=logits, strong=logits))["supervised"]
    assert loss.item() == pytest.approx(loss_by_hand(0.6), abs=1e-4)


def test_it_needs_pairs(ready):
    with pytest.raises(UserError, match="unlabeled_batch_size=1: BCP mixes each of the 2 labelled samples"):
        make_trainer(BCPTrainer, ready(), unlabeled_batch_size=1)


def test_the_teacher_sees_the_weak_view_and_the_mixes_are_of_the_strong_one(behind_pretraining):
    """The weak view says class 1 with 0.9; the strong one would say 0, with 0.3 within the box and 0.2 around it."""
    images, strong = of_probability(*[0.6] * 8), within_and_around(within=0.3, around=0.2)
    weak = of_probability(*[0.9] * 8)
    pseudo = terms_of(behind_pretraining(), batch_of(images, weak=weak, strong=strong))["pseudo"]
    assert pseudo.item() == pytest.approx(0.5 * (loss_by_hand(0.3) + loss_by_hand(0.2)), abs=1e-4)
