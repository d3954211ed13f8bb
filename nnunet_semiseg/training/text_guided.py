"""The base of all methods that class prompts guide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nnunet_semiseg.losses.segmentation import probabilities
from nnunet_semiseg.losses.text_alignment import category_alignment_loss
from nnunet_semiseg.networks.text_guidance import TextGuidance
from nnunet_semiseg.settings.base import TextSettings, uses_text
from nnunet_semiseg.settings.plans import FOUND_KEY, read_settings, with_found
from nnunet_semiseg.text.prompt_learner import build_prompt_learner
from nnunet_semiseg.text.prompts import check_prompts_are_current
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.plans_trainer import dataset_json_file
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer

T = TypeVar("T", bound=TextSettings)


class TextGuidedTrainer(SemiSupervisedTrainer[T]):
    """The base class of methods with text.

    A subclass defines `guided_losses`. Its `adapt_network` returns a `MultiDecoderUNet`.

    The text features (K, d) have one row for each class, the background first. They are learnt (not with `n_ctx=0`),
    and guide the network at its bottleneck. They are also stored in the network, so that prediction needs no text
    encoder.
    """

    settings_class: type[TextSettings] = TextSettings
    prompt_learner: nn.Module | None = None

    def guided_losses(self, batch: Batch, text: Tensor | None) -> Iterator[dict[str, Tensor]]:
        """The same as `losses`, with the text features (K, d) of this step.

        `text` is None if the method runs without text.
        """
        raise NotImplementedError

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        plans = super().prepare(plans, configuration, fold, dataset_json)
        if not uses_text(self.settings):
            return plans
        check_prompts_are_current(plans["dataset_name"], dataset_json)
        self.prompt_learner = build_prompt_learner(self.settings, dataset_json, dataset_json_file(plans))
        return with_found(plans, text_shape=list(self.prompt_learner.feature_shape))

    @classmethod
    def build_network_architecture(cls, plans_manager, *args, **kwargs) -> nn.Module:
        network: Any = super().build_network_architecture(plans_manager, *args, **kwargs)
        settings = read_settings(cls.settings_class, plans_manager.plans, cls)
        if uses_text(settings):
            text_shape = tuple(plans_manager.plans[FOUND_KEY]["text_shape"])
            network.guidance = TextGuidance(network.encoder, text_shape, settings.tmr)
        return network

    def build_auxiliary(self) -> dict[str, nn.Module]:
        if self.prompt_learner is None:
            return super().build_auxiliary()
        if not self.prompt_learner.trained:
            self.print_to_log_file("The text encoder is UNTRAINED: its features of the prompts have no meaning.")
        self.prompt_learner.requires_grad_(bool(self.settings.n_ctx))  # also the offset of embeddings from a file
        return super().build_auxiliary() | {"prompt_learner": self.prompt_learner}

    def refresh_network(self) -> None:
        if self.prompt_learner is not None:
            with torch.no_grad():
                self.bare_network.guidance.features.copy_(self.prompt_learner())

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        if self.prompt_learner is None:
            yield from self.guided_losses(batch, None)
            return
        features = self.prompt_learner()
        self.bare_network.guidance.features.copy_(features.detach())  # for passes that do not train the text
        with self.shared(features) as text:
            yield from self.guided_losses(batch, text)

    def predict(self, images: Tensor, text: Tensor | None):
        """The output of the network, and the features for `category_alignment_loss` (None without text)."""
        if text is None:
            return self.network(images), None
        skips, aligned = self.bare_network.encode(images, text)
        return self.bare_network.decode(skips), aligned

    def alignment(self, aligned: Tensor, logits: Tensor, text: Tensor) -> Tensor:
        """The weighted `category_alignment_loss` of features (B, d, *s), logits (B, heads, *S) and the text (K, d)."""
        if self.label_manager.has_regions:
            text = text[1:]  # regions have no background head
        logits = logits[:, : self.label_manager.num_segmentation_heads]  # heads of another task come after these
        loss = category_alignment_loss(aligned, probabilities(logits, self.label_manager), text)
        return self.settings.csa_weight * loss

    def cog(self, aligned: Tensor | None, logits: Tensor, text: Tensor | None, share: float) -> dict[str, Tensor]:
        """The loss term `cog`: `category_alignment_loss` for the predictions of one stream.

        The result is empty without text, or if the setting `csa` is off.

        Args:
            share: the share of the stream among all samples, because the term is a mean over both streams.
        """
        if text is None or not self.settings.csa:
            return {}
        features: Any = aligned  # not None, as there is text
        return {"cog": share * self.alignment(features, logits, text)}
