import math

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import CLASSES, REGIONS, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.trainers.dtc import DTCTrainer, add_level_sets, level_set


def images_of(logits, level_sets):
    """Images of which the network says these logits, and, by tanh, these level sets."""
    return torch.cat((logits, level_sets.atanh()), 1)


def a_batch(labeled, unlabeled, target=None, level_sets=None):
    """A labelled stream and an unlabelled one, each of logits and level sets."""
    images = images_of(*labeled)
    target = torch.zeros_like(images[:, :1]) if target is None else target
    extra = {"level_sets": torch.zeros_like(labeled[1]) if level_sets is None else level_sets}
    return batch_of(images, target, extra, strong=images_of(*unlabeled))


def test_a_level_set_by_hand():
    """Voxels 2 to 5 of 8 are inside: distances 2 1 | 1 2 2 1 | 1 2 over 2, and 0 on the inner boundary."""
    mask = np.zeros((8, 8, 8), dtype=bool)
    mask[2:6] = True
    values = level_set(mask)
    assert values.dtype == np.float32 and (values == values[:, :1, :1]).all()
    assert values[:, 0, 0].tolist() == [1, 0.5, 0, -1, -1, 0, 0.5, 1]


def test_what_is_not_there_is_outside():
    assert (level_set(np.zeros((8, 8, 8), bool)) == 1).all() and (level_set(np.ones((8, 8, 8), bool)) == -1).all()


def test_level_sets_of_classes_and_regions():
    target = torch.zeros(1, 1, 8, 8, 8)
    target[:, :, 2:6] = 1
    sets = add_level_sets({"target": [target, target]}, {}, CLASSES)["level_sets"]
    assert sets.shape == (1, 2, 8, 8, 8)
    assert sets[0, 1, :, 0, 0].tolist() == [1, 0.5, 0, -1, -1, 0, 0.5, 1]
    assert sets[0, 0, :, 0, 0].tolist() == [-1, 0, 0.5, 1, 1, 0.5, 0, -1]
    regions = torch.cat((target, torch.zeros_like(target)), 1)
    sets = add_level_sets({"target": regions}, {}, REGIONS)["level_sets"]
    assert sets[0, 0, :, 0, 0].tolist() == [1, 0.5, 0, -1, -1, 0, 0.5, 1] and (sets[0, 1] == 1).all()


def test_both_tasks_agree_where_the_sign_is_right():
    """p is 1/2 everywhere; sigmoid(-1500 z) is 1 for z = -0.1, 0 for 0.1: (1/2)^2; 1/2 for z = 0: no difference."""
    z = torch.full((1, 2, 8, 8, 8), 0.1)
    z[:, :, :4] = -0.1
    z[:, :, 2:6] = 0
    flat = torch.zeros(1, 2, 8, 8, 8)
    loss = terms_of(bare_trainer(DTCTrainer, consistency="paper"), a_batch((flat, z), (flat, z)))["dtc"]
    assert loss.item() == pytest.approx(0.25 / 2)


@pytest.mark.parametrize("regions", [False, True])
def test_each_task_learns_the_others_decision(regions):
    """Level sets are -0.1 for class 1 and 0.3 for 0, so decide for 1, to which p gives 0.2, and so decides for 0.

    Classes: -log 0.2, and (1500 * 0.3 + 1500 * 0.1) / 1500. Regions, that of class 0 is not there and has p = 1/2:
    (log 2 - log 0.2) / 2, and (0 + 0.1) / 2. Both streams are alike; at the end of the ramp the weight is 2.
    """
    p, z = torch.zeros(2, 2, 2, 8, 8, 8)
    p[:, 1], z[:, 0], z[:, 1] = math.log(0.2 / 0.8), 0.3, -0.1
    trainer = bare_trainer(DTCTrainer, REGIONS if regions else CLASSES, consistency_weight=2.0, level_set_weight=0.0)
    target = torch.zeros(2, 2 if regions else 1, 8, 8, 8)
    loss = terms_of(trainer, a_batch((p, z), (p, z), target))["dtc"]
    expected = (math.log(2) - math.log(0.2)) / 2 + 0.1 / 2 if regions else -math.log(0.2) + 0.4
    assert loss.item() == pytest.approx(2 * expected, rel=1e-4)


def test_where_the_signs_are_right_level_sets_are_free():
    """Both tasks say class 1, the level sets with -0.1 and 0.1, or with -0.9 and 0.9."""
    p = torch.zeros(1, 2, 8, 8, 8)
    p[:, 1] = 10
    for size in (0.1, 0.9):
        z = torch.tensor([size, -size]).view(1, 2, 1, 1, 1).expand_as(p).clone().requires_grad_()
        loss = terms_of(bare_trainer(DTCTrainer, memory="fast"), a_batch((p, z), (p, z)))["dtc"]
        loss.backward()
        assert loss.item() < 1e-4 and not z.grad.any()


def test_default_settings():
    settings, paper = DTCTrainer.settings_class(), DTCTrainer.settings_class(consistency="paper")
    assert settings.weight(0.4) == settings.weight(1) == paper.weight(1) == 1 and settings.level_set_weight == 0.3
    assert paper.weight(0.5) == pytest.approx(math.exp(-1.25))


def test_tasks_agree_in_both_streams_by_a_ramp():
    """Labelled: p is 1/2, the level sets say 1; unlabelled: p is 0.2 and 0.8, they say 0 and 1. The ramp at 0.2."""
    trainer = bare_trainer(DTCTrainer, progress=0.2, consistency="paper", consistency_weight=3.0)
    flat, other = torch.zeros(2, 2, 2, 8, 8, 8)
    other[:, 1] = math.log(0.8 / 0.2)
    inside = torch.full((2, 2, 8, 8, 8), -0.1)
    z = inside.clone()
    z[:, 0] = 0.1
    loss = terms_of(trainer, a_batch((flat, inside), (other, z)))["dtc"]
    assert loss.item() == pytest.approx(3 * math.exp(-5 * 0.8**2) * (0.5**2 + 0.2**2) / 2)


@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_each_task_learns_from_the_other(consistency):
    p, z = torch.zeros(2, 2, 2, 8, 8, 8)
    z[:, 0] = -0.001
    p.requires_grad_(), z.requires_grad_()
    trainer = bare_trainer(DTCTrainer, memory="fast", consistency=consistency)  # one graph, from the loss to the images
    terms_of(trainer, a_batch((p, z), (p, z)))["dtc"].backward()
    assert p.grad.all() and z.grad[:, 0].all()


def test_level_sets_are_the_second_half_of_the_heads_by_tanh():
    """The network says x, 2 x, 3 x, 4 x, where there are labels with x = 0.5, elsewhere -0.25; true level sets are 0.

    The former's are above 0, which is outside, the latter's below: all is inside.
    """
    trainer, seen = bare_trainer(DTCTrainer, consistency="paper"), []
    trainer.loss = lambda output, target: (seen.append(output), output.sum())[1]
    labeled, unlabeled = (
        torch.tensor([x, 2 * x, 3 * x, 4 * x]).view(1, 4, 1, 1, 1).expand(2, 4, 8, 8, 8) for x in (0.5, -0.25)
    )
    batch = batch_of(labeled, extra={"level_sets": torch.zeros(2, 2, 8, 8, 8)}, strong=unlabeled)
    terms = terms_of(trainer, batch)
    assert len(seen) == 1 and seen[0][1, :, 0, 0, 0].tolist() == [0.5, 1]
    assert terms["level_sets"].item() == pytest.approx(0.3 * (math.tanh(1.5) ** 2 + math.tanh(2) ** 2) / 2)

    def p(difference):
        return 1 / (1 + math.exp(-difference))

    outside, inside = (p(-0.5) ** 2 + p(0.5) ** 2) / 2, ((1 - p(0.25)) ** 2 + (1 - p(-0.25)) ** 2) / 2
    assert terms["dtc"].item() == pytest.approx((outside + inside) / 2)


def test_the_supervised_loss_of_level_sets():
    """A quarter of the voxels is wrong by 0.5: 0.3 * 0.25 / 4."""
    z, true = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
    true[:, :, :2] = 0.5
    target = torch.zeros(1, 1, 8, 8, 8)
    trainer = bare_trainer(DTCTrainer, consistency="paper")
    trainer.loss = lambda output, target: torch.tensor(7.0)
    terms = terms_of(trainer, a_batch((z, z), (z, z), target, true))
    assert terms["supervised"] == 7 and terms["level_sets"].item() == pytest.approx(0.3 * 0.25 / 4)


def test_a_patch_with_ignored_voxels_has_no_level_sets():
    """Of two samples that are wrong by 0.5 and by 1 one has an ignored voxel: 2 * 0.25."""
    trainer = bare_trainer(
        DTCTrainer,
        LabelManager({"background": 0, "a": 1, "ignore": 2}, None),
        level_set_weight=2.0,
        consistency="paper",
    )
    trainer.loss = lambda output, target: torch.tensor(7.0)
    z, true = torch.zeros(2, 2, 8, 8, 8), torch.tensor([0.5, 1.0]).view(2, 1, 1, 1, 1).expand(2, 2, 8, 8, 8)
    target = torch.zeros(2, 1, 8, 8, 8)
    target[1, 0, 0, 0, 0] = 2
    batch = a_batch((z, z), (z, z), target, true)
    loss = terms_of(trainer, batch)["level_sets"]
    assert loss.item() == pytest.approx(2 * 0.25)
    target[:] = 2
    assert terms_of(trainer, batch)["level_sets"] == 0


def test_the_loader_makes_level_sets_of_the_augmented_labels(ready):
    trainer = make_trainer(DTCTrainer, ready())
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    again = add_level_sets(batch, {}, trainer.label_manager)["level_sets"]
    assert torch.equal(batch["extra"]["level_sets"], again) and again.min() == -1 and again.max() == 1
    x = batch["data"]
    trainer.network.eval()
    both = trainer.network.decode(trainer.network.encode(x).skips)
    for deployed, output in zip(trainer.network(x), both, strict=True):
        assert torch.equal(deployed, output[:, :3]) and output.shape[1] == 6
