"""Networks: shapes, what the text does to the output, and values worked out by hand."""

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_semiseg.networks.multi_decoder import InterpolationUpsampling, MultiDecoderUNet, extra_decoder
from nnunet_semiseg.networks.planar_text_attention import MultiplanarTextAttention, TextCopy
from nnunet_semiseg.networks.text_guidance import TextGuidance

K, D = 3, 16


def unet(ndim=3, residual=False, deep_supervision=True, stages=3):
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [4, 8, 12, 16][:stages],
        "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "kernel_sizes": [[3] * ndim] * stages,
        "strides": [[1] * ndim] + [[2] * ndim] * (stages - 1),
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{name}",
        kwargs,
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
        1,
        K,
        deep_supervision=deep_supervision,
    )


def dual(ndim=3, residual=False, tmr="multiplanar", deep_supervision=True):
    network = unet(ndim, residual, deep_supervision)
    second = extra_decoder(network, [1, 1], deep_supervision, "linear")
    both = MultiDecoderUNet(network, [second])
    both.guidance = TextGuidance(network.encoder, (K, D), tmr)
    return both


def decoded(network, x, text):
    """The outputs of both decoders, and the aligned features."""
    skips, aligned = network.encode(x, text)
    return [network.decode(skips, i) for i in range(2)], aligned


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tmr", ["multiplanar", "copy", "off"])
def test_multi_decoder_shapes(ndim, residual, tmr):
    network = dual(ndim, residual, tmr)
    x, text = torch.randn(2, 1, *[16] * ndim), torch.randn(K, D)
    outputs, features = decoded(network, x, text)
    assert [[tuple(o.shape) for o in output] for output in outputs] == [[(2, K, *[16] * ndim), (2, K, *[8] * ndim)]] * 2
    assert features.shape == (2, D, *[4] * ndim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2, *[4] * ndim))
    network.guidance.features.copy_(text)
    for stored, given in zip(network(x), outputs[0], strict=True):
        torch.testing.assert_close(stored, given)
    stored = network.encode(x)  # as a teacher's: nothing is to be aligned
    assert stored.aligned is None
    torch.testing.assert_close(stored.skips[-1], network.encode(x, text).skips[-1])


def test_the_text_changes_what_decoders_read_and_not_what_is_aligned():
    network = dual()
    x = torch.randn(1, 1, 16, 16, 16)
    a, b = (network.encode(x, torch.randn(K, D)) for _ in range(2))
    assert (a.skips[-1] - b.skips[-1]).abs().max() > 1e-4  # the bottleneck
    assert all(torch.equal(p, q) for p, q in zip(a.skips[:-1], b.skips[:-1], strict=True))
    assert torch.equal(a.aligned, b.aligned)


def test_without_text_it_is_the_plain_network():
    plain = unet()
    x = torch.randn(1, 1, 16, 16, 16)
    expected = plain(x)
    network = MultiDecoderUNet(plain)
    assert network.encode(x).aligned is None and len(network.parts()) == 2
    assert all(torch.equal(a, b) for a, b in zip(network(x), expected, strict=True))


def test_deep_supervision_is_switched_as_nnunet_does():
    network = dual()
    network.decoder.deep_supervision = False
    assert network(torch.randn(1, 1, 16, 16, 16)).shape == (1, K, 16, 16, 16)


def test_second_decoder_has_weights_of_its_own_and_no_encoder():
    network = dual()
    assert network.other_decoders[0].encoder is None
    names = [n for n, _ in network.named_parameters()]
    assert len(names) == len(set(names)) and not any("other_decoders.0.encoder" in n for n in names)
    # the stock network's first decoder holds the encoder a second time in its state_dict; the second must not
    assert not any(n.startswith("other_decoders.0.encoder") for n in network.state_dict())
    assert all(isinstance(t, InterpolationUpsampling) for t in network.other_decoders[0].transpconvs)
    x, text = torch.randn(1, 1, 16, 16, 16), torch.randn(K, D)
    (first, second), _ = decoded(network, x, text)
    assert not torch.allclose(first[0], second[0])
    only = network.decode(network.encode(x, text).skips, 1)
    torch.testing.assert_close(only[0], second[0])


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_interpolation_before_or_after_the_convolution_is_the_same(mode):
    up = InterpolationUpsampling(nn.Conv3d, 3, 2, (1, 2, 2), True, mode)
    x = torch.randn(1, 3, 4, 4, 4)
    interpolation = "trilinear" if mode == "linear" else mode
    after = up[0](nn.functional.interpolate(x, scale_factor=(1, 2, 2), mode=interpolation))
    torch.testing.assert_close(up(x), after)


@pytest.mark.parametrize("ndim", [2, 3])
def test_text_attention_depends_on_the_text_and_on_which_class_has_which(ndim):
    """Fails where the attention has a single key, sums over the text axis, or does not know whose text is whose."""
    torch.manual_seed(0)
    module = MultiplanarTextAttention(12, (K, D), ndim)
    features, text = torch.randn(1, 12, *[4] * ndim), torch.randn(K, D)
    for changed in (text[[1, 0, 2]], torch.cat((text[:1], -text[1:2], text[2:]))):
        difference = module(features, changed) - module(features, text)
        assert difference.abs().max() > 1e-4
        assert (difference.flatten(2).std(dim=2) > 1e-5).all()  # with a single key every pixel would get the same


def test_planes_are_repeated_along_their_axis_weighted_and_added_once():
    module = MultiplanarTextAttention(2, (K, 8), 3)
    for i, branch in enumerate(module.branches):
        branch.forward = lambda plane, text, i=i: (i + 1) * plane
    with torch.no_grad():
        module.weights.copy_(torch.tensor([0.5, 0.25, 1.0]))
    x = torch.arange(16.0).view(1, 2, 2, 2, 2)
    expected = (
        x + 0.5 * 1 * x.mean(2, keepdim=True) + 0.25 * 2 * x.mean(3, keepdim=True) + 1.0 * 3 * x.mean(4, keepdim=True)
    )
    torch.testing.assert_close(module(x, torch.zeros(K, 8)), expected)
    # by hand, voxel (0, 0, 0, 0) of values 0..7: means 2, 1, 0.5 -> 0 + 0.5*2 + 0.5*1 + 3*0.5
    assert module(x, torch.zeros(K, 8))[0, 0, 0, 0, 0].item() == pytest.approx(3.0)


def test_positions_adapt_to_any_grid():
    module = MultiplanarTextAttention(4, (K, 8), 3)
    for size in ((2, 3, 5), (9, 10, 11)):
        assert module(torch.randn(2, 4, *size), torch.randn(K, 8)).shape == (2, 4, *size)


def test_text_copy_adds_the_same_vector_everywhere():
    module = TextCopy(2, (1, 2))
    with torch.no_grad():
        module.project.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        module.project.bias.copy_(torch.tensor([0.0, 1.0]))
    out = module(torch.zeros(1, 2, 2, 2, 2), torch.tensor([[1.0, 1.0]]))
    assert (out[0, 0] == 3).all() and (out[0, 1] == 8).all()


@pytest.mark.slow
@pytest.mark.parametrize("ndim", [2, 3])
def test_each_part_compiles_into_one_graph(ndim):
    """No graph break (fullgraph), and no graph but of the four parts, and of the whole for validation."""
    torch._dynamo.reset()
    graphs = []

    def count(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    network = dual(ndim)
    for part in network.parts():
        part.compile(backend=count, fullgraph=True)
    x = torch.randn(2, 1, *[16] * ndim)

    def train():
        text = torch.nn.functional.normalize(torch.randn(K, D), dim=1).requires_grad_()
        skips, _ = network.encode(x, text * 1)
        for decoder in (0, 1):  # each has its backward pass, so that the features end in leaves
            network.decode([skip.detach().requires_grad_() for skip in skips], decoder)

    train()
    assert len(graphs) == len(network.parts()) == 4  # encoder, guidance, two decoders
    compiled = torch.compile(network, backend=count, fullgraph=True)
    for _ in range(3):
        train()
        with torch.no_grad():
            compiled(x)
    assert len(graphs) == 5
