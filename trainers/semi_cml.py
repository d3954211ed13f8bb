"""Semi-CML (MedIA 2023): two modalities teach each other and learn again from pseudo-labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, autocast, nn
from torch.nn import functional as F

from nnunet_semiseg.data.empty_channels import keep_empty
from nnunet_semiseg.data.labeled_cases import channel_names
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.losses.area_similarity import area_similarity_contrast, dissimilarity, similarities
from nnunet_semiseg.losses.deep_supervision import soft_pseudo_loss
from nnunet_semiseg.losses.relearning import dynamic_threshold, relearning_weight
from nnunet_semiseg.losses.segmentation import hard_pseudo_label, probabilities, weighted_loss
from nnunet_semiseg.networks.modalities import check_modalities, draw_present, make_modalities
from nnunet_semiseg.networks.mutual_learning import MutualLearningUNet
from nnunet_semiseg.schema import OTHER_PLANS, check_architecture
from nnunet_semiseg.settings.base import (
    ConsistencySettings,
    Count,
    Dropout,
    PseudoLabelSettings,
    Share,
    TeacherSettings,
    Weight,
)
from nnunet_semiseg.settings.plans import FOUND_KEY, read_settings, with_found
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.best_pool import BestPool, pseudo_dice
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.training.teacher import make_teacher

BRANCHES = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class SemiCMLSettings(ConsistencySettings, TeacherSettings, PseudoLabelSettings):
    """Settings of `SemiCMLTrainer`.

    `consistency_weight` is the weight of the term `intra`, in which each decoder learns from the same decoder of the
    teacher. 0 switches it off.
    """

    paper_weight: ClassVar[float] = 0.1

    modalities: tuple[tuple[int, ...], ...] | None = None
    """The channels of each of the two modalities, such as `[[0, 1], [2, 3]]`. By default they are the first and the
    second half of the channels."""
    modality_views: Literal["auto", "ct_windows", "contrast"] = "auto"
    """How the two modalities are made from a single channel: two CT windows or two contrast curves. `auto` takes
    windows for CT and contrast curves for all other images."""
    ct_windows: tuple[tuple[float, ...], ...] | None = None
    """The level and the width of both CT windows, in HU, such as `[[50, 400], [-600, 1500]]`. By default they are the
    lower and the upper two thirds of the intensities that nnU-Net does not clip."""
    contrast_gammas: tuple[float, ...] = (0.5, 2.0)
    """The exponents of both contrast curves: below 1 dark values get more contrast, above 1 bright ones."""
    width: Literal["half", "full"] = "half"
    """The width of the encoder and decoder of each modality, compared with the network in the plans."""
    fusion: Literal["attention", "off"] = "attention"
    """Whether attention connects the bottlenecks of the two modalities. With `off` the networks are
    separate, as in the paper."""
    modality_dropout: Share = 0.0
    """The probability that the student sees a sample without one of its modalities."""
    inter_weight: Weight = 0.5
    """The weight, at the end of the ramp, of the soft Dice loss between the two modalities. 0 switches it off."""
    contrast_weight: Weight = 0.4
    """The weight, at the end of the ramp, of the loss that compares the areas of predictions (area-similarity
    contrast). 0 switches it off."""
    contrast_temperature: Annotated[float, Bounds(1e-3)] = 0.1
    """The temperature of the loss that compares the areas of predictions (area-similarity contrast)."""
    relearning_weight: Weight = 1.0
    """The weight, at the end of the ramp, of the loss on pseudo-labels (re-learning). 0 switches it off."""
    relearning: Literal["soft", "hard"] = "soft"
    """What the loss on pseudo-labels (re-learning) learns: the probabilities of the teacher (`soft`) or
    its decision (`hard`)."""
    relearning_start: Share = 0.5
    """The share of the training after which the loss on pseudo-labels (re-learning) begins."""
    threshold: Share = 0.7
    """Pseudo-labels with a probability below this do not count. The threshold has this value when the loss on
    pseudo-labels (re-learning) begins (tau0 in the paper), and rises after that."""
    threshold_warmup: Share = 0.02
    """The threshold of the pseudo-labels rises over 0.9 times this share of the training, to 0.9 + 0.1 `threshold`."""
    mc_passes: Annotated[int, Bounds(0)] = 4
    """The number of passes with dropout that measure the uncertainty of pseudo-labels. With 0 the uncertainty does not
    change the weights of voxels."""
    mc_dropout: Dropout = 0.2
    """The probability of dropout in the passes that measure the uncertainty."""
    disagreement_weight: Share = 0.3
    """The factor of a voxel's weight in the loss on pseudo-labels (re-learning) where the decisions of the two
    modalities differ. Elsewhere it is 1."""
    teacher: Literal["ema", "best_pool"] = "ema"
    """Which network makes the pseudo-labels (re-learning). `ema` is the EMA of the student. `best_pool` is the mean of
    the networks from the epochs with the best validation, each with the better of its two modalities."""
    pool_size: Count = 3
    """The number of best epochs that `teacher=best_pool` uses."""

    def __post_init__(self):
        super().__post_init__()
        for name, size in (("modalities", None), ("ct_windows", 2), ("contrast_gammas", None)):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or (size and any(len(v) != size for v in value))):
                raise UserError(
                    f"setting {name}={value}: must have two entries{size and ', each a level and a width' or ''}"
                )
        if min(self.contrast_gammas) <= 0 or self.ct_windows and min(width for _, width in self.ct_windows) <= 0:
            raise UserError("settings ct_windows and contrast_gammas: widths and gammas must be above 0")


class SemiCMLTrainer(SemiSupervisedTrainer[SemiCMLSettings]):
    """Multi-modal contrastive mutual learning and pseudo-label re-learning (Medical Image Analysis 2023).

    Each modality has an encoder and a decoder; they are joined at the bottleneck (`MutualLearningUNet`). The
    paper and a web page about it describe different losses. The terms of both are here, and a weight of 0 switches a
    term off. P_a and P_b are the probabilities of the two decoders.

    - supervised: nnU-Net's loss for each decoder, throughout the training (the public code drops it later);
    - `inter`: 1 - 2 |P_a P_b| / (|P_a| + |P_b|) of the two predictions of a sample (`area_similarity`);
    - `contrast`: `area_similarity_contrast` of unlabelled samples among all predictions of a batch. The denominators
      have squares, so that two equal soft predictions have similarity 1. The paper uses the weight 3.5 beside 10 BCE +
      7 Dice, and we use 0.4 beside CE + Dice. A negative that overlaps as much as the positive pair is not pushed away,
      because an organ lies at similar places in different cases;
    - `intra`: each decoder of the student against the same decoder of the EMA teacher, on unlabelled samples. It is
      nnU-Net's loss with deep supervision towards the decision, or with `consistency=paper` the MSE;
    - `relearning`, from `relearning_start` on: the loss of both decoders towards the teacher's probabilities (or its
      decision, `relearning=hard`). A voxel counts if the probability of the decision is at least tau(t)
      (`dynamic_threshold`). Its weight is 1 - entropy / max entropy over Monte-Carlo dropout passes, times 0.3 where
      the decisions of the modalities differ. The weight is applied to the loss. (The web page scales the label
      instead, which would turn foreground into background.) With `consistency=paper` it uses full resolution
      only.

    In `inter` and `contrast` a class counts if at least one of the two decisions has it. All terms but the supervised
    one have a Gaussian ramp, over 0.4 of the training or, with `consistency=paper`, over all of it. The teacher sees
    weak views, the student strong ones. With `teacher=best_pool` the teacher of the re-learning is the mean of the
    better decoders of the epochs with the best pseudo Dice. That is measured on nnU-Net's validation patches, which are
    of the fold (with fold `all`: of training cases), never of a test set.

    Where paper and page say nothing: dropout acts on the features that decoders read, because nnU-Net's networks have
    none; so a pass does not repeat the encoder. The contrast's classes are the foreground classes, and its negatives
    are in the same batch. A modality is missing if all of it is empty (0 in the file). Then it has no share in the
    deployed mean, and its decoder teaches nothing. If there is a single channel, two contrasts of it take the place of
    the modalities, as a part of the network: contrast curves, or CT windows within the range that nnU-Net's
    normalisation does not clip.
    """

    views = ("weak", "strong")

    @staticmethod
    def build_network_architecture(
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        check_architecture(configuration_manager.configuration, plans_manager.plans["plans_name"], OTHER_PLANS)
        settings = read_settings(SemiCMLSettings, plans_manager.plans, SemiCMLTrainer)
        modalities, channels = make_modalities(settings, num_input_channels, plans_manager, configuration_manager)
        kwargs = dict(configuration_manager.network_arch_init_kwargs)
        if settings.width == "half":
            kwargs["features_per_stage"] = [max(1, features // 2) for features in kwargs["features_per_stage"]]
        networks = [
            get_network_from_plans(
                configuration_manager.network_arch_class_name, kwargs,
                configuration_manager.network_arch_init_kwargs_req_import, count, num_output_channels,
                allow_init=True, deep_supervision=enable_deep_supervision,
            )
            for count in channels
        ]  # fmt: skip
        return MutualLearningUNet(
            networks, modalities, plans_manager.plans[FOUND_KEY]["has_regions"], settings.fusion != "off"
        )

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        plans = super().prepare(plans, configuration, fold, dataset_json)
        manager = PlansManager(plans)
        check_modalities(
            self.settings, len(channel_names(dataset_json)), manager, manager.get_configuration(configuration)
        )
        return with_found(plans, has_regions=manager.get_label_manager(dataset_json).has_regions)

    def get_training_transforms(self, *args, **kwargs):
        """Take nnU-Net's transforms, changed so that a channel that a case lacks stays empty."""
        transforms: Any = super().get_training_transforms(*args, **kwargs)
        return keep_empty(transforms, self.plans_manager, self.configuration_manager)

    def initialize(self):
        super().initialize()
        if self.settings.teacher == "best_pool":
            # frozen; saved with the modules that are not deployed
            networks = [make_teacher(self.bare_network) for _ in range(self.settings.pool_size)]
            self.auxiliary["pool"] = nn.ModuleList(networks)
            self.pool = BestPool(networks, self.label_manager.has_regions)
            self.method_state |= self.pool.state

    # ------------------------------------------------------------------------------------------------------- losses

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        settings = self.settings
        streams = batch.streams("strong")
        images = [images for images, _, _ in streams]
        if settings.modality_dropout:
            present = draw_present(self.bare_network.modalities.groups, torch.cat(images), settings.modality_dropout)
            images = [x * here for x, here in zip(images, present.split([len(x) for x in images]), strict=True)]
        taught = self.ask_teacher(batch.views["weak"])
        outputs: Any = self.each(partial(self.network, branches=True), *images)
        labeled_logits: list[Tensor] = []
        for _, target, share in streams:
            with self.shared(next(outputs)) as branches:
                if target is not None:
                    labeled_logits = [x.detach() for x in self.of_branches(branches)]
                elif settings.contrast_weight:
                    contrast = self.contrast(self.of_branches(branches), labeled_logits)
                    yield {"contrast": settings.contrast_weight * settings.ramp(self.progress) * contrast}
                    labeled_logits.clear()
                    del contrast
                yield from self.stream_losses(branches, target, share, *taught)

    def stream_losses(self, branches: list, target, share: float, own: Any, taught: Any):
        """All terms of one stream except the contrast.

        Args:
            branches: the outputs of both decoders.
            target: None for the unlabelled stream.
            share: the stream's share of all samples.
            own: the logits of the teacher for each decoder. None if they are not needed.
            taught: the target and the weight of the re-learning, see `relearning_target`. None if it has not begun or
                is switched off.
        """
        settings, ramp = self.settings, self.settings.ramp(self.progress)
        if target is not None:
            for name, output in zip(BRANCHES, branches, strict=True):
                yield {f"supervised_{name}": self.loss(output, target)}
        logits = self.of_branches(branches)
        if settings.inter_weight:
            yield {"inter": share * settings.inter_weight * ramp * dissimilarity(logits, self.label_manager)}
        if target is not None:
            return
        self.decide.count(hard_pseudo_label(logits[0], self.label_manager))
        if own is not None:
            for output, teacher in zip(branches, own, strict=True):
                yield {"intra": settings.weight(self.progress) * self.intra(output, teacher)}
        if settings.relearning_weight and taught is None:
            yield {"relearning": logits[0].new_zeros(())}
        elif settings.relearning_weight:
            for output in branches:
                yield {"relearning": settings.relearning_weight * ramp * self.relearning_loss(output, *taught)}

    def intra(self, output, teacher: Tensor) -> Tensor:
        """How far the output of a decoder is from the logits of the teacher."""
        if self.settings.consistency == "paper":
            return F.mse_loss(self.probabilities(self.finest(output)), self.probabilities(teacher))
        return self.pseudo_loss(output, self.decide(teacher, counts=False))

    def relearning_loss(self, output, target: Tensor, weight: Tensor) -> Tensor:
        """The weighted loss of a decoder towards probabilities or a decision."""
        if self.settings.relearning == "soft":
            paper = self.settings.consistency == "paper"
            return soft_pseudo_loss(self.loss, self.finest(output) if paper else output, target, weight)
        if self.settings.consistency == "paper":
            return weighted_loss(self.finest_loss, self.finest(output), target, weight)
        return self.pseudo_loss(output, target, weight)

    def ask_teacher(self, weak: Tensor) -> tuple[list[Tensor] | None, tuple[Tensor, Tensor] | None]:
        """The logits of the teacher for each decoder, and the result of `relearning_target`.

        A result that is not needed is None.
        """
        settings = self.settings
        relearns = bool(settings.relearning_weight) and self.progress >= settings.relearning_start
        pooled = None
        if relearns and settings.teacher == "best_pool":
            pooled = self.pool.predict(weak, settings.mc_passes, settings.mc_dropout)
        own: Any = None
        taught: Any = pooled
        if relearns and pooled is None:
            taught = self.predict(self.teacher, weak, settings.mc_passes)
            own = taught[0]
        elif settings.weight(1):
            own = self.predict(self.teacher, weak, 0)[0]
        target = None if taught is None else self.relearning_target(*taught)
        return own if settings.weight(1) else None, target

    def of_branches(self, outputs: list) -> list[Tensor]:
        """The logits of both decoders at full resolution."""
        return [self.finest(output) for output in outputs]

    def contrast(self, unlabeled_logits: list[Tensor], labeled_logits: list[Tensor]) -> Tensor:
        """The loss `area_similarity_contrast` of the unlabelled samples, from the logits of both decoders."""
        logits = [x for branch in zip(unlabeled_logits, labeled_logits, strict=True) for x in branch]
        similarity = similarities(logits, self.label_manager, squared=True)
        return area_similarity_contrast(*similarity, len(unlabeled_logits[0]), self.settings.contrast_temperature)

    def probabilities(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.label_manager)

    @torch.no_grad()
    def predict(self, network: nn.Module, images: Tensor, passes: int):
        """The logits of both decoders, of their mean, and of the mean over dropout passes (None for 0 passes)."""
        return network(images, branches=True, passes=passes, dropout=self.settings.mc_dropout)

    @torch.no_grad()
    def relearning_target(self, branches: list[Tensor], mean: Tensor, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make the target of the re-learning, and the weight of each voxel, (B, 1, *S).

        The target is the decision or the probabilities of the logits `mean`.
        """
        settings = self.settings
        t = (self.progress - settings.relearning_start) / max(settings.threshold_warmup, 1e-6)
        tau = dynamic_threshold(t, settings.threshold)
        weight = relearning_weight(branches, mean, sampled, tau, settings.disagreement_weight, self.label_manager)
        soft = settings.relearning == "soft"
        return self.probabilities(mean) if soft else self.decide(mean, counts=False), weight

    # ----------------------------------------------------------------------------------------------------- best pool

    def validation_step(self, batch: dict) -> dict:
        """Run nnU-Net's validation step. With `teacher=best_pool`, repeat it for each decoder."""
        if self.settings.teacher != "best_pool":
            return super().validation_step(batch)
        network, results = self.network, []
        with torch.no_grad(), autocast("cuda") if self.device.type == "cuda" else dummy_context():
            branches, mean, _ = network(batch["data"].to(self.device, non_blocking=True), branches=True, passes=0)
        try:
            for output in (mean, *branches):  # nnU-Net's own count, three times on the outputs of one pass
                self.network = lambda x, output=output: output
                results.append(super().validation_step(batch))
        finally:
            self.network = network
        counts = ("tp_hard", "fp_hard", "fn_hard")
        of_branches = zip(BRANCHES, results[1:], strict=True)
        return results[0] | {f"{key}_{name}": result[key] for name, result in of_branches for key in counts}

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        super().on_validation_epoch_end(val_outputs)
        if self.settings.teacher == "best_pool":
            of_all = list(chain.from_iterable(self.ranks.gather(val_outputs)))
            dice = [pseudo_dice(of_all, name) for name in BRANCHES]
            self.pool.offer(self.bare_network, max(dice), dice.index(max(dice)))
