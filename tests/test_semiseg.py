"""The recipe: its phases, its mixes by hand, what it decides, and where its unlabelled patches come from."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from training import CLASSES, bare_trainer, batch_of, in_last_epoch, make_trainer, terms_of

from nnunet_semiseg.data.agreement import mean_agreement
from nnunet_semiseg.data.foreground_chance import chance_of_foreground
from nnunet_semiseg.data.pseudo_foreground import (
    PseudoForegroundDataset,
    classes_of_all,
    leave_out,
    outliers,
)
from nnunet_semiseg.data.two_streams import UnlabeledDataLoader
from nnunet_semiseg.losses.copy_paste import draw_box
from nnunet_semiseg.trainers.semiseg import SemiSegSettings, SemiSegTrainer, strong_view
from nnunet_semiseg.training.warm_up import WarmUp


def of_probability(p: float) -> torch.Tensor:
    """Logits (2, 2, 9, 9, 9) whose probability of class 1 is p everywhere."""
    logits = torch.zeros(2, 2, 9, 9, 9)
    logits[:, 1] = math.log(p / (1 - p))
    return logits


def recipe(progress: float, **settings) -> SemiSegTrainer:
    trainer = bare_trainer(SemiSegTrainer, progress=progress, **settings)
    trainer.configuration_manager = SimpleNamespace(patch_size=(9, 9, 9), spacing=(1, 1, 1))
    trainer.step, trainer.num_iterations_per_epoch = 20 * progress, 20
    trainer.warm_up = WarmUp(0.1, 20, trainer.label_manager, ["a"], trainer.device)
    return trainer


def a_batch():
    """Images are logits: labelled background with 0.75, the weak view class 1 with 0.9, the strong one with 0.6."""
    return batch_of(of_probability(0.25), weak=of_probability(0.9), strong=of_probability(0.6))


@pytest.mark.parametrize(("paste_share", "labeled"), [(0.0, 1 + (2 / 3) ** 3), (1.0, 1)])
def test_both_mixes_by_hand(paste_share, labeled):
    """Labelled voxels are right with 0.75; unlabelled ones say class 1 with 0.6, as the teacher does, and count half.

    If boxes are pasted into labelled patches, the two mixes together have every voxel of the patch once labelled and
    once unlabelled. If not, the second mix still has labelled voxels in its box.
    """
    for progress in (0.1, 1.0):
        terms = terms_of(recipe(progress, paste_share=paste_share), a_batch())
        assert {name: term.item() for name, term in terms.items()} == pytest.approx(
            {"mixed": -labeled * math.log(0.75) - (2 - labeled) * 0.5 * math.log(0.6)}, rel=1e-4
        )


def test_voxels_of_which_the_teacher_is_not_sure_do_not_count():
    """The teacher is sure of class 1 with 0.9. Below that threshold only the labelled voxels are left."""
    for threshold, of_pseudo in ((0.89, -0.5 * math.log(0.6)), (0.91, 0)):
        term = terms_of(recipe(1.0, match_threshold=threshold, paste_share=1.0), a_batch())["mixed"].item()
        assert term == pytest.approx(-math.log(0.75) + of_pseudo, rel=1e-4)


def test_boxes_are_pasted_into_labelled_patches_in_a_share_of_the_steps():
    """The network sees whole patches, or mixes: of labelled patches with 0.25 and unlabelled ones with 0.6."""
    for paste_share, seen in ((0.0, [{0.25}, {0.25, 0.6}]), (1.0, [{0.25, 0.6}, {0.25, 0.6}])):
        trainer, images = recipe(1.0, paste_share=paste_share), []
        trainer.network = lambda x, images=images: (images.append(x), x)[1]
        terms_of(trainer, a_batch())
        assert [{round(v.item(), 2) for v in x.softmax(1)[:, 1].unique()} for x in images] == seen
    torch.manual_seed(0)
    trainer, sizes = recipe(1.0, paste_share=0.5), []
    trainer.network = lambda x: (sizes.append(len(x.unique())), x)[1]
    for _ in range(40):
        terms_of(trainer, a_batch())
    assert 10 <= sum(size > 2 for size in sizes[::2]) <= 30  # half of them; logits of a whole patch have two values


@pytest.mark.parametrize("paste_share", [0.0, 1.0])
def test_the_warm_up_mixes_labelled_samples_alone(paste_share):
    batch = a_batch()
    batch.images[1] = of_probability(0.5)[0]
    batch.target[1] = 1
    trainer, images = recipe(0.05, paste_share=paste_share), []
    trainer.network = lambda x: (images.append(x), x)[1]
    terms = terms_of(trainer, batch)
    assert len(images) == 1 and torch.equal(images[0], batch.images) == (not paste_share)
    # in each mix of the two samples every voxel keeps the label that belongs to it: as many of the one as of the other
    assert terms["mixed"].item() == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2, rel=1e-4)


def test_a_box_through_all_slices():
    box = draw_box(torch.zeros(1, 1, 5, 9, 9), 1 / 3, whole_first_axis=True)
    assert box.sum() == 5 * 3 * 3 and torch.equal(box[:, :, 0], box[:, :, 4])
    assert draw_box(torch.zeros(1, 1, 6, 9, 9), 1 / 3).sum() == 2 * 3 * 3
    trainer = recipe(1.0)
    assert not trainer.augments_in_2d
    trainer.configuration_manager.patch_size = (8, 32, 32)
    assert trainer.augments_in_2d
    trainer.configuration_manager.patch_size = (128, 32)
    assert not trainer.augments_in_2d


class OneCase:
    """An image of 10 x 10 x 10 whose own properties name a voxel that must not be looked at."""

    identifiers = ["hidden"]

    def load_case(self, identifier):
        image = np.zeros((1, 10, 10, 10), np.float32)
        return image, np.zeros((1, 10, 10, 10), np.int8), None, {"class_locations": {1: np.array([[0, 1, 1, 1]])}}


def loader_of(folder, share):
    dataset = PseudoForegroundDataset(OneCase(), folder)
    return UnlabeledDataLoader(dataset, 2, (4, 4, 4), (4, 4, 4), CLASSES, None, share)


def corners(loader, number=60) -> set:
    """Where the second patch of a batch begins."""
    loader.get_indices = lambda: ["hidden", "hidden"]
    found = []

    def remember(*args, **kwargs):
        found.append(tuple(UnlabeledDataLoader.get_bbox(loader, *args, **kwargs)[0]))
        return [0, 0, 0], [4, 4, 4]

    loader.get_bbox = remember
    for _ in range(number):
        loader.generate_train_batch()
    return set(found[1::2])


def test_patches_are_drawn_around_what_was_found_and_never_around_a_hidden_label(tmp_path):
    np.random.seed(0)
    assert len(corners(loader_of(tmp_path, 1 / 3))) > 30  # nothing was found yet: anywhere
    write_pickle({1: np.array([[0, 6, 5, 4]])}, str(tmp_path / "hidden.pkl"))
    assert corners(loader_of(tmp_path, 1 / 3)) == {(4, 3, 2)}  # the voxel less half of the patch
    assert len(corners(loader_of(tmp_path, 0.0))) > 30
    write_pickle({1: []}, str(tmp_path / "hidden.pkl"))
    assert len(corners(loader_of(tmp_path, 1 / 3))) > 30


class Labelled:
    """Cases of 1 x 8 x 8 voxels; of one the corner is foreground, the other has none."""

    identifiers = ["corner", "empty"]

    def load_case(self, identifier):
        places = np.array([[0, 0, 0, 0]]) if identifier == "corner" else []
        locations = {1: places, (-1, 0, 1): np.array([[0, 0, y, 4] for y in range(8)])}
        return np.zeros((1, 1, 8, 8), np.float32), None, None, {"class_locations": locations}


def test_the_chance_that_a_random_patch_has_foreground():
    """Of the two positions along each axis, one of four patches has the corner."""
    assert chance_of_foreground(Labelled(), (7, 7)) == pytest.approx(0.25 / 2, abs=0.03)
    assert chance_of_foreground(Labelled(), (1, 9, 9)) == 0.5
    assert chance_of_foreground(Labelled(), (8, 8)) == 0.5


@pytest.mark.parametrize("chance, given, share", [(0.5, None, 1 / 3), (0.7, None, 0), (0.7, 0.2, 0.2), (0.5, 0.0, 0)])
def test_patches_are_drawn_at_random_where_these_have_foreground_anyway(chance, given, share):
    trainer = recipe(1.0, unlabeled_foreground=given)
    trainer.chance_of_foreground = chance
    assert trainer.foreground_share == share


def test_the_agreement_of_two_decisions():
    a = np.array([[0, 1, 1, 2], [0, 0, 0, 0]])
    b = np.array([[0, 1, 0, 0], [0, 0, 0, 0]])
    assert mean_agreement([a, b], [1, 2, 3]) == (2 / 3 + 0) / 2  # nobody names class 3
    assert mean_agreement([a, b], [(1, 2), (2,)]) == (2 / 4 + 0) / 2
    assert mean_agreement([a * 0, b * 0], [1, 2]) == 1
    assert mean_agreement([a, b], [1, 2, 3], expected=[3]) == (2 / 3 + 0 + 0) / 3
    assert mean_agreement([a * 0, b * 0], [1, (1, 2)], expected=[(1, 2)]) == 0


def test_the_classes_that_every_labelled_case_has():
    everywhere = {1: [[0, 0, 0, 0]], (1, 2): [[0, 0, 0, 0]]}
    cases = {"a": everywhere | {2: [[0, 1, 1, 1]]}, "b": everywhere | {2: []}}
    dataset = SimpleNamespace(
        identifiers=list(cases), load_case=lambda case: (None, None, None, {"class_locations": cases[case]})
    )
    assert classes_of_all(dataset) == [(1, 2), 1]


def test_cases_far_below_the_others_are_left_out_up_to_a_share(tmp_path):
    """Half of the scores lie 0.01 and more from 0.9: three robust standard deviations are 0.044."""
    scores = {f"good_{i}": 0.9 + 0.01 * (i - 4) / 2 for i in range(9)} | {"worst": 0.1, "bad": 0.7, "unknown": math.nan}
    assert outliers(scores, 0.2) == ["worst", "bad"]
    assert outliers(scores, 0.1) == ["worst"]
    assert outliers(dict(list(scores.items())[3:]), 0.2) == []  # eight known cases are too few
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert leave_out(tmp_path, 0.2) == ["worst", "bad"]


class NeverListed(np.ndarray):
    """The names of so many cases that a batch must not look at each of them."""

    def __iter__(self):
        raise AssertionError("a batch looks at all cases")


def test_a_case_that_is_left_out_is_not_drawn_from_then_on(tmp_path):
    np.random.seed(0)
    loader = loader_of(tmp_path, 0.0)
    loader.indices = np.array(["a", "b", "c"]).view(NeverListed)
    drawn = lambda: {case for _ in range(40) for case in loader.get_indices()}  # noqa: E731
    assert drawn() == {"a", "b", "c"}
    (tmp_path / "left_out.json").write_text('["b"]')
    assert drawn() == {"a", "c"}
    (tmp_path / "left_out.json").write_text("[]")
    os.utime(tmp_path / "left_out.json", ns=(1, 1))
    assert drawn() == {"a", "b", "c"}


def test_the_search_finds_what_the_teacher_takes_for_foreground(tiny_dataset):
    dataset = tiny_dataset(labeled=3, unlabeled=2)
    dataset.plan()
    trainer = make_trainer(SemiSegTrainer, dataset, warm_up=0.3, unlabeled_foreground=0.5)
    trainer.on_train_start()
    assert not trainer.foreground_folder.exists()
    trainer.current_epoch = 1  # the end of the warm-up: 0.3 of 3 epochs
    trainer.on_train_epoch_start()
    found = {file.stem for file in trainer.foreground_folder.iterdir()}
    assert found == {"un_000", "un_001", "scores", "left_out"}
    scores = json.loads((trainer.foreground_folder / "scores.json").read_text())
    assert set(scores) == {"un_000", "un_001"} and all(0 <= score <= 1 for score in scores.values())
    _, _, _, properties = trainer.unlabeled_dataset().load_case("un_000")
    assert set(properties["class_locations"]) == {1, 2}
    lines = (trainer.foreground_folder.parent / "decisions.txt").read_text().splitlines()
    assert lines[0] == "labels only before step 2 (warm_up)"
    assert lines[1] == "EMA decay 0.9000 for 6 iterations (ema_decay)"
    assert lines[2] == "largest component kept of: kidney, tumour (largest_component=auto)"
    assert all(
        f"({name})" in line
        for line, name in zip(
            lines[3:],
            ("strong_probability", "contrast_probability", "local_probability", "turns", "paste_share", "box")
            + ("unlabeled_foreground", "leave_out"),
            strict=True,
        )
    )


def test_a_search_that_was_interrupted_is_not_compared_with_itself(tiny_dataset):
    """Without mirroring, a search is compared with the one before it."""
    dataset = tiny_dataset(labeled=3, unlabeled=2)
    dataset.plan()
    trainer = make_trainer(SemiSegTrainer, dataset, warm_up=0.3, unlabeled_foreground=0.5)
    trainer.on_train_start()
    trainer.inference_allowed_mirroring_axes = None

    def search(epoch: int) -> list[bool]:
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        return [math.isnan(x) for x in json.loads((trainer.foreground_folder / "scores.json").read_text()).values()]

    assert search(1) == [True, True]
    (trainer.foreground_folder / "un_001.npz").unlink()
    assert search(1) == [True, True]
    assert search(2) == [False, False]


def test_a_step_of_the_last_epoch_teaches_and_moves_the_teacher(tiny_dataset):
    dataset = tiny_dataset(labeled=3, unlabeled=2)
    dataset.plan()
    trainer = in_last_epoch(SemiSegTrainer, dataset)
    before = [p.clone() for p in trainer.teacher.parameters()]
    terms = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(term) for term in terms.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.teacher.parameters(), strict=True))


def test_one_labelled_and_one_unlabelled_case_are_enough(tiny_dataset):
    dataset = tiny_dataset(labeled=1, unlabeled=1)
    dataset.plan()
    trainer = in_last_epoch(SemiSegTrainer, dataset)
    assert not trainer.looks_at_cases  # one case is too few to leave any out
    terms = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(term) for term in terms.values())


def test_default_settings():
    s = SemiSegSettings()
    assert (s.paste_share, s.contrast_probability, s.local_probability) == (0.5, 0.8, 0)
    assert (s.warm_up, s.pseudo_weight, s.box, s.leave_out) == (None, 0.5, 2 / 3, 0.2)
    assert (s.unlabeled_foreground, s.deploy, s.largest_component, s.turns) == (None, "teacher", "auto", False)
    assert strong_view(s) == "nnU-Net's intensity transforms, brightness, contrast and gamma with probability 0.8"
    assert strong_view(SemiSegSettings(strong_probability=None)).endswith("with their own probabilities")
