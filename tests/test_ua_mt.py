import math

import pytest
import torch
from training import CLASSES, REGIONS, make_trainer

from nnunet_semiseg.losses.pseudo_labels import entropy
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


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("certain", [False, True])
def test_the_consistency_of_a_step(regions, certain):
    """The teacher says 0.7 and 0.3 in every pass (entropy 0.61) or nearly 1 (0.01); at the end H is log 2 = 0.69."""
    p = 0.999 if certain else 0.55  # entropies 0.008 and 0.688; the threshold at the start is 0.521
    logit = math.log(p / (1 - p))
    logits = torch.zeros(1, 2, 8, 8, 8)
    logits[:, 0], logits[:, 1] = (logit, -logit) if regions else (logit, 0)

    class Trainer:
        settings = UAMTTrainer.settings_class(mc_passes=3, input_noise=0.0)
        label_manager = REGIONS if regions else CLASSES
        drop, sample, progress = None, UAMTTrainer.sample, 0.0
        finest = staticmethod(lambda x: x)
        calls = []

        def teacher(self, x, text=None, decoders=None, perturbations=()):
            self.calls.append(perturbations)
            return logits if decoders is None else [logits]

    trainer = Trainer()
    batch = {"unlabeled": {"weak": torch.zeros(1, 1, 8, 8, 8)}}
    (loss,) = UAMTTrainer.semi_losses(trainer, None, torch.zeros(1, 2, 8, 8, 8), batch).values()
    assert len(trainer.calls) == 1 + 3
    # the student says 1/2 of everything; weight 0.1 exp(-5)
    assert loss.item() == pytest.approx(0.1 * math.exp(-5) * (p - 0.5) ** 2 * certain, rel=1e-4)


def test_passes_differ_by_dropout_and_noise(ready):
    trainer = make_trainer(UAMTTrainer, ready(dims=2, size=32))
    trainer.on_train_start()
    x = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    assert not torch.equal(trainer.sample(x), trainer.sample(x))
    assert torch.equal(trainer.teacher(x), trainer.teacher(x))
    trainer.network.eval()
    assert torch.equal(trainer.network(x)[0], trainer.network(x)[0])  # no dropout is left when it predicts
