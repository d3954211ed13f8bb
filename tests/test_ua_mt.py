import math
from dataclasses import replace

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from training import CLASSES, REGIONS, Echo, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.losses.segmentation import entropy
from nnunet_semiseg.networks.multi_decoder import Encoded
from nnunet_semiseg.trainers.ua_mt import UAMTTrainer, masked_mse


def test_only_certain_voxels_count():
    """8 of 512 voxels are certain: two differ by 0.6 in both classes, the others not at all."""
    student, teacher = torch.full((1, 2, 8, 8, 8), 0.5), torch.full((1, 2, 8, 8, 8), 0.5)
    mask = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    student[0, :, 0, 0, :2] += torch.tensor([0.3, -0.3]).view(2, 1)
    teacher[0, :, 0, 0, :2] -= torch.tensor([0.3, -0.3]).view(2, 1)
    student[0, :, 4:] = 0.9  # uncertain: whatever it is
    assert masked_mse(student, teacher, mask).item() == pytest.approx(2 * 0.36 / 8)
    assert masked_mse(student, teacher, ~mask[:, :0].any(1, keepdim=True) & False).item() == 0


def test_entropy_of_classes_and_of_regions():
    p = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1, 1).expand(1, 2, 8, 8, 8)
    one = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    torch.testing.assert_close(entropy(p, False), torch.full((1, 1, 8, 8, 8), one))
    torch.testing.assert_close(entropy(p, True), torch.full((1, 2, 8, 8, 8), one))  # 0.25 and 0.75, either way


class Teacher(Echo):
    """Counts what it is asked; its passes, which begin with `encode` alone, may say something of their own."""

    def __init__(self, of_passes=None):
        super().__init__()
        self.of_passes, self.asked = of_passes, {"target": 0, "pass": 0}

    def __call__(self, x):
        self.asked["target"] += 1
        return x

    def decode(self, skips, decoder=0):
        self.asked["pass"] += 1
        return super().decode(skips) if self.of_passes is None else next(self.of_passes)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_the_consistency_of_a_step(regions, certain, consistency):
    """The teacher says 0.7 and 0.3 in every pass (entropy 0.61) or nearly 1 (0.01); at the end H is log 2 = 0.69."""
    p = 0.999 if certain else 0.55  # entropies 0.008 and 0.688; the threshold at the start is 0.521
    logit = math.log(p / (1 - p))
    logits = torch.zeros(1, 2, 8, 8, 8)
    logits[:, 0], logits[:, 1] = (logit, -logit) if regions else (logit, 0)
    labels = REGIONS if regions else CLASSES
    trainer = bare_trainer(
        UAMTTrainer, labels, progress=0, teacher=Teacher(), mc_passes=3, input_noise=0.0, mc_dropout=0.0,
        consistency=consistency,
    )  # fmt: skip
    student = torch.zeros(1, 2, 8, 8, 8)
    target = torch.zeros(1, 2 if regions else 1, 8, 8, 8)
    loss = terms_of(trainer, batch_of(student, target, weak=logits, strong=student))["consistency"]
    assert trainer.teacher.asked == {"target": 1, "pass": 3}
    # the student says 1/2 of everything; weight exp(-5), or 0.1 exp(-5)
    expected = 0.1 * (p - 0.5) ** 2 if consistency == "paper" else math.log(2)
    assert loss.item() == pytest.approx(math.exp(-5) * expected * certain, rel=1e-4)


def of_slices(*probabilities):
    """Logits (2, 3, 8, 8, 8) whose probabilities differ between the slices 0 and 1, 2 and 3, 4 and 5, 6 and 7."""
    logits = torch.tensor(probabilities).log().repeat_interleave(2, 0).T
    return logits.view(1, 3, 8, 1, 1).expand(2, 3, 8, 8, 8)


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("consistency", ["dice_ce", "paper"])
def test_where_the_teacher_is_certain(passes, consistency):
    """Halfway in its ramp (0.29) H is 0.75 + 0.25 * 0.29, 0.82, of log 3: 0.90.

    Entropies of the passes' mean: 0.88 in the first slices, 0.95, 1.10 (each pass is sure of another class), and 0.10.
    The first and last count, or all where there are no passes; towards what the teacher says without dropout.
    """
    sure = [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]]
    dropped = [of_slices([0.66, 0.17, 0.17], [0.6, 0.2, 0.2], sure[i], sure[0]) for i in range(3)]
    says = [0.5, 0.3, 0.2]
    student = [[0.4, 0.4, 0.2], [0.1, 0.1, 0.8], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]]
    labels = LabelManager({"background": 0, "a": 1, "b": 2}, None)
    trainer = bare_trainer(
        UAMTTrainer, labels, progress=0.2, teacher=Teacher(iter(dropped)),
        mc_passes=passes, input_noise=0.0, mc_dropout=0.0, ramp_length=0.4, consistency_weight=2,
        consistency=consistency,
    )  # fmt: skip
    batch = batch_of(torch.zeros(2, 3, 8, 8, 8), weak=of_slices(*[says] * 4), strong=of_slices(*student))
    loss = terms_of(trainer, batch)["consistency"]
    assert trainer.teacher.asked == {"target": 1, "pass": passes}
    distances = [sum((a - b) ** 2 for a, b in zip(p, says, strict=True)) / 3 for p in student]
    count = distances[::3] if passes else distances
    expected = sum(count) / len(count)
    if consistency == "dice_ce":  # towards class 0, a mean over all voxels, of which those count
        losses = [-math.log(p[0]) for p in student]
        expected = sum(losses[::3] if passes else losses) / 4
    assert loss.item() == pytest.approx(2 * math.exp(-1.25) * expected, rel=1e-4)


def test_a_pass_sees_noise_that_is_cut_off_and_a_dropped_bottleneck():
    """Noise of 0.1 is cut off at 0.2. Normal numbers cut off at 2 have a variance of 0.74 + 4 * 0.046, 0.92."""
    seen, read = [], []

    class Noisy(Echo):
        def encode(self, x, text=None):
            seen.append(x)
            return Encoded([x, torch.ones(2, 64, 4, 4, 4)], None)

        def decode(self, skips, decoder=0):
            read.append(skips[0])
            return skips[1]

    images = torch.full((2, 1, 32, 32, 32), 3.0)
    p = bare_trainer(UAMTTrainer, REGIONS, teacher=Noisy()).sample(images)
    assert len(read) == 1 and read[0] is seen[0]  # the bottleneck alone is dropped
    noise = seen[0] - images
    assert noise.min().item() == pytest.approx(-0.2, abs=1e-5) and noise.max().item() == pytest.approx(0.2, abs=1e-5)
    assert noise.std().item() == pytest.approx(0.1 * math.sqrt(0.92), rel=0.02) and abs(noise.mean()) < 0.003
    assert p.unique().tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])  # of 0 and of 1 / (1 - 0.5)
    assert (p.flatten(2).std(2) == 0).all()  # whole channels


def test_the_student_sees_the_strong_view_with_a_dropped_bottleneck():
    """Labelled samples are 1, the weak view 2, the strong one 3; the dropout is 1/2, and only of the last features."""
    read = []

    class Student(Echo):
        def encode(self, x, text=None):
            return Encoded([x, x, x], None)

        def decode(self, skips, decoder=0):
            read.append(skips)
            return skips[-1]

    labeled, weak, strong = (torch.full((2, 64, 4, 4, 4), value) for value in (1.0, 2.0, 3.0))
    trainer = bare_trainer(UAMTTrainer, network=Student())
    terms_of(trainer, batch_of(labeled, weak=weak, strong=strong))
    seen = [[x.unique().tolist() for x in features] for features in read]
    assert seen == [[[1], [1], [0, 2]], [[3], [3], [0, 6]]]


def test_labels_teach_the_student():
    """Labelled background, of which it says 0.8; what it says elsewhere does not matter."""
    images, other = torch.zeros(2, 2, 2, 8, 8, 8)
    images[:, 0] = math.log(0.8 / 0.2)
    trainer = bare_trainer(UAMTTrainer, mc_dropout=0.0)
    loss = terms_of(trainer, batch_of(images, weak=other, strong=other))["supervised"]
    assert loss.item() == pytest.approx(-math.log(0.8))


def test_default_settings():
    settings = UAMTTrainer.settings_class()
    assert (settings.mc_passes, settings.mc_dropout, settings.input_noise) == (8, 0.5, 0.1)
    assert settings.weight(0.4) == settings.weight(1) == 1
    paper = UAMTTrainer.settings_class(consistency="paper")
    assert paper.weight(0.5) == pytest.approx(0.1 * math.exp(-1.25)) and paper.weight(1) == 0.1


def test_passes_differ_by_dropout_and_noise(ready):
    trainer = make_trainer(UAMTTrainer, ready(dims=2, size=32))
    trainer.on_train_start()
    x = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    settings = trainer.settings
    for off in ({"input_noise": 0.0}, {"mc_dropout": 0.0}):  # either is enough
        trainer.settings = replace(settings, **off)
        assert not torch.equal(trainer.sample(x), trainer.sample(x))
    trainer.settings = replace(settings, input_noise=0.0, mc_dropout=0.0)
    assert torch.equal(trainer.sample(x), trainer.sample(x))
    assert torch.equal(trainer.teacher(x), trainer.teacher(x))
    trainer.network.eval()
    assert torch.equal(trainer.network(x)[0], trainer.network(x)[0])  # no dropout is left when it predicts
