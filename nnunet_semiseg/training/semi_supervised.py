"""The base of all semi-supervised methods: nnU-Net's trainer with an unlabelled stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from os.path import join
from typing import Any, TypeVar, cast

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from torch import Tensor, nn

from nnunet_semiseg.data.components import heads_in_one_piece
from nnunet_semiseg.data.labeled_subset import JoinedDataset
from nnunet_semiseg.data.prepared_masks import MaskedDataset, PreparedMasks, take_masks
from nnunet_semiseg.data.preprocessed import preprocess_unlabeled_again
from nnunet_semiseg.data.two_streams import UnlabeledDataLoader, add_unlabeled_stream, patch_sizes
from nnunet_semiseg.data.unlabeled_manifest import load_manifest
from nnunet_semiseg.data.views import ViewsTransform
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.deep_supervision import finest_of, loss_where, pseudo_loss
from nnunet_semiseg.settings.base import (
    ExternalMaskSettings,
    SemiSupervisedSettings,
    TeacherSettings,
    WarmUpSettings,
)
from nnunet_semiseg.settings.plans import read_settings
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.checks import check_batch_fits
from nnunet_semiseg.training.decisions import Decisions
from nnunet_semiseg.training.groups import backward, in_turn, run_together, shared, without_gradients
from nnunet_semiseg.training.loss_term_logger import PREFIX
from nnunet_semiseg.training.other_models import MaskVotes, find_masks
from nnunet_semiseg.training.passes import compile_each_size, compile_parts, run_sample_by_sample
from nnunet_semiseg.training.plans_trainer import PlansTrainer, bare
from nnunet_semiseg.training.random_state import RandomStates
from nnunet_semiseg.training.teacher import make_teacher, update_teacher
from nnunet_semiseg.training.turns import NO_TURN, Turn, draw_turn, planes_to_turn_in
from nnunet_semiseg.training.warm_up import WarmUp

S = TypeVar("S", bound=SemiSupervisedSettings)


class SemiSupervisedTrainer(PlansTrainer[S]):
    """The base class of methods. A method is a subclass that defines `losses`; it may override more.

    Class attributes:
        views: the names of the views that the loader makes of each unlabelled patch (see `ViewsTransform`).

    If the settings derive from `TeacherSettings`, the method has an EMA teacher, `self.teacher`; if they derive from
    `WarmUpSettings`, `self.warm_up` decides how long it uses labels only.
    """

    settings_class = SemiSupervisedSettings
    views: tuple[str, ...] = ("strong",)
    decide: Decisions  # from `initialize` on
    masks: PreparedMasks | None = None
    """The masks of other models, if the settings ask for them."""
    votes: MaskVotes  # from `initialize` on, where there are such masks
    warm_up: Any = None  # a `WarmUp`, if the settings ask for one

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.auxiliary: Any = nn.ModuleDict()  # trained but not deployed, so not in self.network
        self.teacher: Any = None  # a network, if the settings ask for one
        self.method_state: dict[str, Tensor] = {}  # what else a resumed training needs; on the CPU
        self.step = 0
        self.random_states = RandomStates(self.ranks)
        self._resume_student: dict | None = None

    # ---------------------------------------------------------------------------------- what a method overrides

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """The terms of the method's loss, in groups. The loss is the sum of all terms.

        After each yield a backward pass runs and frees the feature maps of the group. So a step needs the memory of its
        largest group: yield a group as soon as it is complete, and keep no variable that holds its tensors. What a
        step draws or computes belongs in local variables, not in attributes. The same name may appear in several
        groups; these terms are added. All steps of an epoch must yield the same names. An empty group is ignored.

        Yields:
            Scalars by name, multiplied by their weights.
        """
        raise NotImplementedError

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        """Raise an error if this configuration and fold cannot be trained, before anything is written.

        Raises:
            UserError: see `PlansTrainer.prepare`, `load_manifest` and `find_masks`; the unlabelled samples need too
                much memory; or the configuration is a cascade.
        """
        plans = super().prepare(plans, configuration, fold, dataset_json)
        if samples := self.settings.unlabeled_batch_size:
            what = f"setting unlabeled_batch_size={samples}: set it to a smaller number, or null"
            check_batch_fits(plans, configuration, samples * len(self.views), dataset_json, what)
        if "previous_stage" in plans["configurations"][configuration]:
            raise UserError(f"{type(self).__name__}: cascades are not supported: train 3d_fullres")
        base = join(nnUNet_preprocessed, plans["dataset_name"])
        self.unlabeled_folder, self.unlabeled_cases = load_manifest(base, plans, configuration, plans["dataset_name"])
        self.masks = find_masks(self.settings, plans, configuration, fold, dataset_json)
        return plans

    @classmethod
    def adapt_network(cls, network: Any, settings, arch_kwargs: dict, deep_supervision: bool) -> nn.Module:
        """Turn the plans' network into the method's network.

        Args:
            network: the network of nnU-Net.
            settings: the settings of the method.
            arch_kwargs: the arguments that it was made with, from the plans.
            deep_supervision: whether decoders have several outputs.
        """
        return network

    def build_auxiliary(self) -> dict[str, nn.Module]:
        """Make modules that are trained together with the network, but not needed for prediction.

        Returns them by name.
        """
        return {}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network = PlansTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        settings = read_settings(cls.settings_class, plans_manager.plans, cls)
        kwargs = configuration_manager.network_arch_init_kwargs
        return cls.adapt_network(network, settings, kwargs, enable_deep_supervision)

    def target_maker(self) -> Callable[[dict, dict], dict[str, Tensor]]:
        """Return a function that makes `Batch.extra` from a labelled and an unlabelled batch of the loaders.

        `Batch.extra` holds further tensors for the loss, by name. The function runs in the processes of the loader.
        """
        return take_masks if self.masks else no_targets

    def refresh_network(self) -> None:
        """Update what the network stores in addition to its weights.

        It is called before the training, before each validation, and before the network is saved.
        """

    # ------------------------------------------------------------------------------------- what a method can use

    @property
    def progress(self) -> float:
        """The share of the training that is done. It is 0 at the first step and 1 at the end."""
        return self.step / (self.num_epochs * self.num_iterations_per_epoch)

    @property
    def uses_labels_only(self) -> bool:
        """Whether this step belongs to the warm-up."""
        return self.warm_up is not None and self.step < self.warm_up.first_step

    @property
    def deploys_teacher(self) -> bool:
        """Whether the deployed weights are those of the teacher."""
        return self.teacher is not None and cast(TeacherSettings, self.settings).deploy == "teacher"

    def finest(self, output) -> Tensor:
        """Take the logits at full resolution from an output with or without deep supervision."""
        return output[0] if isinstance(output, (list, tuple)) else output

    @property
    def finest_loss(self) -> nn.Module:
        """nnU-Net's loss for the output at full resolution only."""
        return finest_of(self.loss)

    def pseudo_loss(self, output, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """nnU-Net's loss with deep supervision towards a pseudo-label; see `losses.deep_supervision.pseudo_loss`."""
        return pseudo_loss(self.loss, output, target, weight)

    def loss_where(self, mask: Tensor, output, target) -> Tensor:
        """nnU-Net's loss with deep supervision over the voxels of a mask; see `losses.deep_supervision.loss_where`."""
        return loss_where(self.loss, output, target, mask, self.label_manager)

    def decide_with_masks(self, logits: Tensor, batch: Batch, turn: Turn = NO_TURN) -> tuple[Tensor, Tensor | None]:
        """Make the pseudo-label from a teacher's logits, and its weights (B, 1, *S), or None if all weights are 1.

        With the setting `external_masks`, the masks of other models change both; see `join_masks`.

        Args:
            turn: how the logits are turned. The masks in the batch are not turned yet.
        """
        decision = self.decide(logits, counts=self.masks is None)
        if self.masks is None:
            return decision, None
        label, counts = self.votes(decision, logits, turn(batch.extra["masks"][: len(logits)]))
        self.decide.count(label)
        return label, counts

    def draw_turn(self) -> Turn:
        """Draw flips and a turn for the student's view.

        Nothing is flipped or turned if the setting `turns` is false or missing, or if nnU-Net does not mirror.
        """
        axes = self.inference_allowed_mirroring_axes or ()
        if not getattr(self.settings, "turns", False):
            return Turn()
        plans = self.configuration_manager
        spacing = plans.spacing[-len(plans.patch_size) :]
        return draw_turn(axes, planes_to_turn_in(axes, plans.patch_size, spacing))

    def each(self, function: Callable[[Tensor], Any], *images: Tensor) -> Iterator[Any]:
        """Apply the function to each of the given batches of images. Each result is computed when it is asked for.

        With `memory=fast` the function runs once, on all batches together; see `groups.run_together`.
        """
        return run_together(function, images) if self.settings.memory == "fast" else map(function, images)

    def shared(self, tensors) -> AbstractContextManager[Any]:
        """Let several groups of terms use the same tensors, within a `with` block; see `groups.shared`."""
        if self.settings.memory == "fast":  # there is only one backward pass anyway
            return nullcontext(tensors)
        return shared(tensors, self.autocast(enabled=False))  # what ran in float32 must stay in it

    without_gradients = staticmethod(without_gradients)

    def in_turn(
        self, passes: Sequence[Callable[[], Any]], keep: Callable[[Any], Any] | None = None
    ) -> Iterator[tuple[int, Any, list[Any]]]:
        """Run decoders or networks that teach each other, one graph at a time; see `groups.in_turn`.

        Args:
            keep: default: the logits of an output at full resolution.
        """
        return in_turn(passes, keep or (lambda output: self.finest(output).detach()), self.settings.memory == "fast")

    # ----------------------------------------------------------------------------------------------- the training

    def initialize(self):
        # before super(), which makes the optimizer
        self.auxiliary = nn.ModuleDict(self.build_auxiliary()).to(self.device)
        if self._do_i_compile():
            compile_each_size()
        super().initialize()
        self._initialize_pseudo_labels()
        self._initialize_passes()
        self.trainable = [p for module in self.trained_modules() for p in module.parameters() if p.requires_grad]

    def _initialize_pseudo_labels(self) -> None:
        """Make what decides about pseudo-labels: where they are used, and how masks of other models change them."""
        self.decide = Decisions(self.label_manager, self.class_names(), self.device)
        if isinstance(self.settings, WarmUpSettings):
            steps, share = self.num_epochs * self.num_iterations_per_epoch, self.settings.warm_up
            self.warm_up = WarmUp(share, steps, self.label_manager, self.class_names(), self.device)
            self.method_state |= self.warm_up.state
        if self.masks:
            unsure = cast(ExternalMaskSettings, self.settings).external_unsure
            self.votes = MaskVotes(self.masks, self.class_names(), self.label_manager, unsure, self.device)

    def _initialize_passes(self) -> None:
        """Make the teacher, and change how the networks run."""
        compiled = self._do_i_compile()
        if compiled:
            compile_parts(self.bare_network)
        if isinstance(self.settings, TeacherSettings):
            self.teacher = make_teacher(self.bare_network)
            if compiled:
                compile_parts(self.teacher)
                self.teacher = torch.compile(self.teacher)
        if self.settings.memory == "small":
            run_sample_by_sample(self.network)

    def fixes(self) -> dict[str, str]:
        fix = preprocess_unlabeled_again(self.plans_manager.plans, self.configuration_name)
        return super().fixes() | {self.unlabeled_folder: f"{fix}, then continue with --c"}

    def trained_modules(self) -> list[nn.Module]:
        return [self.network, self.auxiliary]

    @property
    def num_unlabeled(self) -> int:
        return len(self.unlabeled_cases) + len(self.hidden_cases)

    def on_train_start(self):
        super().on_train_start()
        # before this line the network has the deployed weights, because a checkpoint may be loaded only to validate it
        if self._resume_student is not None and self.current_epoch < self.num_epochs:
            self.bare_network.load_state_dict(self._resume_student)
        self._resume_student = None
        self.decide.heads = self.heads_with_one_component()
        for line in self.decisions():
            self.print_to_log_file(line)
        self.refresh_network()
        if self.teacher is not None and self.step == 0:  # weights may have been loaded after the teacher was made
            update_teacher(self.teacher, self.network, 0, cast(TeacherSettings, self.settings).decay)

    def decisions(self) -> list[str]:
        """What was chosen from the data, for the log. In brackets stands the setting that changes it."""
        keep = getattr(self.settings, "largest_component", None)
        lines = [f"largest component kept of: {self.decide.one_piece} (largest_component={keep})"] if keep else []
        return [*lines, *(self.masks.lines() if self.masks else ())]

    def class_names(self) -> list[str]:
        """The names of the classes or regions in the order of the heads, without the background."""
        labels = {k: v for k, v in self.dataset_json["labels"].items() if k not in ("background", "ignore")}
        return list(labels) if self.label_manager.has_regions else sorted(labels, key=labels.__getitem__)

    def heads_with_one_component(self) -> Sequence[int]:
        """The classes or regions that keep only their largest component in pseudo-labels (`largest_component`)."""
        keep = getattr(self.settings, "largest_component", "off")
        if keep == "off":
            return ()
        if keep == "auto":
            cases = self.dataset_class(self.preprocessed_dataset_folder, self.labeled_cases)
            return heads_in_one_piece(cases, self.label_manager, len(self.configuration_manager.patch_size) == 2)
        first = 0 if self.label_manager.has_regions else 1
        return range(first, self.label_manager.num_segmentation_heads)

    def extend_loader(self, augmenter) -> None:
        add_unlabeled_stream(augmenter, self.make_unlabeled_loader, self.views, self.target_maker())

    def get_dataloaders(self):
        loaders = super().get_dataloaders()
        self.random_states.restore()  # only now, because making the loaders uses random numbers
        return loaders

    def unlabeled_dataset(self) -> Any:
        """The preprocessed unlabelled cases, and those labelled cases whose labels must not be used."""
        sources = {self.unlabeled_folder: self.unlabeled_cases, self.preprocessed_dataset_folder: self.hidden_cases}
        cases = JoinedDataset(*(self.dataset_class(folder, list(cases)) for folder, cases in sources.items()))
        return MaskedDataset(cases, self.masks.folders) if self.masks else cases

    foreground_share = 0.0
    """The share of unlabelled samples that are taken around foreground, if `unlabeled_dataset` knows where it is."""

    def make_unlabeled_loader(self, labeled_loader) -> UnlabeledDataLoader | None:
        return UnlabeledDataLoader(
            self.unlabeled_dataset(),
            self.ranks.part(self.settings.unlabeled_batch_size) or self.batch_size,
            *patch_sizes(labeled_loader),
            self.label_manager,
            transforms=ViewsTransform(
                labeled_loader.transforms,
                self.views,
                self.settings.strong_probability,
                self.settings.strong_transforms,
            ),
            foreground_share=self.foreground_share,
        )

    def train_step(self, batch: dict) -> dict:
        """Run one training step. Returns all loss terms as tensors on the device, so that nothing waits for the GPU."""
        self.optimizer.zero_grad(set_to_none=True)
        on_device = Batch.from_loader(batch, self.device)
        self.decide.count_labels(self.finest(on_device.target))
        terms = self.backward(self.losses(on_device))
        del on_device
        self.take_step(self.trainable)
        self.step += 1
        self.move_teacher()
        return {"loss": sum(terms.values()), **terms}

    def move_teacher(self) -> None:
        """Update the EMA teacher after a step."""
        if self.teacher is not None:
            update_teacher(self.teacher, self.network, self.step, cast(TeacherSettings, self.settings).decay)

    def backward(self, groups: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run a backward pass for each group of terms; with `memory=fast` one pass for all.

        Returns the detached terms.
        """
        return backward(groups, self.autocast, self.scaled, self.settings.memory == "fast")

    def on_train_epoch_end(self, train_outputs: list[dict]):
        self.refresh_network()
        names = list(train_outputs[0])
        if any(o.keys() != train_outputs[0].keys() for o in train_outputs):
            raise RuntimeError(f"{type(self).__name__}.losses must yield the same names in every step of an epoch")
        means = torch.stack([torch.stack([o[k].float() for k in names]) for o in train_outputs]).mean(0)
        means = dict(zip(names, self.ranks.mean(means).tolist(), strict=True))
        loss = np.float64(means.pop("loss"))
        for name, value in means.items():
            self.logger.log(PREFIX + name, value, self.current_epoch)
        self.print_to_log_file("loss terms:", ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
        lines = self.decide.shares.end_epoch(self.progress, self.ranks)
        lines += [] if self.warm_up is None else self.warm_up.end_epoch(self.step, self.ranks)
        for line in lines:
            self.print_to_log_file(line)
        super().on_train_epoch_end([{"loss": loss}])

    def on_train_end(self):
        super().on_train_end()
        self._load_deployed_weights()

    def _load_deployed_weights(self):
        """Put the weights that are deployed into `self.network` before the validation.

        They may be those of the teacher.
        """
        if self.deploys_teacher:
            self.bare_network.load_state_dict(bare(self.teacher).state_dict())

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filename: str) -> None:
        self.refresh_network()
        self.random_states.gather()
        super().save_checkpoint(filename)

    def collect_checkpoint(self) -> dict:
        """The checkpoint with two more keys, `teacher` (may be None) and `semiseg`.

        `network_weights` are the deployed weights. If these are the teacher's, `semiseg` also holds the student's.
        """
        checkpoint = super().collect_checkpoint()
        teacher = None if self.teacher is None else bare(self.teacher).state_dict()
        student = None
        if self.deploys_teacher:
            student, checkpoint["network_weights"] = checkpoint["network_weights"], teacher
        checkpoint["teacher"] = teacher
        checkpoint["semiseg"] = {
            "student": student,
            "auxiliary": self.auxiliary.state_dict(),
            "method_state": self.method_state,
            **self.random_states.gathered,
        }
        return checkpoint

    def check_checkpoint(self, checkpoint: dict, name: str) -> None:
        if "semiseg" not in checkpoint:
            trainer = checkpoint.get("trainer_name", "another trainer")
            raise UserError(
                f"{name}: was made by {trainer}, which is not semi-supervised, so this training cannot continue from"
                " it: give it with -pretrained_weights instead"
            )

    def begin_with(self, checkpoint: dict) -> None:
        """Take the weights of the network from another training.

        If the method is the same, also take the auxiliary modules.
        """
        super().begin_with(checkpoint)
        if checkpoint["trainer_name"] == type(self).__name__:
            self.auxiliary.load_state_dict(checkpoint["semiseg"]["auxiliary"])

    def restore(self, checkpoint: dict) -> None:
        state = checkpoint["semiseg"]
        self.auxiliary.load_state_dict(state["auxiliary"])
        for key in self.method_state.keys() | state["method_state"].keys():
            self.method_state[key].copy_(state["method_state"][key])
        self.step = self.current_epoch * self.num_iterations_per_epoch
        if self.teacher is not None:
            bare(self.teacher).load_state_dict(checkpoint["teacher"])
        self._resume_student = state["student"]
        processes = self.random_states.load(state)
        if processes != self.ranks.of and self.goes_on:
            self.print_to_log_file(
                f"trained in {processes} processes so far, and from now on in {self.ranks.of}: so the random numbers"
                " differ from those of an uninterrupted training"
            )


def no_targets(labeled_batch: dict, unlabeled_batch: dict) -> dict[str, Tensor]:
    """Make no further targets: `Batch.extra` is empty. This is the default of `target_maker`."""
    return {}
