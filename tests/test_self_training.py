import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from training import CLASSES, REGIONS, bare_trainer, batch_of, make_trainer, nnunet_loss, terms_of

from nnunet_semiseg.data.pseudo_label_files import label_cases, without_islands
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.settings.plans import given_settings
from nnunet_semiseg.trainers.self_training import SelfTrainingTrainer
from nnunet_semiseg.training.schedules import RestartingPolyLR


@pytest.mark.parametrize("kind", [dict(), dict(dims=2, size=32), dict(regions=True)], ids=["3d", "2d", "regions"])
def test_pseudo_labels_lie_on_disk_and_are_what_is_trained_on(ready, kind):
    dataset = ready(**kind)
    trainer = make_trainer(SelfTrainingTrainer, dataset, num_epochs=2, num_iterations_per_epoch=1)
    losses, step = [], trainer.train_step

    def recording(batch):
        if not trainer.round:
            assert batch["views"] == {} == batch["extra"] and not batch["cases"]  # nothing is loaded that is not used
        else:
            target = batch["extra"]["pseudo"]
            assert len(target[0]) == 2 and set(batch["cases"]) <= {f"un_{i:03d}" for i in range(4)}
        losses.append(step(batch))
        return losses[-1]

    trainer.train_step = recording
    first = {}

    def remember():
        first["weights"] = [p.clone() for p in trainer.network.parameters() if p.ndim > 1]
        start_again()
        first["fresh"] = [p.clone() for p in trainer.network.parameters() if p.ndim > 1]

    start_again, trainer.start_again = trainer.start_again, remember
    trainer.run_training()
    assert losses[0]["pseudo"] == 0 and losses[1]["pseudo"] != 0
    folder = trainer.folder(1)
    ending = dataset.dataset_json["file_ending"]
    for i in range(4):
        image = sitk.ReadImage(str(dataset.image(f"un_{i:03d}")))
        label = sitk.ReadImage(str(folder / f"un_{i:03d}{ending}"))
        assert label.GetSize() == image.GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(label))) <= {0, 1, 2}
        assert "class_locations" in load_pickle(str(folder / f"un_{i:03d}.pkl"))
    assert all((old != new).all() for old, new in zip(first["weights"], first["fresh"], strict=True))  # from scratch


def test_a_pseudo_label_is_the_networks_decision(ready, monkeypatch):
    bars = []
    monkeypatch.setattr("nnunet_semiseg.data.pseudo_label_files.tqdm", lambda cases, *_, **__: bars.append(1) or cases)
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=2, largest_component="off")
    trainer.on_train_start()
    trainer.current_epoch = 1
    trainer.network.forward = lambda x: torch.stack((0.5 + 0 * x[:, 0], x[:, 0] > 0, -x[:, 0].abs()), 1).float()
    label_cases(trainer, trainer.unlabeled_dataset(), trainer.folder(1))
    del trainer.network.forward
    assert bars == [1]  # it may take hours
    loader = trainer.make_unlabeled_loader(trainer.dataloader_train.data_loader.labeled_loader)
    for case in loader._data.identifiers:
        data, label, _, properties = loader._data.load_case(case)
        assert np.array_equal(label[:][0], (data[:][0] > 0).astype(np.int8))
        reviewed = sitk.GetArrayFromImage(sitk.ReadImage(str(trainer.folder(1) / f"{case}.nii.gz")))
        assert np.array_equal(reviewed, label[:][0])  # what is looked at is what is trained on
        assert len(properties["class_locations"][1]) and not len(properties["class_locations"][2])


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
@pytest.mark.parametrize("planar", [False, True])
def test_pseudo_labels_have_no_islands(labels, planar):
    """Slices 1101, 0001 and 0001. In 3d the last column is the largest, with three voxels against two.

    In 2d each slice keeps its own: 1100, 0001 and 0001. Head 0 is the background, or a region that may have islands.
    """
    says = torch.tensor([[[1.0, 1, -1, 1]], [[-1.0, -1, -1, 1]], [[-1.0, -1, -1, 1]]])  # (Z, Y, X)
    logits = torch.stack((0 * says if labels is CLASSES else says, says))
    kept = without_islands(logits, [1], labels, planar)
    decision = (kept[1] > kept[0] if labels is CLASSES else kept[1] > 0).int().squeeze(1).tolist()
    assert decision == [[1, 1, 0, 0] if planar else [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    if labels is REGIONS:
        assert torch.equal(kept[0], says)
    assert without_islands(logits, [], labels, planar) is logits


def test_the_trainers_heads_have_no_islands(ready, monkeypatch):
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=2, largest_component="on")
    trainer.on_train_start()
    trainer.current_epoch, seen = 1, []
    monkeypatch.setattr(
        "nnunet_semiseg.data.pseudo_label_files.label_case", lambda *args: seen.append((args[2], list(args[4])))
    )
    label_cases(trainer, trainer.unlabeled_dataset(), trainer.folder(1))
    assert seen == [(f"un_{i:03d}", [1, 2]) for i in range(4)]


def test_cases_are_labelled_as_they_are_predicted(ready):
    """Mirrored on all axes: a network that sees more on the left is asked from the right, too."""
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=2)
    trainer.on_train_start()
    trainer.current_epoch = 1
    seen = set()

    def network(x):
        seen.update(torch.stack((x[:, 0, :2].mean((1, 2, 3)), x[:, 0, -2:].mean((1, 2, 3))), 1).argmax(1).tolist())
        return torch.stack((0 * x[:, 0], x[:, 0], -x[:, 0]), 1).float()

    image = np.zeros((1, 24, 24, 24), np.float32)
    image[:, :12] = 1
    dataset = trainer.unlabeled_dataset()
    load = dataset.load_case
    dataset.load_case = lambda case: (image, *load(case)[1:])
    trainer.network.forward = network
    label_cases(trainer, dataset, trainer.folder(1))
    assert seen == {0, 1} and trainer.inference_allowed_mirroring_axes == (0, 1, 2)


def test_interrupted_while_it_labels_it_goes_on(ready):
    dataset = ready()
    settings = dict(num_epochs=2, num_iterations_per_epoch=1)
    straight = make_trainer(SelfTrainingTrainer, dataset, **settings)
    straight.run_training()
    broken = make_trainer(SelfTrainingTrainer, dataset, **settings, save_every=50)
    dataset_of, count = broken.unlabeled_dataset, []

    class Killed(Exception):
        pass

    def dies_at_the_third_case():
        dataset = dataset_of()
        load = dataset.load_case

        def load_case(case):
            count.append(case)
            if broken.round and len(count) > 2:
                raise Killed
            return load(case)

        if broken.round:
            count.clear()
            dataset.load_case = load_case
        return dataset

    broken.unlabeled_dataset = dies_at_the_third_case
    with pytest.raises(Killed):
        broken.run_training()
    resumed = make_trainer(SelfTrainingTrainer, dataset, **settings, save_every=50)
    resumed.load_checkpoint(resumed.output_folder + "/checkpoint_latest.pth")
    assert resumed.current_epoch == 1
    done = {f: f.stat().st_mtime_ns for f in resumed.folder(1).glob("*.pkl")}
    assert len(done) == 2
    resumed.run_training()
    assert all(f.stat().st_mtime_ns == t for f, t in done.items()) and len(list(resumed.folder(1).glob("*.pkl"))) == 4
    for a, b in zip(straight.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_outside_of_the_nonzero_mask_stays_marked(ready, monkeypatch):
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=2)
    trainer.on_train_start()
    trainer.current_epoch = 1
    dataset = trainer.unlabeled_dataset()
    load = dataset.load_case

    def with_an_outside(case):
        data, seg, previous, properties = load(case)
        seg = seg[:]
        seg[:, :5] = -1
        return data, seg, previous, properties

    dataset.load_case = with_an_outside
    trainer.unlabeled_dataset = lambda: dataset
    label_cases(trainer, trainer.unlabeled_dataset(), trainer.folder(1))
    loader = trainer.make_unlabeled_loader(trainer.dataloader_train.data_loader.labeled_loader)
    _, label, _, _ = loader._data.load_case("un_000")
    assert (label[:][0, :5] == -1).all() and label[:][0, 5:].min() >= 0


@pytest.mark.parametrize("changed", [dict(num_epochs=5), dict(rounds=2)])
def test_rounds_that_changed_are_refused(ready, changed):
    dataset = ready()
    trainer = make_trainer(SelfTrainingTrainer, dataset, num_epochs=4)
    trainer.initialize()
    file = str(dataset.results / "checkpoint.pth")
    trainer.save_checkpoint(file)
    ((name, value),) = changed.items()
    with given_settings({}, accept_changes=True):
        later = make_trainer(SelfTrainingTrainer, dataset, goes_on=True, **dict(num_epochs=4) | changed)
        with pytest.raises(UserError, match=rf"does not fit, because {name} was \d and is {value}: .* --set {name}="):
            later.load_checkpoint(file)


def test_other_epochs_do_not_matter_to_a_validation(ready):
    dataset = ready()
    trainer = make_trainer(SelfTrainingTrainer, dataset, num_epochs=4)
    trainer.initialize()
    file = str(dataset.results / "checkpoint.pth")
    trainer.save_checkpoint(file)
    make_trainer(SelfTrainingTrainer, dataset, num_epochs=5).load_checkpoint(file)


def test_a_pseudo_label_that_is_gone_is_missed(ready):
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=4)
    trainer.initialize()
    trainer.current_epoch = 3
    with pytest.raises(UserError, match="un_000.pkl: the pseudo-label is missing: train again, without --c"):
        trainer.on_train_start()


def test_labels_of_an_older_training_are_not_used(ready):
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=3, rounds=2)
    trainer.initialize()
    for number in (1, 2):
        trainer.folder(number).mkdir(parents=True)
        (trainer.folder(number) / "un_000.pkl").write_bytes(b"old")
    trainer.on_train_start()
    assert not trainer.folder(1).exists() and not trainer.folder(2).exists()


def test_rounds_and_their_learning_rates(ready):
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=9, rounds=2)
    assert trainer.starts == [0, 3, 6]
    rounds = []
    for trainer.current_epoch in range(9):
        rounds.append(trainer.round)
    assert rounds == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    schedule, rates = RestartingPolyLR(optimizer, 1.0, [0, 2, 6]), []
    for epoch in range(6):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 0.5**0.9, 1, 0.75**0.9, 0.5**0.9, 0.25**0.9])


def test_too_short_for_its_rounds(ready):
    with pytest.raises(UserError, match="num_epochs=2: too few for rounds=2: set it to 3 or more"):
        make_trainer(SelfTrainingTrainer, ready(), num_epochs=2, rounds=2)


def test_the_best_network_is_one_of_the_last_round(ready):
    """Validation Dice of 0.9 at the end of round 0, then 0 and 0.5: the mean begins anew with the new network."""
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=4, num_iterations_per_epoch=1)
    trainer.on_train_start()
    best = []
    for trainer.current_epoch, dice in enumerate((0.9, 0.9, 0.0, 0.5)):
        if trainer.current_epoch in trainer.starts[1:]:
            trainer._best_ema = None  # as start_again
        for key in ("train_losses", "val_losses", "dice_per_class_or_region", "lrs"):
            trainer.logger.log(key, [0.0] if "per" in key else 0.0, trainer.current_epoch)
        right, wrong = np.array([dice]), np.array([1 - dice])
        trainer.on_validation_epoch_end([{"tp_hard": right, "fp_hard": wrong, "fn_hard": wrong, "loss": np.array(0.0)}])
        best.append(trainer.logger.get_value("ema_fg_dice", step=-1))
    assert best == pytest.approx([0.9, 0.9, 0.0, 0.9 * 0.0 + 0.1 * 0.5])


def test_a_new_round_has_a_new_optimizer_and_forgets_the_best_network(ready):
    trainer = make_trainer(SelfTrainingTrainer, ready(), num_epochs=2, num_iterations_per_epoch=1)
    trainer.on_train_start()
    trainer.train_step(next(trainer.dataloader_train))
    trainer.current_epoch, trainer._best_ema = 1, 0.9
    label_cases(trainer, trainer.unlabeled_dataset(), trainer.folder(1))
    trainer.start_again()
    assert trainer._best_ema is None and not trainer.optimizer.state  # no momentum of the old weights
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.network.parameters()}


def test_pseudo_labels_are_drawn_as_labels_are_and_ignore_nothing(ready):
    dataset = ready(labels={"background": 0, "kidney": 1, "ignore": 2})
    trainer = make_trainer(SelfTrainingTrainer, dataset, num_epochs=2, unlabeled_batch_size=3)
    trainer.on_train_start()
    trainer.current_epoch = 1
    label_cases(trainer, trainer.unlabeled_dataset(), trainer.folder(1))
    labeled = trainer.dataloader_train.data_loader.labeled_loader
    for probabilistic in (False, True):
        name = "_probabilistic_oversampling" if probabilistic else "_oversample_last_XX_percent"
        labeled.get_do_oversample = getattr(labeled, name)
        loader = trainer.make_unlabeled_loader(labeled)
        assert labeled.has_ignore and not loader.has_ignore and loader.batch_size == 3
        assert loader.oversample_foreground_percent == labeled.oversample_foreground_percent > 0
        assert loader.get_do_oversample == getattr(loader, name)


def test_the_loss_by_hand():
    """Everything is class 1, of probability 0.8: Dice + CE = -2 0.8 / 1.8 - log 0.8, by half."""
    logits = torch.zeros(1, 2, 8, 8, 8)
    logits[:, 1] = math.log(4)
    trainer = bare_trainer(SelfTrainingTrainer, pseudo_weight=0.5)
    trainer.loss, trainer.num_epochs, trainer.current_epoch = nnunet_loss(False), 2, 1
    ones = torch.ones(1, 1, 8, 8, 8)
    terms = terms_of(trainer, batch_of(logits, ones, {"pseudo": ones}, strong=logits))
    assert terms["supervised"].item() == pytest.approx(-1.6 / 1.8 - math.log(0.8), abs=1e-4)
    assert terms["pseudo"].item() == pytest.approx(0.5 * (-1.6 / 1.8 - math.log(0.8)), abs=1e-4)
    trainer.current_epoch = 0  # there are no pseudo-labels yet
    terms = terms_of(trainer, batch_of(logits, ones))
    assert terms["supervised"].item() == pytest.approx(-1.6 / 1.8 - math.log(0.8), abs=1e-4)
    assert terms["pseudo"] == 0
