"""The setting `external_masks`: masks on the preprocessed grid, in the loader, and their say in pseudo-labels."""

import json
import math

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from training import CLASSES, REGIONS, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.data.external_masks import add_masks
from nnunet_semiseg.data.prepared_masks import MaskedDataset, PreparedMasks
from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.external_masks import join_masks
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.semiseg import SemiSegTrainer
from nnunet_semiseg.training.other_models import MaskVotes
from nnunet_semiseg.training.turns import Turn

SURE_A, MAYBE_A = (0.03, 0.95, 0.02), (0.1, 0.6, 0.3)
SURE_0, MAYBE_0 = (0.95, 0.03, 0.02), (0.6, 0.3, 0.1)
A, B = (0.0, 0.8, 0.0), (0.0, 0.7, 0.9)
"""of two models; the first is good at class 1 alone"""


@pytest.mark.parametrize(
    "teacher, masks, weights, label, counts",
    [
        (SURE_A, [1], [A], 1, 1.8),  # both say so
        (MAYBE_A, [1], [A], 1, 1.8),
        (SURE_0, [1], [A], 0, 1),  # a sure teacher is contradicted
        (MAYBE_0, [1], [A], 1, 0.8),  # an unsure one gives way
        (SURE_A, [0], [A], 1, 1),
        (MAYBE_A, [0], [A], 2, 0.8),  # not class 1, says the mask; it knows nothing of class 2, the teacher's next
        (MAYBE_A, [0], [B], 0, 0.7),  # neither of both, by the lesser weight
        (MAYBE_0, [0], [A], 0, 1.8),
        (MAYBE_0, [2], [A], 0, 1),  # a class of weight 0 is no vote
        (MAYBE_A, [-1], [A], 1, 1),  # not known
        (MAYBE_A, [0], [(0.0, 0.0, 0.0)], 1, 1),  # a model that is good at nothing
        (MAYBE_0, [1, 2], [A, B], 2, 0.9),  # most votes
        (MAYBE_0, [1, 1], [A, B], 1, 1.5),
    ],
)
def test_who_is_believed_by_hand(teacher, masks, weights, label, counts):
    p = torch.tensor(teacher).view(1, 3, 1, 1)
    decision = p.argmax(1, keepdim=True).short()
    result, weight = join_masks(decision, p, torch.tensor(masks).view(1, -1, 1, 1), torch.tensor(weights), 0.9)
    assert (result.item(), weight.item()) == (label, pytest.approx(counts))
    assert result.dtype == torch.int16 and result.shape == weight.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("mask, label, counts", [(1, [True, False], (1.8 + 0.6) / 2), (-1, [True, True], 1)])
def test_each_region_is_decided_on_its_own(mask, label, counts):
    """The teacher is sure of the first region (values 1, 2), not of the second (2); behind both is the ignore label."""
    decision, p = torch.tensor([True, True, False]).view(1, 3, 1, 1), torch.tensor([0.95, 0.6]).view(1, 2, 1, 1)
    regions = [torch.tensor([1, 2]), torch.tensor([2])]
    result, weight = join_masks(
        decision, p, torch.tensor([[[[mask]]]]), torch.tensor([[0.8, 0.6]]), unsure=0.9, regions=regions
    )
    assert result.flatten().tolist() == [*label, False] and weight.item() == pytest.approx(counts)


def of_probability(p):
    logits = torch.zeros(2, 2, 8, 8, 8)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def with_votes(trainer, label_manager, weights):
    trainer.masks = PreparedMasks([], [weights])
    trainer.votes = MaskVotes(trainer.masks, list(weights), label_manager, 0.9, torch.device("cpu"))
    return trainer


@pytest.mark.parametrize("trainer_class, mixes", [(MeanTeacherTrainer, 1), (SemiSegTrainer, 2)])
def test_the_loss_by_hand(trainer_class, mixes):
    """The teacher gives class 1 a probability of 0.6; the mask says 0 in the first half of the slices, and 1 behind.

    So labels of 0 count 0.75 and those of 1 count 1.75. The student's view is flipped: so are the masks. It gives
    class 1 a probability of 0.6 in the first half, where label and weight come from the second one, and 0.3 behind.
    """
    masks = torch.cat([torch.full((2, 1, 4, 8, 8), value) for value in (0, 1)], 2)
    student = torch.cat([of_probability(p)[:, :, :4] for p in (0.3, 0.6)], 2)
    trainer = with_votes(bare_trainer(trainer_class), CLASSES, {"a": 0.75})
    trainer.draw_turn = lambda: Turn(flips=(0,))
    of_labels = 0
    if mixes == 2:  # in one of the mixes all is unlabelled, in the other nothing is, and the label is 0
        of_labels = (-math.log(0.7) - math.log(0.4)) / 2
        trainer.settings = SemiSegTrainer.settings_class(box=1.0, paste_share=1.0, pseudo_weight=1.0)
    terms = terms_of(trainer, batch_of(student, weak=of_probability(0.6), strong=student, extra={"masks": masks}))
    expected = (1.75 * -math.log(0.6) + 0.75 * -math.log(0.7)) / (1.75 + 0.75)
    assert terms["consistency" if mixes == 1 else "mixed"].item() == pytest.approx(expected + of_labels, rel=1e-4)


def test_the_loss_of_regions_by_hand():
    """Unsure of both regions, the teacher says neither; the mask says the first one. Heads count 0.8 and 1.6."""
    logits = torch.full((2, 2, 8, 8, 8), math.log(0.4 / 0.6))
    trainer = with_votes(bare_trainer(MeanTeacherTrainer, REGIONS), REGIONS, {"both": 0.8, "b": 0.6})
    masks = torch.ones(2, 1, 8, 8, 8, dtype=torch.int16)
    batch = batch_of(logits, torch.zeros(2, 2, 8, 8, 8), weak=logits, strong=logits, extra={"masks": masks})
    assert terms_of(trainer, batch)["consistency"].item() == pytest.approx((-math.log(0.4) - math.log(0.6)) / 2, 1e-4)


def true_labels(dataset, folder, cases):
    """The true labels as another model's masks; an unlabelled case has that of the first labelled one."""
    folder.mkdir()
    ending = json.loads((dataset.raw / "dataset.json").read_text())["file_ending"]
    for case in cases:
        source = case if case.startswith("tr") else "tr_000"
        (folder / f"{case}{ending}").write_bytes((dataset.raw / "labelsTr" / f"{source}{ending}").read_bytes())
    return folder


@pytest.mark.parametrize("dims", [2, 3])
def test_masks_come_with_the_unlabelled_patches(ready, tmp_path, dims):
    dataset = ready(dims=dims, labeled=3, unlabeled=1)
    cases = ["tr_000", "tr_001", "tr_002"]  # and none of the unlabelled case
    add_masks(dataset.id, "other", true_labels(dataset, tmp_path / "masks", cases))
    plans = "nnUNetSemiSegSmallPlans"
    with pytest.raises(UserError, match="other: these masks are not .* preprocessed: run nnunet_semiseg preprocess_un"):
        make_trainer(SemiSegTrainer, dataset, external_masks="other")
    preprocess_unlabeled(dataset.id, [dataset.configuration], plans, 0)
    folder = next(dataset.preprocessed.glob("*__masks")) / "other"
    labeled = folder.parent.with_name(folder.parent.name.removesuffix("__masks"))
    for case in cases:  # as nnU-Net has brought the label to the same grid; -1 is outside there
        made, label = (blosc2.open(str(f))[:] for f in (folder / f"{case}.b2nd", labeled / f"{case}_seg.b2nd"))
        assert np.array_equal(made, label.clip(0)) and made.any()
    before = (folder / "tr_000.b2nd").stat().st_mtime_ns
    preprocess_unlabeled(dataset.id, [dataset.configuration], plans, 0)
    assert (folder / "tr_000.b2nd").stat().st_mtime_ns == before  # done once

    trainer = make_trainer(SemiSegTrainer, dataset, external_masks=["other"], num_labeled=1, turns=False)
    assert trainer.masks.weights == [{"kidney": 1.0, "tumour": 1.0}]
    trainer.initialize()
    trainer.on_train_start()
    loader, drawn = trainer.dataloader_train, {}
    for _ in range(20):  # 40 draws of 3 cases: none is missed
        batch = next(loader)
        for case, mask, view in zip(batch["cases"], batch["extra"]["masks"], batch["views"]["weak"], strict=True):
            drawn.setdefault(case, []).append((mask, view))
    trainer.train_step(batch)
    assert drawn.keys() >= {"tr_001", "tr_002", "un_000"}
    assert all((mask == -1).all() for mask, _ in drawn["un_000"])
    for mask, view in drawn["tr_001"] + drawn["tr_002"]:  # the structures are brighter, one more than the other
        means = [view[mask == value].mean() for value in (0, 1, 2) if (mask == value).sum() > 20]
        assert means == sorted(means)
    assert any((mask == 2).any() for mask, _ in drawn["tr_001"] + drawn["tr_002"])


def test_a_class_is_weighed_by_the_labels_of_this_training_alone(ready, tmp_path):
    """Masks are right on the first case and empty on the two others, which a training with one label must not see."""
    dataset = ready(labeled=3, unlabeled=1)
    folder = true_labels(dataset, tmp_path / "masks", ["tr_000", "tr_001", "tr_002"])
    for case in ("tr_001", "tr_002"):
        mask = sitk.ReadImage(str(folder / f"{case}.nii.gz"))
        sitk.WriteImage(mask * 0, str(folder / f"{case}.nii.gz"))
    result = add_masks(dataset.id, "other", folder)
    assert result["kidney"] == {"dice": pytest.approx(1 / 3), "cases": 3, "weight": 0}
    preprocess_unlabeled(dataset.id, [dataset.configuration], "nnUNetSemiSegSmallPlans", 0)
    all_labels = make_trainer(MeanTeacherTrainer, dataset, external_masks="other").masks
    one_label = make_trainer(MeanTeacherTrainer, dataset, external_masks="other", num_labeled=1).masks
    assert all_labels.weights == [{"kidney": 0, "tumour": 0}] and one_label.weights == [{"kidney": 1, "tumour": 1}]
    assert all_labels.lines() == ["external_masks other: kidney not used, tumour not used"]

    with pytest.raises(UserError, match=r"external_masks=othr: .* holds no masks \(there are: other\): add them with"):
        make_trainer(MeanTeacherTrainer, dataset, external_masks=["othr"])
    add_masks(dataset.id, "other", true_labels(dataset, tmp_path / "better", ["tr_000", "tr_001"]))
    with pytest.raises(
        UserError, match=r"other: was made from masks that differ from those in .*: run nnunet_semiseg preprocess_u"
    ):
        make_trainer(MeanTeacherTrainer, dataset, external_masks="other")
    preprocess_unlabeled(dataset.id, [dataset.configuration], "nnUNetSemiSegSmallPlans", 0)
    prepared = next(dataset.preprocessed.glob("*__masks/other/tr_000.b2nd"))
    prepared.write_bytes(prepared.read_bytes()[:50])
    with pytest.raises(UserError, match=r"tr_000.b2nd: half-written or damaged: remove it, then run nnunet_semiseg"):
        make_trainer(MeanTeacherTrainer, dataset, external_masks="other")


def test_a_loss_that_masks_cannot_teach_is_refused():
    with pytest.raises(UserError, match="external_masks and consistency=paper: .* need consistency=dice_ce"):
        MeanTeacherTrainer.settings_class(external_masks="other", consistency="paper")


class TwoCases:
    identifiers = ["a", "b"]

    def load_case(self, identifier):
        return np.zeros((1, 2, 2)), np.array([[[0, -1], [0, 0]]], np.int8), None, {}


def test_where_a_case_has_no_mask_it_is_not_known(tmp_path):
    content = blosc2.asarray(np.array([[[2, 0], [0, 1]]], np.int16))
    (tmp_path / "a.b2nd").write_bytes(content.to_cframe())
    dataset = MaskedDataset(TwoCases(), [tmp_path, tmp_path / "nothing"])
    part = (slice(None), slice(0, 2), slice(0, 2))
    assert dataset.load_case("a")[1][part].tolist() == [[[0, -1], [0, 0]], [[3, 1], [1, 2]], [[0, 0], [0, 0]]]
    assert dataset.load_case("b")[1].shape == (3, 2, 2) and not dataset.load_case("b")[1][part][1:].any()
