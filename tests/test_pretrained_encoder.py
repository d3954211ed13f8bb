"""A checkpoint in nnssl's format becomes the encoder that a training begins with."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from training import make_trainer

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.training.pretrained_encoder import load_pretrained_encoder


def residual(channels: int = 1, stages: int = 2, width: int = 4) -> ResidualEncoderUNet:
    features = [width * 2**i for i in range(stages)]
    strides = [1] + [2] * (stages - 1)
    return ResidualEncoderUNet(
        channels, stages, features, nn.Conv3d, 3, strides, 1, 2, n_conv_per_stage_decoder=1, conv_bias=True
    )


def write_nnssl(network, file, channels: int = 1, prefix: str = "", **plan):
    """As nnssl writes it: the whole network's weights, and where the encoder is."""
    weights = {prefix + name: weight for name, weight in network.state_dict().items()}
    content = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
        "key_to_encoder": f"{prefix}encoder.stages",
        "key_to_stem": f"{prefix}encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "pretrain_num_input_channels": channels,
    }
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": content | plan}, file)
    return str(file)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["", "student."])
def test_the_encoder_and_its_stem_are_taken_and_the_decoder_is_not(tmp_path, prefix):
    there, here = residual(), residual()
    before = here.decoder.seg_layers[0].weight.clone()
    line = load_pretrained_encoder(here, write_nnssl(there, tmp_path / "a.pth", prefix=prefix))
    assert same(here.encoder, there.encoder) and torch.equal(here.decoder.seg_layers[0].weight, before)
    assert not torch.equal(before, there.decoder.seg_layers[0].weight) and "; not:" not in line


def test_the_stem_of_one_channel_is_repeated_over_three(tmp_path):
    there, here = residual(1), residual(3)
    load_pretrained_encoder(here, write_nnssl(there, tmp_path / "a.pth"))
    x = torch.randn(1, 1, 4, 4, 4)
    for ours, theirs in zip(here.encoder(x.repeat(1, 3, 1, 1, 1)), there.encoder(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)  # the same image in every channel: the same features
    assert torch.allclose(here.encoder.stem.convs[0].conv.weight[:, 2:], there.encoder.stem.convs[0].conv.weight / 3)


def test_stages_that_are_not_here_are_named(tmp_path):
    there, here = residual(stages=3), residual(stages=2)
    line = load_pretrained_encoder(here, write_nnssl(there, tmp_path / "a.pth"))
    assert "; not: encoder.stages.2." in line and "is not in the network" in line
    assert torch.equal(next(here.encoder.stages[1].parameters()), next(there.encoder.stages[1].parameters()))


@pytest.mark.parametrize(
    "here, reason",
    [
        (residual(width=8), r"encoder.stem.convs.0.conv.weight is \(4, 1, 3, 3, 3\) there and \(8, 1, 3, 3, 3\) here"),
        (PlainConvUNet(1, 2, [4, 8], nn.Conv3d, 3, [1, 2], 1, 2, 1), "encoder.stem.* is not in the network"),
    ],
    ids=["wider", "plain"],
)
def test_another_network_is_refused(here, reason, tmp_path):
    with pytest.raises(UserError, match=f"an encoder of ResEncL that does not fit these plans .*{reason}"):
        load_pretrained_encoder(here, write_nnssl(residual(), tmp_path / "a.pth"))


def test_a_network_of_several_encoders_is_refused(tmp_path):
    two = nn.Module()
    two.encoder = nn.ModuleList([residual().encoder, residual().encoder])  # as in Semi-CML
    with pytest.raises(UserError, match="^setting pretrained_encoder=.*a.pth: .* has several encoders: set it"):
        load_pretrained_encoder(two, write_nnssl(residual(), tmp_path / "a.pth"))


def test_a_training_begins_with_it_and_one_that_goes_on_does_not(tiny_dataset, tmp_path):
    dataset = tiny_dataset(labeled=3, unlabeled=2, channels=2)
    dataset.plan()
    donor = make_trainer(MeanTeacherTrainer, dataset, seed=1)
    donor.initialize()
    weights = donor.network.state_dict()
    file = tmp_path / "encoder.pth"
    plan = {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stages.0", "pretrain_num_input_channels": 2}
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": plan}, file)
    trainer = make_trainer(MeanTeacherTrainer, dataset, seed=2, pretrained_encoder=str(file))
    trainer.initialize()
    assert same(trainer.network.encoder, donor.network.encoder)
    assert not same(trainer.network.decoder.stages, donor.network.decoder.stages)
    goes_on = make_trainer(MeanTeacherTrainer, dataset, seed=2, pretrained_encoder=str(file), goes_on=True)
    goes_on.initialize()
    assert not same(goes_on.network.encoder, donor.network.encoder)
    with pytest.raises(UserError, match="pretrained_encoder=/no/such: no such file: give a checkpoint of nnssl"):
        make_trainer(MeanTeacherTrainer, dataset, pretrained_encoder="/no/such")
