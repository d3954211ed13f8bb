"""The base of every semi-supervised method: nnU-Net's trainer with an unlabelled stream."""

from __future__ import annotations

import io
import os
from dataclasses import fields
from os.path import join

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import dummy_context
from torch import Tensor, autocast, distributed, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_map

from nnunet_semiseg.config import PLANS_KEY, SemiSupervisedSettings, TeacherSettings, read_settings, uses_text
from nnunet_semiseg.data.labeled_subset import JoinedDataset, take_labeled
from nnunet_semiseg.data.two_streams import UnlabeledDataLoader, ViewsTransform, add_unlabeled_stream, seed_workers
from nnunet_semiseg.data.unlabeled import load_manifest
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.pseudo_labels import probabilities
from nnunet_semiseg.losses.text_alignment import category_alignment_loss
from nnunet_semiseg.text.prompt_learner import build_prompt_learner
from nnunet_semiseg.text.prompts import check_prompts_are_current
from nnunet_semiseg.training.augmentation import repeatable
from nnunet_semiseg.training.bfloat16 import run_in_bfloat16
from nnunet_semiseg.training.checks import check_labeled_cases
from nnunet_semiseg.training.loss_term_logger import PREFIX, LossTermLogger
from nnunet_semiseg.training.random_state import get_random_state, seed_everything, set_random_state
from nnunet_semiseg.training.teacher import make_teacher, update_teacher


def apply_training_settings(trainer: nnUNetTrainer, settings) -> None:
    """Give a trainer of nnU-Net the length that the plans' settings ask for."""
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
        setattr(trainer, name, getattr(settings, name))


def apply_network_settings(network: nn.Module, device: torch.device, settings) -> None:
    """The same for a network, once that is built."""
    if settings.bfloat16_on_cpu and device.type == "cpu":
        run_in_bfloat16(network)


class SemiSupervisedTrainer(nnUNetTrainer):
    """A method is a subclass with a `semi_losses`; more is overridden only where the method needs it.

    Class attributes:
        settings_class: the method's settings, a frozen dataclass. Deriving it from `TeacherSettings` gives the
            method an EMA teacher, `self.teacher`.
        views: names of the views of an unlabelled patch that the loader makes (see `ViewsTransform`).
        student_view: the view that goes through the network together with the labelled patches.
    """

    settings_class: type[SemiSupervisedSettings] = SemiSupervisedSettings
    views: tuple[str, ...] = ("strong",)
    student_view = "strong"

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        self.prompt_learner: nn.Module | None = None
        self.text: Tensor | None = None
        # before nnU-Net's own __init__, which makes the output folder: what is refused leaves nothing behind
        self.settings = read_settings(self.settings_class, plans)
        if self.settings.seed is not None:
            seed_everything(self.settings.seed)
        plans = self.prepare(plans, configuration, fold, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        apply_training_settings(self, self.settings)
        self.logger.local_logger = LossTermLogger()
        self.aligned: list[tuple[Tensor, Tensor]] = []
        self.auxiliary = nn.ModuleDict()  # trained, but not deployed: outside self.network
        self.teacher: nn.Module | None = None
        self.method_state: dict[str, Tensor] = {}  # what else a method must remember over a resume; on the CPU
        self.step = 0
        self._resume_random_state = None
        self._resume_student: dict | None = None

    # ---------------------------------------------------------------------------------- what a method overrides

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        """Refuse what cannot be trained, before anything is written.

        Returns:
            The plans, a copy where a method resolves one of its settings (the plans reach the checkpoint and
            the predictor).

        Raises:
            UserError: there is no such configuration, or the unlabelled data or the labelled cases do not fit;
                a feature of nnU-Net that is not supported.
        """
        if distributed.is_available() and distributed.is_initialized():
            raise UserError(f"{type(self).__name__}: training on several GPUs (-num_gpus) is not supported")
        if configuration not in plans["configurations"]:
            known = " or ".join(plans["configurations"])
            raise UserError(f"plans {plans['plans_name']}: no configuration {configuration}: use {known}")
        if "previous_stage" in plans["configurations"][configuration]:
            raise UserError(f"{type(self).__name__}: cascades are not supported; train 3d_fullres")
        base = join(nnUNet_preprocessed, plans["dataset_name"])
        self.unlabeled_folder, self.unlabeled_cases = load_manifest(base, plans, configuration, plans["dataset_name"])
        check_labeled_cases(base, plans, configuration, fold)
        if not uses_text(self.settings):
            return plans
        check_prompts_are_current(plans["dataset_name"], dataset_json)
        self.prompt_learner = build_prompt_learner(self.settings, dataset_json)
        shape = list(self.prompt_learner.feature_shape)
        return {**plans, PLANS_KEY: {**plans.get(PLANS_KEY, {}), "text_shape": shape}}

    @classmethod
    def adapt_network(cls, network: nn.Module, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        """What the method makes of the plans' network.

        Args:
            network: nnU-Net's.
            arch_kwargs: those of the plans.
            deep_supervision: whether decoders have several outputs.
        """
        return network

    def build_auxiliary(self) -> dict[str, nn.Module]:
        """Modules that are trained with the network but not deployed, by name."""
        if self.prompt_learner is None:
            return {}
        if not self.prompt_learner.trained:
            self.print_to_log_file("The text encoder is UNTRAINED: prompts differ, but mean nothing to it.")
        return {"prompt_learner": self.prompt_learner}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        settings = read_settings(cls.settings_class, plans_manager.plans)
        kwargs = configuration_manager.network_arch_init_kwargs
        return cls.adapt_network(network, settings, kwargs, enable_deep_supervision)

    def forward_streams(self, batch: dict):
        """One forward over labelled and unlabelled together.

        Returns:
            The network's output for the labelled and for the unlabelled samples.
        """
        labeled, unlabeled = batch["data"], batch["unlabeled"][self.student_view]
        return split_streams(self.network(torch.cat((labeled, unlabeled))), len(labeled))

    def supervised_losses(self, labeled, batch: dict) -> dict[str, Tensor]:
        """nnU-Net's own loss on the labelled outputs, deep supervision included."""
        return {"supervised": self.loss(labeled, batch["target"])}

    def semi_losses(self, labeled, unlabeled, batch: dict) -> dict[str, Tensor]:
        """The method's terms by name, weighted as they enter the sum; the same names in every step.

        Args:
            labeled, unlabeled: what `forward_streams` returned.
            batch: `data` (B, C, *S), `target` (nnU-Net's), `unlabeled` {view: (B_u, C, *S)}, `targets` (what
                `target_maker` makes), on the device; `unlabeled_keys`, the names of the unlabelled cases.
        """
        raise NotImplementedError

    def target_maker(self):
        """A function that makes further targets of both loaders' batches, by name, in the loader's processes."""
        return no_targets

    def refresh_network(self) -> None:
        """Bring what the network stores, beside its weights, up to date: called before it is used or saved."""
        if self.prompt_learner is not None:
            with torch.no_grad():
                self.bare_network.guidance.features.copy_(self.prompt_learner())

    # ------------------------------------------------------------------------------------- what a method can use

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the end of the training."""
        return self.step / (self.num_epochs * self.num_iterations_per_epoch)

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrapper of torch.compile."""
        return _bare(self.network)

    def finest(self, output) -> Tensor:
        """The full-resolution logits of an output with or without deep supervision."""
        return output[0] if isinstance(output, (list, tuple)) else output

    def decode(self, network, images: Tensor, decoders=(0,), perturbations=()) -> list:
        """The outputs of a `MultiDecoderUNet`'s decoders, guided by text and to be aligned with it, if there is any."""
        if self.text is None:
            return network(images, None, decoders, perturbations)
        outputs, aligned = network(images, self.text, decoders, perturbations)
        self.aligned += [(aligned, self.finest(output)) for output in outputs]
        return outputs

    def alignment(self, features: Tensor, logits: Tensor) -> Tensor:
        """CSA of the aligned features (B, d, *s) and the logits (B, heads, *S) with the text of this step."""
        text = self.text[1:] if self.label_manager.has_regions else self.text  # regions have no background head
        logits = logits[:, : self.label_manager.num_segmentation_heads]  # another task's heads come after these
        return category_alignment_loss(features, probabilities(logits, self.label_manager), text)

    @property
    def finest_loss(self) -> nn.Module:
        """nnU-Net's loss for the full resolution alone."""
        return self.loss.loss if self.enable_deep_supervision else self.loss

    # ----------------------------------------------------------------------------------------------- the training

    def initialize(self):
        # before super(): it makes the optimizer
        self.auxiliary = nn.ModuleDict(self.build_auxiliary()).to(self.device)
        if self._do_i_compile():  # a batch of one stream and one of two are two graphs, not one of any shape
            torch._dynamo.config.automatic_dynamic_shapes = False
        super().initialize()
        apply_network_settings(self.network, self.device, self.settings)
        if isinstance(self.settings, TeacherSettings):
            self.teacher = make_teacher(self.bare_network)
            if self._do_i_compile():
                self.teacher = torch.compile(self.teacher)
        self.trainable = [p for p in (*self.network.parameters(), *self.auxiliary.parameters()) if p.requires_grad]

    def configure_optimizers(self):
        optimizer, lr_scheduler = super().configure_optimizers()
        if auxiliary := [p for p in self.auxiliary.parameters() if p.requires_grad]:
            optimizer.add_param_group({"params": auxiliary, "initial_lr": self.initial_lr})
        return optimizer, lr_scheduler

    def on_train_start(self):
        super().on_train_start()
        # until here the network is what is deployed, for a checkpoint may be loaded only to be validated
        if self._resume_student is not None and self.current_epoch < self.num_epochs:
            self.bare_network.load_state_dict(self._resume_student)
        self.refresh_network()
        if self.teacher is not None and self.step == 0:  # weights may have been loaded after the teacher was made
            update_teacher(self.teacher, self.network, 0, self.settings.ema_decay)

    def do_split(self):
        split = super().do_split()
        training, validation, self.hidden_cases = take_labeled(*split, self.settings.num_labeled, self.dataset_json)
        return training, validation

    def get_training_transforms(self, *args, **kwargs):
        transforms = super().get_training_transforms(*args, **kwargs)
        return transforms if self.settings.seed is None else repeatable(transforms)

    def get_dataloaders(self):
        train, val = super().get_dataloaders()
        add_unlabeled_stream(train, self._make_unlabeled_loader, self.views, self.target_maker())
        seed_workers(train, self.settings.seed, self.step)
        next(train)  # starts the workers here, as nnU-Net does
        if self._resume_random_state is not None:  # only now: making the loaders has drawn from the generators
            set_random_state(self._resume_random_state)
            self._resume_random_state = None
        return train, val

    def unlabeled_dataset(self) -> JoinedDataset:
        """The preprocessed unlabelled cases, and the labelled ones whose labels must not be seen."""
        sources = {self.unlabeled_folder: self.unlabeled_cases, self.preprocessed_dataset_folder: self.hidden_cases}
        return JoinedDataset(*(self.dataset_class(folder, list(cases)) for folder, cases in sources.items()))

    def _make_unlabeled_loader(self, labeled) -> UnlabeledDataLoader:
        sizes = [s[1:] if labeled.patch_size_was_2d else s for s in (labeled.patch_size, labeled.final_patch_size)]
        return UnlabeledDataLoader(
            self.unlabeled_dataset(),
            self.settings.unlabeled_batch_size or self.batch_size,
            *sizes,
            self.label_manager,
            transforms=ViewsTransform(labeled.transforms, self.views),
        )

    def train_step(self, batch: dict) -> dict:
        """One step; returns every loss term as a tensor on the device, so that nothing waits for the GPU."""
        tensors = {k: batch[k] for k in ("data", "target", "unlabeled", "targets")}
        tensors = tree_map(lambda x: x.to(self.device, non_blocking=True), tensors)
        batch = tensors | {"unlabeled_keys": batch["unlabeled_keys"]}

        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            if self.prompt_learner is not None:
                self.text = self.prompt_learner()
                self.bare_network.guidance.features.copy_(self.text.detach())  # for passes that do not train the text
            labeled, unlabeled = self.forward_streams(batch)
            terms = {**self.supervised_losses(labeled, batch), **self.semi_losses(labeled, unlabeled, batch)}
            if self.aligned and self.settings.csa:
                terms["cog"] = sum(self.alignment(*pair) for pair in self.aligned)
            self.aligned.clear()
            loss = sum(terms.values())

        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainable, 12)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(self.trainable, 12)
            self.optimizer.step()

        self.step += 1
        if self.teacher is not None:
            update_teacher(self.teacher, self.network, self.step, self.settings.ema_decay)
        return {"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}}

    def on_train_epoch_end(self, train_outputs: list[dict]):
        self.refresh_network()
        names = list(train_outputs[0])
        if any(o.keys() != train_outputs[0].keys() for o in train_outputs):
            raise RuntimeError(f"{type(self).__name__}: the terms of its loss have not the same names in every step")
        means = torch.stack([torch.stack([o[k].float() for k in names]) for o in train_outputs]).mean(0).cpu()
        means = dict(zip(names, means.tolist(), strict=True))
        super().on_train_epoch_end([{"loss": np.float64(means.pop("loss"))}])
        for name, value in means.items():
            self.logger.log(PREFIX + name, value, self.current_epoch)
        self.print_to_log_file("loss terms:", ", ".join(f"{k} {v:.4f}" for k, v in means.items()))

    def on_train_end(self):
        super().on_train_end()
        self._load_deployed_weights()

    def _load_deployed_weights(self):
        """What is validated is what is deployed: after the last epoch `self.network` may become the teacher."""
        if self.teacher is not None and self.settings.deploy == "teacher":
            self.bare_network.load_state_dict(_bare(self.teacher).state_dict())

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with the top-level keys `teacher` (or None) and `semiseg`, written atomically.

        `network_weights` holds what is deployed; where that is the teacher, `semiseg` also holds the student.
        """
        self.refresh_network()
        if self.disable_checkpointing:
            return super().save_checkpoint(filename)
        buffer = io.BytesIO()  # nnU-Net builds the dictionary and writes it in one go; we have to add to it
        super().save_checkpoint(buffer)
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)
        teacher = None if self.teacher is None else _bare(self.teacher).state_dict()
        student = None
        if teacher is not None and self.settings.deploy == "teacher":
            student, checkpoint["network_weights"] = checkpoint["network_weights"], teacher
        checkpoint["teacher"] = teacher
        checkpoint["semiseg"] = {
            "student": student,
            "auxiliary": self.auxiliary.state_dict(),
            "method_state": self.method_state,
            "random_state": get_random_state(),
        }
        torch.save(checkpoint, filename + ".tmp")
        os.replace(filename + ".tmp", filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        checkpoint = torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False)
        state = checkpoint["semiseg"]
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except RuntimeError:
            self._explain_other_settings(filename_or_checkpoint, checkpoint)
            raise
        self.step = self.current_epoch * self.num_iterations_per_epoch
        try:
            self.auxiliary.load_state_dict(state["auxiliary"])
            for name in self.method_state.keys() | state["method_state"].keys():
                self.method_state[name].copy_(state["method_state"][name])
        except (RuntimeError, KeyError):
            self._explain_other_settings(filename_or_checkpoint, checkpoint)
            raise
        if self.teacher is not None:
            _bare(self.teacher).load_state_dict(checkpoint["teacher"])
        self._resume_student = state["student"]
        self._resume_random_state = state["random_state"]

    def _explain_other_settings(self, filename: str, checkpoint: dict) -> None:
        """Refuse a checkpoint that does not fit, where settings changed since."""
        old, new = (plans.get(PLANS_KEY, {}) for plans in (checkpoint["init_args"]["plans"], self.plans_manager.plans))
        hints = fields(self.settings_class)
        now = {f.name: (old.get(f.name, f.default), new.get(f.name, f.default)) for f in hints}
        changed = [f"{name} was {a} and is {b}" for name, (a, b) in now.items() if a != b]
        if changed:
            raise UserError(
                f"{filename}: its training cannot go on, since {'; '.join(changed)}: set it back with --set, or train"
                " again without --c"
            ) from None


def no_targets(labeled: dict, unlabeled: dict) -> dict[str, Tensor]:
    return {}


def _bare(module: nn.Module) -> nn.Module:
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def split_streams(outputs, n_labeled: int):
    """Split every tensor of a nested output along the batch: the first `n_labeled` samples, and the rest."""
    return tree_map(lambda t: t[:n_labeled], outputs), tree_map(lambda t: t[n_labeled:], outputs)
