import pytest
from test_contracts import every_trainer
from training import in_last_epoch, make_trainer

from nnunet_semiseg.data.labeled_subset import take_labeled
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.trainers.supervised import SupervisedTrainer


def test_the_first_cases_in_the_published_order_keep_their_label():
    training, published = ["a", "b", "c", "d"], {"semiseg": {"labeled_order": ["c", "d", "x", "a"]}}
    assert take_labeled(training, ["v"], None, published) == (training, ["v"], [])
    assert take_labeled(training, ["v"], 2, published) == (["c", "d"], ["v"], ["a", "b"])
    assert take_labeled(training, ["v"], 2, {}) == (["a", "b"], ["v"], ["c", "d"])
    # fold all validates on what it trains on, and never on a case whose label must not be seen
    assert take_labeled(training, training, 1, published) == (["c"], ["c"], ["d", "a", "b"])
    with pytest.raises(UserError, match="num_labeled=5: the fold has 4 labelled training cases: set it to 4 or less"):
        take_labeled(training, [], 5, {})


def test_the_baseline_sees_the_labelled_ones_only(ready):
    trainer = make_trainer(SupervisedTrainer, ready(labeled=3), num_labeled=2)
    assert [sorted(part) for part in trainer.do_split()] == 2 * [["tr_000", "tr_001"]]


@every_trainer
def test_the_others_are_unlabelled_and_no_label_leaks(trainer_class, ready):
    dataset = ready(labeled=3, unlabeled=1)
    batches = []
    for _ in range(2):
        trainer = in_last_epoch(trainer_class, dataset, num_labeled=1)
        assert set(trainer.dataloader_train.data_loader.labeled_loader.indices) == {"tr_000"}
        assert sorted(trainer.dataloader_train.data_loader.unlabeled_loader.indices) == ["tr_001", "tr_002", "un_000"]
        batches.append([next(trainer.dataloader_train) for _ in range(3)])
        scramble_labels(trainer.preprocessed_dataset_folder, "tr_001", "tr_002")
        for record in dataset.preprocessed.glob("*__labeled.json"):  # it would tell
            record.unlink()
    assert {"tr_001", "tr_002"} & {key for batch in batches[0] for key in batch["cases"]}
    for before, after in zip(*batches, strict=True):
        for view, images in before["views"].items():
            assert images.equal(after["views"][view])


def scramble_labels(folder, *cases):
    """Noise in place of the labels, foreground locations of it, and the same voxels outside the image as before."""
    import blosc2
    import numpy as np
    from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle

    rng = np.random.default_rng(0)
    for case in cases:
        labels = blosc2.open(f"{folder}/{case}_seg.b2nd", mode="a")
        labels[:] = np.where(labels[:] < 0, labels[:], rng.integers(0, 3, labels.shape)).astype(labels.dtype)
        properties = load_pickle(f"{folder}/{case}.pkl")
        properties["class_locations"] = {1: np.zeros((1, 4), int)}
        write_pickle(properties, f"{folder}/{case}.pkl")
