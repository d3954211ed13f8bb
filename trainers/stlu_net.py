"""STLU-Net (Pattern Recognition 2026): features of two images are mixed by their similarity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nnunet_semiseg.data.paired_spatial import share_spatial
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.losses.segmentation import confidence, probabilities, weighted_loss
from nnunet_semiseg.networks.feature_mixing import FeatureMixingUNet, mixing_points
from nnunet_semiseg.settings.base import ConsistencySettings, Dropout, PseudoLabelSettings, Share
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.training.turns import draw_turn

HISTOGRAM_BINS = 10
STREAMS = ("mixing", "enhancement")


@dataclass(frozen=True, kw_only=True)
class STLUNetSettings(ConsistencySettings, PseudoLabelSettings):
    """Settings of `STLUNetTrainer`; `consistency_weight` is the paper's gamma."""

    paper_weight: ClassVar[float] = 1.0

    pairs: Literal["alike", "independent"] = "alike"
    """Whether the two samples of a pair are mirrored, rotated and scaled in the same way (`alike`) or separately
    (`independent`)."""
    mixing_groups: str = "SIB"
    """The groups of encoder stages after which features are mixed: any of S (shallow), I (intermediate) and B
    (bottleneck)."""
    mixing: Literal["similarity", "scalar", "mixup", "dropblock", "off"] = "similarity"
    """How the features of a pair of samples are mixed. `similarity` gives each channel a weight by its similarity in
    both samples, `scalar` uses one weight for all channels, `mixup` mixes the labels, too, `dropblock` drops blocks of
    features instead, and `off` does nothing."""
    mixing_weight: Share = 0.5
    """The weight of a sample's own features with `mixing=scalar`."""
    mixing_beta: Annotated[float, Bounds(1e-3)] | None = None
    """In every step the weight of `mixing=scalar` or `mixing=mixup` is drawn from the distribution Beta(b, b), where b
    is this number. By default `scalar` has the weight `mixing_weight`, and `mixup` uses b = 1."""
    skips: Literal["own", "mixed"] = "mixed"
    """Which features the skip connections carry while features are mixed: `own` are those of the sample itself, `mixed`
    are the mixed ones. The bottleneck is the same for both."""
    channel_dropout: Dropout = 0.5
    """The probability that a channel is dropped in the stream without mixing (semantic enhancement). With
    `mixing=dropblock` it is also the share of the values that are dropped in the other stream. 0 switches it off."""
    supervision: Literal["symmetric", "mixing", "enhancement"] = "symmetric"
    """Which of the two streams (feature mixing, semantic enhancement) learn, from labels and from pseudo-labels: both
    (`symmetric`) or one. Then the other one makes the pseudo-labels only."""
    confidence_threshold: Share | None = None
    """Pseudo-labels with a probability below this do not count. By default all pseudo-labels count."""
    confidence: Literal["hard", "soft"] = "hard"
    """How much a pseudo-label counts. `hard` is 1 for each, `soft` is its probability."""
    loss: Literal["dice_ce", "dice"] = "dice_ce"
    """The loss: `dice_ce` is nnU-Net's, `dice` is its Dice part alone, as in the paper."""

    def __post_init__(self):
        super().__post_init__()
        if not self.mixing_groups or len(set(self.mixing_groups) & set("SIB")) < len(self.mixing_groups):
            raise UserError(
                f"setting mixing_groups={self.mixing_groups}: write some of the letters S, I and B, each at most once"
            )


class STLUNetTrainer(SemiSupervisedTrainer[STLUNetSettings]):
    """Enhancing semi-supervised medical image segmentation via semantic transfer (Pattern Recognition, 2026).

    One network has two streams that share all weights (`FeatureMixingUNet`). Labelled sample i and unlabelled sample i
    are a pair. After the last stage of each group of encoder stages,

    - the feature mixing stream m has for each sample and channel the weight w = clamp(cos(x^u, x^l), 0, 1), and x_m^u =
      w x^u + (1 - w) x^l, x_m^l = w x^l + (1 - w) x^u. This aligns similar channels and perturbs the others. Each
      sample keeps its own label;
    - the semantic enhancement stream d has channel dropout with p = 0.5.

    L_sup = L(p_d^l, y) + L(p_m^l, y); L_unsup = L(p_d^u, argmax p_m^u) + L(p_m^u, argmax p_d^u);
    L = L_sup + gamma(t) L_unsup. Prediction has neither mixing nor dropout.

    The paper names a repository that could not be read. Where the paper says nothing: w and pseudo-labels get no
    gradient. w is computed after a ReLU (see `similarity_weights`), and its histogram is logged every epoch. Mixed or
    dropped features go to the next stage and to the decoder's skip (with `skips=own` the skips of m have the sample's
    own features). Each group mixes once, after its last stage, because a second mixing with w = 0 would undo the first.
    The stages before the first mixing are computed once for both streams. The images of a pair are mirrored, rotated
    and scaled alike. Otherwise seven of eight pairs in 3d would differ in the mirrored axes, and the cosine would
    compare an organ with its mirror image (`pairs=independent`).

    L is nnU-Net's Dice + CE with deep supervision (with `loss=dice` Dice only, as in the paper). gamma is a Gaussian
    ramp to 1 over 0.4 of the training. With `consistency=paper` the ramp is as long as the training, and pseudo-labels
    are used at full resolution only.

    The comparisons in the paper are settings: `mixing_groups`; `mixing=scalar` (a fixed weight, or a random one from
    Beta(b, b)); `mixing=mixup`, after Verma et al. (ICML 2019): in each step features are mixed after the last stage of
    one random group, with a weight above 1/2, and each sample learns both labels, in the same proportion (gamma(t) is
    the factor wherever a pseudo-label is learnt); `mixing=dropblock`; `supervision` (which stream learns, from labels
    and from the pseudo-labels of the other); `confidence_threshold`; and `confidence=soft`, where the probability of a
    pseudo-label is the weight of its voxel.
    """

    @classmethod
    def adapt_network(cls, network, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        mixing = "weight" if settings.mixing in ("scalar", "mixup") else settings.mixing
        return FeatureMixingUNet(network, mixing, settings.channel_dropout, settings.skips == "own")

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        plans = super().prepare(plans, configuration, fold, dataset_json)
        manager = PlansManager(plans).get_configuration(configuration)
        if self.settings.unlabeled_batch_size not in (None, manager.batch_size):
            raise UserError(
                f"setting unlabeled_batch_size={self.settings.unlabeled_batch_size}: STLU-Net pairs each of the"
                f" {manager.batch_size} labelled samples of a batch with one unlabelled sample: set it to null"
            )
        known = mixing_points(manager.network_arch_init_kwargs["n_stages"])
        if missing := set(self.settings.mixing_groups) - set(known):
            raise UserError(
                f"setting mixing_groups={self.settings.mixing_groups}: a network of"
                f" {manager.network_arch_init_kwargs['n_stages']} stages has no group {min(missing)}: use"
                f" {''.join(known)}"
            )
        self.points = tuple(sorted(known[group] for group in self.settings.mixing_groups))
        return plans

    def initialize(self):
        super().initialize()
        self.histogram = torch.zeros(len(self.points), HISTOGRAM_BINS, device=self.device)

    def get_training_transforms(
        self, patch_size, rotation_for_DA, deep_supervision_scales, mirror_axes, *args, **kwargs
    ):
        """Take nnU-Net's transforms, without mirroring if a training step mirrors the pairs."""
        axes = mirror_axes if self.settings.pairs == "independent" else None
        return super().get_training_transforms(
            patch_size, rotation_for_DA, deep_supervision_scales, axes, *args, **kwargs
        )

    def make_unlabeled_loader(self, labeled_loader):
        loader: Any = super().make_unlabeled_loader(labeled_loader)
        if self.settings.pairs == "alike":
            share_spatial(labeled_loader.transforms, loader.transforms.spatial)
        return loader

    def _build_loss(self):
        loss = super()._build_loss()
        if self.settings.loss == "dice":
            (loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss).weight_ce = 0
        return loss

    def draw_mixing(self) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """Draw where features are mixed, and how much.

        Returns the stages after which they are mixed (None: all in `mixing_groups`), and the weight (None: computed
        from the features).
        """
        mixing, beta = self.settings.mixing, self.settings.mixing_beta
        if mixing == "mixup":
            point = self.points[int(torch.randint(len(self.points), ()))]
            weight = draw_beta(beta or 1.0)
            return (point,), torch.maximum(weight, 1 - weight).to(self.device, non_blocking=True)
        if mixing == "scalar":
            weight = torch.tensor(self.settings.mixing_weight) if beta is None else draw_beta(beta)
            return None, weight.to(self.device, non_blocking=True)
        return None, None

    def mirrored(self, batch: Batch) -> tuple[Tensor, Any, Tensor]:
        """Mirror the two images of each pair in the same way.

        With `pairs=independent` nothing is done, because nnU-Net's transforms have mirrored each image separately.
        Returns the labelled images, their target, and the strong view of the unlabelled images.
        """
        pairs = batch.images, batch.target, batch.views["strong"]
        if self.settings.pairs == "independent":
            return pairs
        turns = [draw_turn(self.inference_allowed_mirroring_axes or (), ()) for _ in batch.images]
        return tree_map(lambda x: torch.cat([turn(x[i : i + 1]) for i, turn in enumerate(turns)]), pairs)

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        settings = self.settings
        gamma = settings.weight(self.progress)
        mixed_at, weight = self.draw_mixing()
        samples = {"stock": len(batch.images), "small": 1, "fast": None}[settings.memory]
        labeled, target, unlabeled = self.mirrored(batch)
        images = torch.cat((labeled, unlabeled))
        *halves, weights = self.bare_network.paired(images, self.points, weight, mixed_at, samples)
        for counts, w in zip(self.histogram, weights, strict=False):
            counts += torch.histc(w, HISTOGRAM_BINS, 0, 1)
        learns = [settings.supervision in ("symmetric", name) for name in STREAMS]
        mixup = settings.mixing == "mixup"  # then the mixing stream is supervised with both labels, in proportion
        own: list[Any] = [weight if mixup else 1, 1]
        with self.shared(halves) as halves:
            decoders = [[partial(self.bare_network.decode, skips) for skips in half] for half in halves]
            labeled_decoders, unlabeled_decoders = decoders
            for i, output, decisions in self.in_turn(unlabeled_decoders, self.taught):
                if learns[i]:
                    loss = own[i] * self.taught_loss(output, decisions[1 - i])
                    if mixup and i == 0:
                        loss = loss + (1 - own[0]) * self.loss(output, target)
                    yield {f"unsupervised_{STREAMS[i]}": gamma * loss}
                    del loss
                del output
            for i, decode in enumerate(labeled_decoders):
                if learns[i]:
                    with self.shared(decode()) as output:
                        yield {f"supervised_{STREAMS[i]}": own[i] * self.loss(output, target)}
                        if mixup and i == 0:
                            loss = (1 - own[0]) * gamma * self.taught_loss(output, decisions[1])
                            yield {"unsupervised_mixing": loss}

    def taught(self, output) -> tuple[Tensor, Tensor | None]:
        """What one stream teaches the other: its decision, and the weight of each voxel.

        The weights are (B, 1, *S), in 0 to 1. None: all weights are 1.
        """
        logits, settings = self.finest(output), self.settings
        if settings.confidence_threshold is None and settings.confidence == "hard":
            return self.decide(logits), None
        p = confidence(probabilities(logits, self.label_manager), self.label_manager)
        sure = (p >= (settings.confidence_threshold or 0)).float()
        return self.decide(logits), sure * p if settings.confidence == "soft" else sure

    def taught_loss(self, output, decision: tuple[Tensor, Tensor | None]) -> Tensor:
        """The loss of an output towards the decision of the other stream."""
        if self.settings.consistency != "paper":
            return self.pseudo_loss(output, *decision)
        target, weight = decision
        logits = self.finest(output)
        return (
            self.finest_loss(logits, target)
            if weight is None
            else weighted_loss(self.finest_loss, logits, target, weight)
        )

    def on_train_epoch_end(self, train_outputs: list[dict]):
        super().on_train_epoch_end(train_outputs)
        if self.settings.mixing == "similarity":
            for point, counts in zip(self.points, self.ranks.sum(self.histogram).cpu(), strict=True):
                shares = " ".join(f"{share:.2f}" for share in counts / counts.sum())
                self.print_to_log_file(f"similarity weights after stage {point}, shares in tenths of 0 to 1: {shares}")
        self.histogram.zero_()


def draw_beta(concentration: float) -> Tensor:
    """Draw a number from the distribution Beta(b, b). It is a scalar on the CPU."""
    return torch.distributions.Beta(concentration, concentration).sample()
