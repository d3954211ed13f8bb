"""TraCoCo (TMI 2024): two networks teach each other, and each agrees with itself on a crop of the patch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.losses.copy_paste import cut_mix, draw_mixing_box
from nnunet_semiseg.losses.deep_supervision import soft_pseudo_loss
from nnunet_semiseg.losses.segmentation import confidence, divergence, entropy, probabilities
from nnunet_semiseg.settings.base import CertainSettings, ConsistencySettings, Share, Weight
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.two_networks import TwoNetworkTrainer

NEGATIVE = 0.1
"""With `consistency=paper`, the second part of L_CRC counts in voxels where the smallest probability is below this."""
ENTROPY = 0.1
"""With `consistency=paper`, the weight of the negative entropy on the crop."""


@dataclass(frozen=True, kw_only=True)
class TraCoCoSettings(ConsistencySettings, CertainSettings):
    """Settings of `TraCoCoTrainer`."""

    paper_weight: ClassVar[float] = 1.0
    paper_ramp: ClassVar[float] = 0.14

    match_threshold: Share = 0.65
    """Pseudo-labels with a probability below this do not count."""
    crop: Annotated[float, Bounds(0.1, 1)] = 0.75
    """The length of each side of the crop, as a share of the patch."""
    translation_weight: Weight = 0.3
    """The weight of the loss between the predictions of a network for the patch and for a crop of it. The loss between
    the two networks has the weight 1."""
    cutmix: Share = 1.0
    """The probability that a box of another sample is pasted into the samples of the second network."""


class TraCoCoTrainer(TwoNetworkTrainer[TraCoCoSettings]):
    """Liu et al., "Translation consistent semi-supervised segmentation for 3D medical images" (TMI 2024, 2203.14523).

    Two networks are co-trained. Each has the loss L = L_sup(i) + lambda(t) (L_CRC(i) + L_tra(i)). On unlabelled
    samples:

    - L_CRC is the "confident regional cross-entropy" towards the other network, with its probabilities q and its
      decision y. It has two parts. The first is the mean of q_y CE(p, y) over the voxels where q_y is at least 0.65.
      The second is for the voxels where the smallest probability q_min is below 0.1: the mean of q_min times -log(1 -
      p_c), averaged over all classes c except y. The samples of the second network are mixed first (CutMix);
    - L_tra: a crop shows the same voxels with other surroundings, and the network must predict the same for them:
      0.3 KL(p_patch || p_crop) + 0.1 mean sum p_crop log p_crop. The second term prevents one class everywhere.

    With `consistency=paper` this is done at full resolution, as in the paper and its code. lambda is a Gaussian ramp to
    1 over 0.14 of the training. By default we differ: L_CRC is nnU-Net's loss with deep supervision, in which voxels
    with q_y below 0.65 have the weight 0. L_tra is 0.3 times nnU-Net's loss towards the probabilities p_patch
    (`soft_label_loss`), with deep supervision, and lambda reaches 1 after 0.4 of the training.

    Both differ from the paper in these points. The paper has two overlapping crops of a volume. Here it is the patch
    and a crop of it, so that the whole crop can be compared (two crops may share only an eighth of the patch in 3d).
    p_patch gets no gradient from L_tra, so that one graph less is kept. Labelled samples have no L_tra. The networks
    differ in their initial weights (theirs: or in their architecture) and see the same augmentation (theirs: separate
    noise). The box of CutMix has sides along all axes (theirs goes through all slices). With one unlabelled sample in a
    batch nothing is mixed. The weight 0.3 is that for LA (theirs for the pancreas: 1). Two faults of the published code
    are not repeated: it takes the softmax of L_tra along an axis of space, and for more than two classes the second
    part of L_CRC has the wrong sign. The first network is deployed.
    """

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        plans = super().prepare(plans, configuration, fold, dataset_json)
        manager = PlansManager(plans).get_configuration(configuration)
        self.strides = [int(n) for n in np.prod(manager.pool_op_kernel_sizes, 0)]
        return plans

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        for i, network in enumerate(self.networks):
            yield {f"supervised_{i + 1}": self.loss(network(batch.images), batch.target)}
        images = batch.views["strong"]
        window = draw_window(images.shape[2:], self.strides, self.settings.crop)
        box = draw_mixing_box(images, self.settings.cutmix)
        weight = self.settings.weight(self.progress)
        with self.without_gradients():
            says = [self.finest(network(images)) for network in self.networks]
            taught = [self.taught(logits) for logits in says]
            wholes = [probabilities(logits[(..., *window)], self.label_manager) for logits in says]
        del says
        for network in self.networks:
            loss = self.translation_loss(network(images[(..., *window)]), wholes.pop(0))
            yield {"translation": weight * loss}
            del loss
        yield {"cross": weight * self.cross_loss(self.networks[0](images), *taught[1])}
        # pseudo-labels are made before images are mixed, and mixed alike
        images, *mixed = (cut_mix(x, box) for x in (images, *taught[0]))
        yield {"cross": weight * self.cross_loss(self.networks[1](images), *mixed)}

    @torch.no_grad()
    def taught(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What the other network learns: the pseudo-label of a network, and a mask (B, 1, *S) of its certain voxels.

        With `consistency=paper` the mask is replaced by the probabilities of the network, (B, heads, *S).
        """
        q = probabilities(logits, self.label_manager)
        if self.settings.consistency != "paper":
            q = (confidence(q, self.label_manager) >= self.settings.match_threshold).float()
        return self.decide(logits), q

    def cross_loss(self, output, decision: Tensor, q: Tensor) -> Tensor:
        """The loss L_CRC (see `TraCoCoTrainer`) of the output of a network.

        `decision` and `q` are the results of `taught` for the other network. With `consistency=paper` only q is used.
        """
        if self.settings.consistency != "paper":
            return self.pseudo_loss(output, decision, q)
        p = probabilities(self.finest(output), self.label_manager)
        if not self.label_manager.has_regions:
            return regional_cross_entropy(p, q, self.settings.match_threshold)
        pairs = ((torch.stack((1 - x, x), 1) for x in (a, b)) for a, b in zip(p.unbind(1), q.unbind(1), strict=True))
        return torch.stack([regional_cross_entropy(a, b, self.settings.match_threshold) for a, b in pairs]).mean()

    def translation_loss(self, output, whole: Tensor) -> Tensor:
        """The loss L_tra (see `TraCoCoTrainer`) between predictions of the same voxels in a crop and in the patch.

        Args:
            output: the output of the network for the crop.
            whole: its probabilities for the voxels of the crop when it sees the whole patch, (B, heads, *s).
        """
        weight, regions = self.settings.translation_weight, self.label_manager.has_regions
        if self.settings.consistency != "paper":
            return weight * soft_pseudo_loss(self.loss, output, whole)
        p = probabilities(self.finest(output), self.label_manager)
        return weight * divergence(whole, p, regions).mean() - ENTROPY * entropy(p, regions).mean()


def regional_cross_entropy(p: Tensor, q: Tensor, threshold: float) -> Tensor:
    """The two parts of the loss L_CRC (see `TraCoCoTrainer`). A part is 0 if no voxel counts in it.

    Args:
        p, q: the class probabilities (B, K, *S) of the network that learns (p) and of the network that teaches (q).
        threshold: a voxel counts in the first part if its largest q is at least this.
    """
    certain, decision = q.max(1, keepdim=True)
    least = q.amin(1, keepdim=True)
    positive = certain * -p.gather(1, decision).clamp_min(1e-6).log()
    not_there = -(1 - p).clamp_min(1e-6).log()
    negative = least * (not_there.sum(1, keepdim=True) - not_there.gather(1, decision)) / (p.shape[1] - 1)
    parts = (positive, certain >= threshold), (negative, least < NEGATIVE)
    return sum((x * counts).sum() / counts.sum().clamp_min(1) for x, counts in parts)  # pyright: ignore[reportReturnType]: sum's 0 is not left


def draw_window(size: Sequence[int], strides: Sequence[int], share: float) -> tuple[slice, ...]:
    """Draw a crop at a random place in a patch of this size.

    Args:
        strides: the strides of the network along each axis, from the image to the bottleneck. The sides of the crop are
            multiples of them.
        share: the sides of the crop as a share of those of the patch. They are at least one stride.
    """
    sides = [stride * max(1, round(share * n / stride)) for n, stride in zip(size, strides, strict=True)]
    starts = [int(torch.randint(n - side + 1, ())) for n, side in zip(size, sides, strict=True)]  # on the CPU
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
