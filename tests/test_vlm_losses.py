"""AMVLM's pre-training losses, on arrays small enough to work out by hand."""

import math

import pytest
import torch

from nnunet_semiseg.vlm.losses import (
    constrained_similarity,
    counterparts,
    distribution_contrast,
    info_nce,
    intra_modal_contrast,
    local_contrast,
    mask_supervision,
    sample_token,
    similarity_supervision,
    token_weights,
    wasserstein2,
)

e = math.exp


def test_info_nce_by_hand():
    s = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    rows = -math.log(e(2) / (e(2) + 1)) - math.log(e(2) / (e(2) + e(1)))
    columns = -math.log(e(2) / (e(2) + e(1))) - math.log(e(2) / (1 + e(2)))
    assert info_nce(s, 0.5).item() == pytest.approx((rows + columns) / 4)


def test_w2_between_all_pairs():
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    b = torch.tensor([[0.0, 0.0], [0.0, 4.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 2.0]])
    w2, means = wasserstein2(a, b)
    torch.testing.assert_close(means, torch.tensor([[0.0, 16, 9], [25, 9, 16]]))
    torch.testing.assert_close(w2, torch.tensor([[0.0, 16, 9 + 10], [25 + 2, 9 + 2, 16 + 4]]))  # off the diagonal, too


def test_similarity_constraint():
    s, means = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([2.0, 2.0, 0.0])
    w2 = torch.tensor([2.0, 6.0, 0.0])
    sigmoid = [1 / (1 + e(-1)), 1 / (1 + e(-3)), 0.5]
    expected = [1 - 0.5 * c for c in sigmoid]
    torch.testing.assert_close(constrained_similarity(s, w2, means), torch.tensor(expected))


def test_token_weights_under_padding():
    attention = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 50.0, 50.0]])
    valid = torch.arange(13)[None] < 11
    weights = token_weights(attention.requires_grad_(), valid)
    assert not weights.requires_grad
    attention = attention.detach()
    # of 0, 0.1, ..., 1 the 10th percentile is 0.1 and the 90th 0.9
    clipped = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9])
    torch.testing.assert_close(weights[0, :11], clipped / clipped.sum())
    assert (weights[0, 11:] == 0).all()
    torch.testing.assert_close(weights, token_weights(attention.masked_fill(~valid, -9), valid))


def test_counterparts():
    tokens = torch.tensor([[[1.0, 0.0]]])
    others = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    valid = torch.tensor([[True, True, False]])
    p = e(2) / (e(2) + 1)
    expected = torch.tensor([p, 1 - p])
    torch.testing.assert_close(counterparts(tokens, others, valid, 0.5)[0, 0], expected / expected.norm())


def test_similarity_supervision_by_hand():
    """Two words and one of padding; distributions that are equal: c = sigmoid(1), or sigmoid(0) on the diagonal."""
    tokens = torch.eye(2)[None, [0, 1, 0]]
    found = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]]])
    mean, std = torch.tensor([[[0.0], [1.0], [5.0]]]), torch.ones(1, 3, 1)
    valid = torch.tensor([[True, True, False]])
    weights = torch.tensor([[0.25, 0.75, 0.0]])
    half, c = 0.5, 1 / (1 + e(-1))
    s = [[1 - 0 * half, 1 - 0.4 * c], [1 - 1 * c, 1 - 0.2 * half]]
    t = 0.5
    first = -math.log(e(s[0][0] / t) / (e(s[0][0] / t) + e(s[0][1] / t)))
    second = -math.log(e(s[1][1] / t) / (e(s[1][0] / t) + e(s[1][1] / t)))
    # and of each counterpart its token
    third = -math.log(e(s[0][0] / t) / (e(s[0][0] / t) + e(s[1][0] / t)))
    fourth = -math.log(e(s[1][1] / t) / (e(s[0][1] / t) + e(s[1][1] / t)))
    loss = similarity_supervision(tokens, found, (mean, std), (mean, std), weights, valid, t)
    expected = (0.25 * first + 0.75 * second + 0.25 * third + 0.75 * fourth) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_local_contrast_by_hand():
    """Three samples of two tokens; the second token of the first sample is padding."""
    globals_ = torch.eye(3)
    tokens = torch.zeros(3, 2, 3)
    tokens[0, 0] = torch.tensor([0.8, 0.6, 0.0])  # others: 0.6, 0: variance 0.09
    tokens[0, 1] = torch.tensor([0.0, 0.0, 1.0])
    tokens[1, 0] = torch.tensor([0.0, 1.0, 0.0])  # others: 0, 0: variance 0
    tokens[1, 1] = torch.tensor([0.6, 0.8, 0.0])  # variance 0.09
    tokens[2, :, 2] = 1
    valid = torch.tensor([[True, False], [True, True], [True, True]])

    def nce(own, *others):
        return -math.log(e(own) / (e(own) + sum(map(e, others))))

    weight = torch.tensor([1 / 0.001, 1 / 0.091])
    weight = (weight / weight.sum()).tolist()
    first = nce(0.8, 0.6, 0)
    second = weight[0] * nce(1, 0, 0) + weight[1] * nce(0.8, 0.6, 0)
    expected = (first + second + nce(1, 0, 0)) / 3
    assert local_contrast(tokens, valid, globals_, 1.0).item() == pytest.approx(expected, abs=1e-5)
    moved = tokens.clone()
    moved[0, 1] = torch.tensor([1.0, 0.0, 0.0])  # padding takes no part
    assert local_contrast(moved, valid, globals_, 1.0).item() == pytest.approx(expected, abs=1e-5)


def test_distribution_contrast_by_hand():
    a = torch.tensor([[0.0], [20.0]]), torch.ones(2, 1)
    b = torch.tensor([[0.0], [10.0]]), torch.ones(2, 1)
    # W2^2: 0, 100; 400, 100
    s = torch.tensor([[4.0, 3.5], [2.0, 3.5]])
    assert distribution_contrast(a, b, 0.5).item() == pytest.approx(info_nce(s, 0.5).item())


def test_intra_modal_contrast_excludes_itself_and_padding():
    """Two samples of two tokens; the second token of the second sample is padding."""
    cls = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    samples = torch.tensor([[[2.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [1.0, 0.0]]])
    valid = torch.tensor([[True, True], [True, False]])
    # sample 0: positives 1 and 0.6, one negative 0 (padding is none); sample 1: positive 1, negatives 0 and 0.8
    terms = [-math.log(e(1) / (e(1) + 1)), -math.log(e(0.6) / (e(0.6) + 1)), -math.log(e(1) / (e(1) + 1 + e(0.8)))]
    assert intra_modal_contrast(cls, samples, valid, 1.0).item() == pytest.approx(sum(terms) / 3, abs=1e-6)


def test_mask_supervision_by_hand():
    """Two patches whose cosines with the text are 0.25 and 0.35; a second sample has no label, and does not count."""
    tokens = torch.tensor([[[0.25, 1.0], [0.35, 1.0]], [[0.5, 0.0], [0.5, 0.0]]])
    text, areas = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.5], [-1.0, -1.0]])
    p = 1 / (1 + e(-1))
    entropy = (-math.log(0.5) - 0.5 * math.log(p) - 0.5 * math.log(1 - p)) / 2
    dice = 2 * (0.5 * p) / (0.5 + p + 0.5)
    assert mask_supervision(tokens, text, areas).item() == pytest.approx(entropy + 1 - dice, abs=1e-5)
    assert mask_supervision(tokens[1:], text[1:], areas[1:]) == 0


def test_gradients_reach_means_and_spreads():
    mean, log_std = torch.randn(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 4, requires_grad=True)
    cls = torch.randn(2, 4, requires_grad=True)
    intra_modal_contrast(cls, sample_token((mean, log_std.exp())), torch.ones(2, 3, dtype=torch.bool), 0.07).backward()
    assert all(x.grad.abs().sum() > 0 for x in (mean, log_std, cls))
    torch.manual_seed(0)
    drawn = sample_token((torch.zeros(2000, 1), torch.full((2000, 1), 3.0)))
    assert drawn.std().item() == pytest.approx(3, rel=0.1)
