"""The losses of AMVLM's pre-training (IEEE TMI 2025, 10.1109/TMI.2025.3573018).

A batch has B samples. Each has L tokens (words or patches) of d features. `valid` (B, L) is False where there
is no word, such as at padding. A distribution is a pair: the means and the standard deviations of independent normal
variables, (..., d) each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


def info_nce(similarity: Tensor, temperature: float) -> Tensor:
    """InfoNCE: the mean of the cross-entropies from images to texts and from texts to images.

    Args:
        similarity: (B, B), of images to texts. The right pairs are on the diagonal.
    """
    return (one_way(similarity, temperature) + one_way(similarity.T, temperature)) / 2


def one_way(similarity: Tensor, temperature: float) -> Tensor:
    """The mean of the cross-entropies of the rows of (B, B). The diagonal has the right pairs."""
    return F.cross_entropy(similarity / temperature, torch.arange(len(similarity), device=similarity.device))


def wasserstein2(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The squared Wasserstein distance W2^2 = ||mu_a - mu_b||^2 + ||sigma_a - sigma_b||^2 of all pairs.

    The first of the two terms is returned, too. (The public code compares token i of a with token i of b only.)

    Args:
        a, b: distributions of M tokens (..., M, d) and of N tokens (..., N, d).

    Returns:
        Two tensors (..., M, N), at least 0.
    """
    means, spreads = (torch.cdist(x.float(), y.float()).square() for x, y in zip(a, b, strict=True))
    return means + spreads, means


def constrained_similarity(similarity: Tensor, w2: Tensor, means: Tensor) -> Tensor:
    """Make a similarity s larger: s' = 1 - (1 - s) c with c = sigmoid(W2^2 / max(||mu - mu'||^2, eps)).

    If distributions differ only in their means, c is sigmoid(1) = 0.73. If they differ in more, c is closer to 1. If
    they are equal, c is 0.5.

    Args:
        similarity: cosines.
        w2, means: W2^2 and ||mu - mu'||^2, which `wasserstein2` returns. They are squares already, and have the shape
            of `similarity`.
    """
    return 1 - (1 - similarity) * torch.sigmoid(w2 / means.clamp_min(EPS))


def token_weights(attention: Tensor, valid: Tensor) -> Tensor:
    """The weight of each token: the attention from CLS, clipped to the 10th and 90th percentile of the valid tokens.

    The sum in each sample is 1.

    Args:
        attention: (B, L), at least 0.

    Returns:
        (B, L), 0 at padding; without gradient.
    """
    attention = attention.detach().float().masked_fill(~valid, torch.nan)
    low, high = torch.nanquantile(attention, attention.new_tensor([0.1, 0.9]), dim=1, keepdim=True)
    clipped = attention.clamp(low, high).nan_to_num(0)
    return clipped / clipped.sum(1, keepdim=True).clamp_min(EPS)


def counterparts(tokens: Tensor, others: Tensor, others_valid: Tensor, temperature: float) -> Tensor:
    """The counterpart of each token: a mean over the tokens of the other modality, weighted by their similarity.

    The counterpart is sum_i softmax_i(token . other_i / T) other_i, normalised.

    Args:
        tokens: (B, L, d); others: (B, M, d); both normalised over d.

    Returns:
        (B, L, d), normalised.
    """
    scores = tokens @ others.transpose(1, 2) / temperature
    weights = scores.masked_fill(~others_valid[:, None], -torch.inf).softmax(2)
    return F.normalize(weights @ others, dim=2)


def similarity_supervision(
    tokens: Tensor,
    found: Tensor,
    distributions: tuple[Tensor, Tensor],
    found_distributions: tuple[Tensor, Tensor],
    weights: Tensor,
    valid: Tensor,
    temperature: float,
) -> Tensor:
    """L_CSS: find the counterpart of each token among those of its sample, and the reverse (cross-entropy).

    The logits are the result of `constrained_similarity`, divided by the temperature.

    Args:
        tokens, found: (B, L, d), tokens and their counterparts, normalised.
        distributions, found_distributions: the distributions of both, (B, L, d).
        weights: (B, L), with the sum 1 in each sample (`token_weights`).
    """
    similarity = tokens @ found.transpose(1, 2)
    logits = constrained_similarity(similarity, *wasserstein2(distributions, found_distributions)) / temperature
    losses = []
    for x in (logits, logits.transpose(1, 2)):
        log_p = x.masked_fill(~valid[:, None], -torch.inf).log_softmax(2)
        losses.append(-(weights * log_p.diagonal(dim1=1, dim2=2).masked_fill(~valid, 0)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def local_contrast(tokens: Tensor, valid: Tensor, globals_: Tensor, temperature: float) -> Tensor:
    """L_local in one direction: each token must find the global feature of its own sample in the other modality.

    The weight of a token is the inverse variance of its similarity to the *other* samples: a token that is similar to
    some of them and not to others says little about its own sample. The weights have the sum 1 in each sample, and no
    gradient.

    Args:
        tokens: (B, L, d); globals_: (B, d); both normalised.
    """
    similarity = torch.einsum("bld,kd->blk", tokens, globals_)
    own = torch.eye(len(globals_), dtype=torch.bool, device=tokens.device)[:, None]
    with torch.no_grad():
        count = max(len(globals_) - 1, 1)
        others = similarity.masked_fill(own, 0)
        mean = others.sum(2, keepdim=True) / count
        variance = ((others - mean) ** 2).masked_fill(own, 0).sum(2) / count
        # 1e-3 (a spread of 0.03), because a token with a variance near 0 would get all the weight
        weights = (1 / (variance + 1e-3)).masked_fill(~valid, 0)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(EPS)
    log_p = (similarity / temperature).log_softmax(2)
    own_log_p = log_p.masked_fill(~own, 0).sum(2)
    return -(weights * own_log_p).sum(1).mean()


def distribution_contrast(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """InfoNCE of the CLS distributions (B, d) of images and texts. The logits are (4 - W2^2 / 200) / temperature."""
    return info_nce(-wasserstein2(a, b)[0] / 200 + 4, temperature)


def intra_modal_contrast(cls: Tensor, samples: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Pull each token towards the CLS of its own sample. A token is drawn from its distribution.

    The negatives are the tokens of other samples. The loss is the mean over tokens of -log(exp(c_b . z_bi / T) /
    (exp(c_b . z_bi / T) + sum_(b' != b, k) exp(c_b . z_b'k / T))). Other tokens of the same sample and padding do not
    take part. c_b is the CLS of sample b, and z_bi is its token i. (In the public code the sum over the negatives also
    includes the token itself.)

    Args:
        cls: (B, d); samples: (B, L, d). Both are normalised here.
    """
    cls, samples = F.normalize(cls.float(), dim=1), F.normalize(samples.float(), dim=2)
    logits = torch.einsum("bd,kld->bkl", cls, samples) / temperature
    own = torch.eye(len(cls), dtype=torch.bool, device=cls.device)[:, :, None]
    negatives = logits.masked_fill(own | ~valid[None], -torch.inf).flatten(1).logsumexp(1)
    positives = torch.einsum("bd,bld->bl", cls, samples) / temperature
    loss = torch.logaddexp(positives, negatives[:, None]) - positives
    return loss.masked_fill(~valid, 0).sum() / valid.sum().clamp_min(1)


def sample_token(distribution: tuple[Tensor, Tensor]) -> Tensor:
    """Draw a token: mu + sigma e, with e a standard normal number for every element. Gradients reach mu and sigma."""
    mean, std = distribution
    return mean + std * torch.randn_like(mean)


def mask_supervision(tokens: Tensor, text: Tensor, areas: Tensor) -> Tensor:
    """Learn from labels where an image shows its text: binary cross-entropy and Dice of sigmoid(10 (cos - 0.25)).

    By default the text masks use the same formula. This loss is ours; the paper's pre-training uses no labels.

    Args:
        tokens: patches (B, P, d); text: (B, d); both normalised.
        areas: the labelled share of each patch, (B, P), in 0 to 1. A sample whose shares are -1 does not count.

    Returns:
        A mean over the samples that count. 0 if there is none.
    """
    logits = 10 * (torch.einsum("bpd,bd->bp", tokens, text).float() - 0.25)
    known, areas = areas[:, 0] >= 0, areas.clamp_min(0)
    entropy = F.binary_cross_entropy_with_logits(logits, areas, reduction="none").mean(1)
    p = logits.sigmoid()
    dice = 2 * (p * areas).sum(1) / (p.sum(1) + areas.sum(1)).clamp_min(EPS)
    return ((entropy + 1 - dice) * known).sum() / known.sum().clamp_min(1)
