import math

import pytest
import torch
from training import CLASSES, REGIONS, make_trainer

from nnunet_semiseg.networks.multi_decoder import InterpolationUpsampling
from nnunet_semiseg.trainers.mc_net import MCNetTrainer


@pytest.mark.parametrize("labels", [CLASSES, REGIONS])
def test_decoders_approach_each_others_sharpened_output(labels):
    """p of 0.6, 0.5, 0.5. T = 0.5 sharpens 0.6 to 0.36 / (0.36 + 0.16) = 0.692..., and leaves 1/2.

    Ordered pairs (i learns from j): (0 of 1) and (0 of 2): 0.1^2 each; (1 of 0) and (2 of 0): (0.692 - 0.5)^2 each;
    (1 of 2) and (2 of 1): 0. Regions: only one of both heads differs from 1/2.
    """

    class Trainer:
        settings, progress, label_manager = MCNetTrainer.settings_class(sharpening=0.5, mutual_weight=2.0), 1.0, labels
        finest = staticmethod(lambda x: x)

    even, first = torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
    first[:, 1] = math.log(0.6 / 0.4)
    outputs = (first, even, even)
    loss = MCNetTrainer.semi_losses(Trainer(), outputs, outputs, {})["mutual"]
    expected = 2 * 0.1**2 + 2 * (0.36 / 0.52 - 0.5) ** 2
    assert loss.item() == pytest.approx(2 * expected * (0.5 if labels is REGIONS else 1))


def test_labels_of_the_others_get_no_gradient():
    class Trainer:
        settings, progress, label_manager = MCNetTrainer.settings_class(), 1.0, CLASSES
        finest = staticmethod(lambda x: x)

    a, b = torch.randn(1, 2, 8, 8, 8, requires_grad=True), torch.randn(1, 2, 8, 8, 8)
    MCNetTrainer.semi_losses(Trainer(), (a, b, b), (a, b, b), {})["mutual"].backward()
    with_labels = a.grad.clone()
    a.grad = None
    p = a.softmax(1)
    sharp = (b / 0.1).softmax(1)
    (2 * (p - sharp).square().mean()).backward()
    torch.testing.assert_close(with_labels, a.grad)


def test_three_decoders_that_upsample_differently(ready):
    trainer = make_trainer(MCNetTrainer, ready())
    trainer.initialize()
    linear, nearest = trainer.network.other_decoders
    assert [d.transpconvs[0][1].mode for d in (linear, nearest)] == ["trilinear", "nearest"]
    assert not isinstance(trainer.network.decoder.transpconvs[0], InterpolationUpsampling)
