"""The unlabelled stream: what the views share and what they do not, and how workers are seeded."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.spatial.transpose import TransposeAxesTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from training import make_trainer

from nnunet_semiseg.data.views import ViewsTransform
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer

NOISE = RandomTransform(GaussianNoiseTransform(noise_variance=(0.5, 0.5)), apply_probability=1)


def views(transforms, names=("weak", "strong"), image=None, segmentation=None):
    image = torch.arange(64.0).view(1, 4, 4, 4) if image is None else image
    segmentation = torch.zeros(1, 4, 4, 4) if segmentation is None else segmentation
    out = ViewsTransform(ComposeTransforms(transforms), names)(image=image, segmentation=segmentation)
    return out["image"].chunk(len(names)), image


def test_views_share_the_mirroring_and_differ_in_intensity():
    torch.manual_seed(0)
    mirrored = set()
    for _ in range(20):
        (weak, strong), image = views([NOISE, MirrorTransform((0, 1, 2)), RemoveLabelTansform(-1, 0)])
        flips = [
            f
            for f in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
            if torch.equal(weak, image.flip(f) if f else image)
        ]
        assert len(flips) == 1  # the weak view is a mirror image, to the bit
        mirrored.add(flips[0])
        assert 0 < (strong - weak).abs().max() < 5  # noise on the same mirror image: another would differ by tens
    assert len(mirrored) > 1


@pytest.mark.parametrize(
    "transform",
    [Rot90Transform(1, (1, 2, 3), {0, 1, 2}), TransposeAxesTransform({0, 1, 2})],
    ids=["turned", "transposed"],
)
def test_views_share_turns_and_transposed_axes(transform):
    """Voxel 2 * 4 * 4 + 3 * 4 + 1 = 45 of 0 to 63 lies where the weak view says, in the strong one, too."""
    places = set()
    for seed in range(20):
        np.random.seed(seed)
        (weak, strong), image = views([NOISE, transform])
        place = tuple(weak[0].eq(45).nonzero()[0].tolist())
        assert sorted(weak.flatten().tolist()) == list(range(64))  # moved, and nothing else
        assert (strong - weak).abs().max() < 5 and not torch.equal(strong, weak)  # moved otherwise it differs by tens
        assert image[0, 2, 3, 1] == 45
        places.add(place)
    assert len(places) > 3


class OfAUser(BasicTransform):
    """Adds a number that is drawn anew for each call."""

    def _apply_to_image(self, img, **params):
        return img + torch.rand(1)

    def _apply_to_segmentation(self, segmentation, **params):
        return segmentation


class OfSegmentations(SegOnlyTransform):
    def _apply_to_segmentation(self, segmentation, **params):
        raise AssertionError("unlabelled patches have no segmentation")


@pytest.mark.parametrize(
    "transform, name",
    [
        (OfAUser(), "OfAUser"),
        (RandomTransform(OfAUser(), apply_probability=0.1), "OfAUser"),
        (ComposeTransforms([NOISE, OfAUser()]), "OfAUser"),
    ],
    ids=["bare", "random", "composed"],
)
def test_a_transform_of_which_it_is_not_known_whether_views_share_it_is_refused(transform, name):
    with pytest.raises(
        UserError, match=f"^{name}: it is not known.*ImageOnlyTransform.*shared_by_views = True"
    ) as error:
        ViewsTransform(ComposeTransforms([MirrorTransform((0,)), transform]), ("weak", "strong"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [MirrorTransform((0,)), OfSegmentations()])
@pytest.mark.parametrize("wrap", [lambda t: t, RandomTransform])
def test_a_choice_between_kinds_is_refused(wrap, other):
    transform = wrap(OneOfTransform([GaussianNoiseTransform(), other]))
    with pytest.raises(UserError, match=rf"GaussianNoiseTransform \(intensity\), {type(other).__name__} \("):
        ViewsTransform(ComposeTransforms([transform]), ("weak", "strong"))


def test_nested_and_empty_composes_are_taken_apart():
    made = ViewsTransform(
        ComposeTransforms([ComposeTransforms([MirrorTransform((0,)), NOISE]), ComposeTransforms([])]),
        ("weak", "strong"),
    )
    assert [len(part.transforms) for part in (made.spatial, made.intensity, made.masking)] == [1, 1, 0]


def test_a_users_shared_transform_may_read_the_segmentation():
    class Reads(OfAUser):
        shared_by_views = True

        def get_parameters(self, **data_dict):
            return {"shape": data_dict["segmentation"].shape}

    (weak, strong), _ = views([Reads()])
    assert torch.equal(weak, strong)


@pytest.mark.parametrize("wrap", [lambda t: t, RandomTransform, lambda t: OneOfTransform([t, t])])
@pytest.mark.parametrize("shared", [True, False])
def test_a_users_transform_says_whether_views_share_it(shared, wrap):
    (weak, *strong), image = views(
        [wrap(type("Mine", (OfAUser,), {"shared_by_views": shared})())], ("weak", "strong_1", "strong_2")
    )
    if shared:
        assert all(torch.equal(weak, x) for x in strong) and not torch.equal(weak, image)
    else:  # one draw for each strong view, none for the weak one
        assert torch.equal(weak, image) and not torch.equal(*strong)
        assert not any(torch.equal(weak, x) for x in strong)


def test_one_of_a_kind_is_known():
    (weak, strong), image = views([OneOfTransform([MirrorTransform((0, 1, 2)), Rot90Transform(1)]), OfSegmentations()])
    assert torch.equal(weak, strong) and sorted(weak.flatten().tolist()) == sorted(image.flatten().tolist())


def test_strong_views_are_drawn_anew():
    (first, second), _ = views([NOISE], ("strong_1", "strong_2"))
    assert not torch.equal(first, second)


def test_outside_of_the_mask_stays_zero_in_every_view():
    segmentation = torch.zeros(1, 4, 4, 4)
    segmentation[:, 0] = -1
    (weak, strong), image = views([NOISE, MaskImageTransform([0], 0, 0)], segmentation=segmentation)
    assert (weak[:, 0] == 0).all() and (strong[:, 0] == 0).all()
    assert torch.equal(weak[:, 1:], image[:, 1:]) and (strong[:, 1:] != image[:, 1:]).any()


def test_labels_have_no_say_in_where_the_mask_ends():
    """Between voxels the class with the largest share wins: were there several, -1 would win more often."""
    rotation = SpatialTransform(
        (8, 8, 8), 0, False, p_rotation=1, rotation=(0.3, 0.3), bg_style_seg_sampling=False, mode_seg="bilinear"
    )
    outside = torch.zeros(1, 8, 8, 8)
    outside[:, :4] = -1
    labels = torch.where(outside < 0, outside, torch.randint(0, 5, outside.shape).float())
    image = torch.ones(1, 8, 8, 8)
    seen = []
    for segmentation in (outside, labels):
        (weak,), _ = views([rotation, MaskImageTransform([0], 0, 0)], ("weak",), image, segmentation.clone())
        seen.append(weak)
    assert (seen[0] == 0).any() and torch.equal(*seen)


@pytest.mark.parametrize("anisotropic", [False, True])
def test_nnunets_own_transforms_are_split(anisotropic):
    compose = nnUNetTrainer.get_training_transforms(
        (4, 16, 16), (-0.5, 0.5), [[1, 1, 1], [0.5, 0.5, 0.5]], (0, 1, 2), anisotropic, use_mask_for_norm=[True]
    )
    transform = ViewsTransform(compose, ("weak", "strong"))
    names = [type(t).__name__ for t in transform.spatial.transforms]
    assert names == ["Convert3DTo2DTransform"] * anisotropic + ["SpatialTransform"] + [
        "Convert2DTo3DTransform"
    ] * anisotropic + ["MirrorTransform"]
    assert len(transform.intensity.transforms) == 7 and len(transform.masking.transforms) == 1
    out = transform(image=torch.randn(2, 4, 20, 20), segmentation=torch.zeros(1, 4, 20, 20, dtype=torch.int16))
    assert out["image"].shape == (4, 4, 16, 16) and torch.isfinite(out["image"]).all()


@pytest.fixture
def dataset(ready):
    return ready()


def test_batch_and_seeded_workers(dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = make_trainer(MeanTeacherTrainer, dataset, unlabeled_batch_size=3)
    trainer.initialize()
    train, val = trainer.get_dataloaders()
    try:
        batch = next(train)
        assert batch["data"].shape[0] == 2 and isinstance(batch["target"], list)
        assert list(batch["views"]) == ["weak", "strong"] and batch["extra"] == {}
        assert {v.shape[0] for v in batch["views"].values()} == {3}
        assert len(batch["cases"]) == 3 and all(k.startswith("un_") for k in batch["cases"])
        assert all(k.startswith("tr_") for k in batch["keys"])
        assert len(set(train.seeds)) == 2 and None not in train.seeds
        seen = [next(train)["views"]["strong"] for _ in range(8)]
        assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    finally:
        train._finish()
        val._finish()


def test_unlabelled_patches_are_drawn_uniformly(dataset):
    """Every position is as likely, however much foreground is there: no class is known."""
    trainer = make_trainer(MeanTeacherTrainer, dataset)
    trainer.initialize()
    train, _ = trainer.get_dataloaders()
    loader = train.data_loader.unlabeled_loader
    assert loader.need_to_pad.tolist() == train.data_loader.labeled_loader.need_to_pad.tolist()
    loader.patch_size, loader.need_to_pad = (8, 8, 8), np.zeros(3, int)
    starts = np.array([loader.get_bbox((24, 24, 24), True, {1: [[0, 0, 0, 0]]})[0] for _ in range(3000)])
    counts = np.stack([np.bincount(axis, minlength=17) for axis in starts.T])
    assert counts.shape == (3, 17) and (np.abs(counts - 3000 / 17) < 6 * np.sqrt(3000 / 17)).all()


@pytest.mark.parametrize("trainer_class", [SupervisedTrainer, MeanTeacherTrainer], ids=lambda t: t.__name__)
def test_a_seed_gives_the_same_batches_from_worker_processes(trainer_class, dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    sums = []
    for seed in (7, 7, 8):
        trainer = make_trainer(trainer_class, dataset, seed=seed)
        trainer.initialize()
        train, val = trainer.get_dataloaders()
        sums.append([float(next(train)["data"].sum()) for _ in range(2)])
        for loader in (train, val):
            loader._finish()
    assert sums[0] == sums[1] != sums[2]


RARE = RandomTransform(GaussianNoiseTransform(noise_variance=(0.5, 0.5)), apply_probability=0.01)


def strong_of(transforms, probability, image):
    transform = ViewsTransform(ComposeTransforms(transforms), ("weak", "strong"), probability)
    return transform(image=image, segmentation=torch.zeros_like(image))["image"].chunk(2)


def test_a_strong_view_is_never_the_weak_one():
    torch.manual_seed(0)
    image = torch.arange(64.0).view(1, 4, 4, 4)
    differs = [not torch.equal(*strong_of([RARE], 0.5, image)) for _ in range(100)]
    assert sum(differs) >= 99  # each of ten draws changes it in half of the cases
    assert sum(not torch.equal(*strong_of([RARE], None, image)) for _ in range(100)) < 10  # nnU-Net's own
    weak, strong = strong_of([RARE], 0.5, torch.zeros(1, 1, 1, 1))
    assert weak.item() == 0  # the weak view is not touched


def test_strong_views_take_the_probability_that_they_are_given():
    """Of two transforms with probability 0.8 both apply in 0.64 of the draws that change something."""
    torch.manual_seed(0)

    class Adds(ImageOnlyTransform):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def _apply_to_image(self, img, **params):
            return img + self.value

    transforms = [RandomTransform(Adds(1.0), 0.01), RandomTransform(Adds(10.0), 0.01)]
    values = [strong_of(transforms, 0.8, torch.zeros(1, 1, 1, 1))[1].item() for _ in range(500)]
    assert set(values) == {1, 10, 11}
    assert values.count(11) / 500 == pytest.approx(0.64 / 0.96, abs=0.06)


def test_a_constant_image_stays_as_it_is():
    weak, strong = strong_of(
        [RandomTransform(MultiplicativeBrightnessTransform((0.5, 0.5), False, 1))], 0.8, torch.zeros(1, 2, 2, 2)
    )
    assert torch.equal(weak, strong)


@pytest.mark.parametrize(
    "kind, expected",
    [("all", [0.8] * 7), ("contrast", [0.1, 0.2, 0.8, 0.8, 0.25, 0.8, 0.8])],
)
def test_noise_blur_and_low_resolution_are_strong_only_if_all_transforms_are(kind, expected):
    """nnU-Net's order: noise, blur, brightness, contrast, low resolution, gamma of the inverse image, gamma."""
    stock = nnUNetTrainer.get_training_transforms((8, 32, 32), (-0.1, 0.1), None, (0, 1, 2), False)
    strong = ViewsTransform(stock, ("weak", "strong"), 0.8, kind).intensity.transforms
    assert [t.apply_probability for t in strong] == expected
    own = ViewsTransform(stock, ("weak", "strong")).intensity.transforms
    assert [t.apply_probability for t in own] == [0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3]
