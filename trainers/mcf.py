"""MCF (CVPR 2023): the better of two networks makes the pseudo-labels, and both learn where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_semiseg.losses.segmentation import has_label, probabilities
from nnunet_semiseg.settings.base import PseudoLabelSettings, SharpeningSettings, Weight
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.two_networks import TwoNetworkTrainer


@dataclass(frozen=True, kw_only=True)
class MCFSettings(SharpeningSettings, PseudoLabelSettings):
    """Settings of `MCFTrainer`."""

    review_weight: Weight = 0.5
    """The weight of the loss on the labelled voxels where the decisions of the two networks differ."""


class MCFTrainer(TwoNetworkTrainer[MCFSettings]):
    """Wang et al., "MCF: mutual correction framework for semi-supervised medical image segmentation" (CVPR 2023).

    - contrastive difference review: M = 1 where the decisions of the networks on a labelled sample differ. For each
      network L_review = sum M ||p_i - y||^2 / sum M;
    - rectification: the network with the lower supervised loss labels the unlabelled samples. The other network learns
      from it, by the MSE towards p^(1/T) / sum p^(1/T), T = 0.1;
    - L = L_sup(1) + L_sup(2) + 0.5 L_review + lambda(t) L_rect.

    That is `consistency=paper`, with a Gaussian ramp to 0.1 over the training. By default we differ: L_review is
    nnU-Net's loss over the voxels of M, and L_rect is nnU-Net's loss towards the decision of the better network, both
    with deep supervision; lambda reaches 1 after 0.4 of the training.

    Both differ from the paper in these points. The paper has a V-Net and a ResNet; here the networks differ in their
    initial weights, because plans have one architecture. The first is deployed (theirs: the mean of both). They are
    compared by nnU-Net's loss (theirs: its Dice) of the previous step. On a GPU it may be an earlier step, because no
    step waits until the losses are copied to the CPU. Ignored voxels are not reviewed. For more than two classes the
    squares are a mean over the classes. The published code takes the softmax of a softmax in both squares: we follow
    the paper.
    """

    def initialize(self):
        super().initialize()
        better = torch.zeros((), dtype=torch.bool)
        # the CPU does not wait for a copy into pinned memory
        self.method_state["second_is_better"] = better.pin_memory() if self.device.type == "cuda" else better

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        settings, supervised = self.settings, []
        better = int(self.method_state["second_is_better"])  # from an earlier step
        passes = [partial(network, batch.images) for network in self.networks]
        for i, output, decisions in self.in_turn(passes, self.labeled_decision):
            differ = (decisions[0] != decisions[1]).any(1, keepdim=True)
            with self.shared(output) as output:
                # the term that takes more memory is first: the gradients of the output do not take memory yet
                yield {"review": settings.review_weight * self.review(differ, output, batch.target)}
                loss = self.loss(output, batch.target)
                supervised.append(loss.detach())
                yield {f"supervised_{i + 1}": loss}
            del output, loss
        # copied to the CPU while the GPU works; the next step reads it
        first, second = self.ranks.mean(torch.stack(supervised))
        self.method_state["second_is_better"].copy_(second < first, non_blocking=True)
        images, networks = batch.views["strong"], self.networks
        with self.without_gradients():
            logits = self.finest(networks[better](images))
        decision = self.decide(logits)
        loss = self.rectification(networks[1 - better](images), logits, decision)
        yield {"rectification": settings.weight(self.progress) * loss}

    def labeled_decision(self, output) -> Tensor:
        return self.decide(self.finest(output), counts=False)

    def review(self, differ: Tensor, output, target) -> Tensor:
        """The loss L_review (see `MCFTrainer`) of a network, over the voxels of a mask (B, 1, *S), bool."""
        if self.settings.consistency != "paper":
            return self.loss_where(differ, output, target)
        target, p = self.finest(target), probabilities(self.finest(output), self.label_manager)
        mask = differ & has_label(target, self.label_manager)
        squared = (p - self.one_hot(target)).square() * mask
        return squared.sum() / (mask.sum() * p.shape[1]).clamp_min(1)

    def one_hot(self, target: Tensor) -> Tensor:
        """Turn a target into probabilities (B, heads, *S). The values of ignored voxels have no meaning."""
        heads = self.label_manager.num_segmentation_heads
        if self.label_manager.has_regions:
            return target[:, :heads].float()
        return torch.cat([target == head for head in range(heads)], 1).float()

    def rectification(self, output, logits: Tensor, decision: Tensor) -> Tensor:
        """The loss L_rect (see `MCFTrainer`): output of the worse network, logits and decision of the better one."""
        if self.settings.consistency != "paper":
            return self.pseudo_loss(output, decision)
        taught = probabilities(logits.float() / self.settings.sharpening, self.label_manager)
        return F.mse_loss(probabilities(self.finest(output), self.label_manager), taught)
