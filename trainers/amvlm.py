"""AMVLM (TMI 2025): masks that are made from texts become pseudo-labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Literal

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nnunet_semiseg.data.augmentation import limited
from nnunet_semiseg.data.texts import has_texts, read_texts, texts_file
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.json_types import Bounds
from nnunet_semiseg.losses.ramps import gaussian_ramp
from nnunet_semiseg.losses.segmentation import probabilities, soft_label_loss
from nnunet_semiseg.settings.base import Count, PseudoLabelSettings, Share, TeacherSettings, TurnSettings, Weight
from nnunet_semiseg.text.prompts import check_prompts_are_current, read_prompts
from nnunet_semiseg.training.batch import Batch
from nnunet_semiseg.training.plans_trainer import dataset_json_file
from nnunet_semiseg.training.semi_supervised import SemiSupervisedTrainer
from nnunet_semiseg.training.turns import NO_TURN
from nnunet_semiseg.vlm.gate import Example, examples_of
from nnunet_semiseg.vlm.pretrained import check_pretraining, load_vlm
from nnunet_semiseg.vlm.sides import Flip, NamedSides, SidePairs
from nnunet_semiseg.vlm.slices import draw_slices
from nnunet_semiseg.vlm.text_labels import TextLabels
from nnunet_semiseg.vlm.text_mask_generator import TextMaskGenerator
from nnunet_semiseg.vlm.training_texts import CaseTexts, ClassTexts


@dataclass(frozen=True, kw_only=True)
class AMVLMSettings(TeacherSettings, PseudoLabelSettings, TurnSettings):
    """Settings of `AMVLMTrainer`. The setting `vlm` has no default and must be given."""

    vlm: str | None = None
    """The folder that `nnunet_semiseg pretrain_vlm` wrote. The trainer does not start without it."""
    texts: Literal["auto", "cases", "classes"] = "auto"
    """Where the texts come from. `cases` takes the text of each case from `texts.json`. `classes` takes the prompts of
    the classes. `auto` takes `cases` if there are a `texts.json` and a single class, else `classes`."""
    missing_texts: Literal["error", "skip"] = "error"
    """What happens if an unlabelled case has no text (with `num_labeled`: any case). `error` refuses to train, `skip`
    uses no text mask for this case."""
    teacher_supervision: bool = True
    """Whether the student learns from the teacher's pseudo-labels. With `mask_labels=evidence` it always does."""
    text_supervision: bool = True
    """Whether the student learns from the text masks, which show where an image has what its text says. With
    `mask_labels=evidence` it does so unless this setting and `average_supervision` are both false."""
    average_supervision: bool = True
    """Whether the student learns from the average of the teacher's pseudo-label and the text mask. For
    `mask_labels=evidence` see `text_supervision`."""
    pseudo_weight: Weight = 1.0
    """The weight of each loss on pseudo-labels (of the teacher, of the text, of their average) at the end of the
    ramp."""
    mask_weight: Weight = 1.0
    """The weight of the loss that trains the text masks. With 0 they stay as they are after the pre-training."""
    mask_learning_rate: Annotated[float, Bounds(0)] = 3e-4
    """The learning rate of the text masks, which have an optimizer of their own (Adam)."""
    mask_texts: Count = 64
    """The number of texts that each image is compared with: the texts of the batch, and others that are drawn at
    random. With the prompts of the classes it has no effect."""
    mask_temperature: Annotated[float, Bounds(1e-6)] = 0.07
    """The first value of the temperature in the loss of the text masks. Training changes it."""
    mask_gate: Share = 0.6
    """How well text masks must find the labels to be used: the area under the ROC curve on labelled cases, where 0.5 is
    chance. With 0 they are always used."""
    mask_labels: Literal["evidence", "hard", "soft"] = "evidence"
    """How text masks are used. `evidence` changes the probabilities of a Mean Teacher by what a mask value says about a
    pixel, as measured on labelled cases. `soft` and `hard` teach with three pseudo-labels, as the paper does: `soft`
    uses the masks as they are, `hard` cuts them at the threshold that has the best Dice on labelled cases."""
    mask_cosines: Literal["absolute", "relative"] = "absolute"
    """How the similarity of an image and a text becomes a mask. `absolute` is sigmoid(10 (cos - 0.25)), as in the
    paper. `relative` compares a pixel with the others of its image, and works with any pre-trained model."""
    text_slices: Count = 8
    """The number of slices of a 3d patch that get a text mask. They are drawn anew in every step."""
    sides: Literal["keep", "swap"] = "keep"
    """What happens if a text names a side, such as left. `keep` leaves out the flips that would make the text false.
    `swap` flips the image and exchanges the words in the text. With the prompts of the classes, `swap` does the same as
    `keep`."""
    vertical_sides: tuple[tuple[str, ...], ...] = (
        ("upper", "lower"), ("uppermost", "lowermost"), ("top", "bottom"), ("topmost", "bottommost"),
        ("above", "below"), ("superior", "inferior"), ("anterior", "posterior"),
    )  # fmt: skip
    """The pairs of words that a flip from top to bottom exchanges."""
    horizontal_sides: tuple[tuple[str, ...], ...] = (
        ("left", "right"), ("leftmost", "rightmost"), ("leftward", "rightward"),
    )  # fmt: skip
    """The pairs of words that a flip from left to right exchanges."""

    @property
    def side_pairs(self) -> SidePairs:
        return self.vertical_sides, self.horizontal_sides

    def __post_init__(self):
        super().__post_init__()
        for name in ("vertical_sides", "horizontal_sides"):
            if any(len(pair) != 2 for pair in getattr(self, name)):
                raise UserError(
                    f"setting {name}={getattr(self, name)}: must be a list of pairs of words, such as"
                    ' [["left", "right"]]'
                )


RAMP = 0.4
"""The share of the training over which the weight of the teacher rises, as in `MeanTeacherTrainer`. It is used only
with `mask_labels=evidence`."""


class AMVLMTrainer(SemiSupervisedTrainer[AMVLMSettings]):
    """Alignment-multiplicity aware vision-language model (IEEE TMI 2025, 10.1109/TMI.2025.3573018), second stage.

    The student is the plans' network, and the teacher its EMA. `TextMaskGenerator`, on the frozen towers of
    `pretrain_vlm`, finds where an unlabelled image shows what its text says. The generator has a loss and an optimizer
    of its own, as in the public code: the contrastive loss of TCL (Cha et al., CVPR 2023) with the two priors of TCL
    (`loss_between_images`), and Adam. With the prompts of the classes the loss is `loss_between_classes`. Teacher and
    generator see the weak view.

    By default the method is a Mean Teacher whose pseudo-labels the text changes. Before every epoch the text masks are
    measured on labelled training cases, if possible on those whose labels the pre-training did not see: what does a
    mask's value say about a pixel (`evidence`)? This changes the odds of the teacher. Its decision teaches the
    student's strong view, flipped and turned, by nnU-Net's loss with deep supervision. If the masks of a class match
    its labels too badly (`mask_gate`), they are not used. If no class has good masks, the method is a Mean Teacher.

    With `mask_labels=soft` it is the paper's method: three pseudo-labels, all probabilities, teach the student: the
    teacher's mask, the text mask, and the average of the two. Each can be switched off.

        L = L_sup + lambda(t) (L_teacher + L_text + L_average)

    The losses are nnU-Net's Dice + CE, towards soft labels at full resolution (`soft_label_loss`). lambda is a Gaussian
    ramp over the training. `hard` cuts the text masks at the threshold with the best Dice. Neither is the default,
    because such a mask finds an object, but not its edges. The gate is ours, too.

    With one class and a texts.json, the text of each case is used. Otherwise there is a prompt and a mask for each
    class (setting `texts`). The background is where no mask is: prod_k (1 - m_k). In a volume, `text_slices` slices
    along the first axis of the patch get text masks; the other slices have the teacher's mask only. So does a case
    without a text (`missing_texts=skip`).

    Augmentation must not make a text false. If texts name sides (`vertical_sides`, `horizontal_sides`; more words can
    be added), flips along their axes (in prediction, too) and rotations above 15 degrees are switched off. With
    `sides=swap` a whole batch is flipped, and the words in its texts are exchanged. In volumes the vertical words can
    mean two axes; then neither is flipped, even with `swap`. A text about the whole image (a count, a place) can still
    be false for a patch of it: plan a patch as large as the image. Prediction needs neither text nor towers.

    These faults of the public code are not repeated: it uses file names instead of texts, drops a refined mask,
    averages the texts of a batch, applies sigmoids to sigmoids, leaves towers and teacher in training mode, and makes
    images black.
    """

    views = ("weak", "strong")

    def prepare(self, plans: dict, configuration: str, fold, dataset_json: dict) -> dict:
        plans = super().prepare(plans, configuration, fold, dataset_json)
        if self.settings.vlm is None:
            raise UserError(
                "setting vlm: AMVLMTrainer needs a pre-trained model: run nnunet_semiseg pretrain_vlm, then"
                " --set vlm=FOLDER"
            )
        check_prompts_are_current(plans["dataset_name"], dataset_json)
        self.prompts = list(read_prompts(dataset_json, dataset_json_file(plans)).values())
        self.case_texts, self.labeled_texts = self.read_case_texts(plans, configuration)
        self.vlm = load_vlm(self.settings.vlm)
        texts = (
            [*self.case_texts.values(), *self.labeled_texts.values()] if self.case_texts else [*chain(*self.prompts)]
        )
        self.seen_cases = check_pretraining(self.settings, plans, configuration, fold, dataset_json)
        n_dims = len(PlansManager(plans).get_configuration(configuration).patch_size)
        swap = self.settings.sides == "swap" and bool(self.case_texts)
        self.sides = NamedSides.of(texts, self.settings.side_pairs, plans, n_dims, swap)
        try:
            self.vlm.tokenize([text for flip in self.sides.flips for text in self.sides.exchange(texts, flip)])
        except UserError as error:
            file = texts_file(plans["dataset_name"]) if self.case_texts else dataset_json_file(plans)
            raise UserError(f"{file}: {error}") from None
        return plans

    def read_case_texts(self, plans: dict, configuration: str) -> tuple[dict[str, str], dict[str, str]]:
        """Read the texts of the unlabelled cases, and of the labelled cases that have one.

        If the texts are prompts of the classes, both results are empty.
        """
        name, one_class = plans["dataset_name"], len(self.prompts) == 2
        if self.settings.texts == "classes" or self.settings.texts == "auto" and not (one_class and has_texts(name)):
            return {}, {}
        if not one_class:
            raise UserError(
                "setting texts=cases: a single text for each case cannot tell several classes apart: use texts=classes"
            )
        cases = list(self.unlabeled_cases)
        manager = PlansManager(plans).get_configuration(configuration)
        folder = join(nnUNet_preprocessed, name, manager.data_identifier)
        labeled_cases = infer_dataset_class(folder).get_identifiers(folder)
        if self.settings.num_labeled is not None:  # some labelled cases become unlabelled; the fold decides later which
            cases += labeled_cases
        texts = read_texts(name, cases, self.settings.missing_texts)
        known = read_texts(name, {*cases, *labeled_cases}, "skip")
        return texts, {case: known[case] for case in labeled_cases if case in known}

    def build_auxiliary(self) -> dict[str, nn.Module]:
        relative, temperature = self.settings.mask_cosines == "relative", self.settings.mask_temperature
        return {"text_masks": TextMaskGenerator(self.vlm, relative, temperature)}

    def initialize(self):
        super().initialize()
        generator = self.auxiliary["text_masks"]
        self.mask_optimizer = torch.optim.Adam(generator.parameters(), self.settings.mask_learning_rate)
        self.optimizer.register_step_pre_hook(self.step_masks)
        settings = self.settings
        if self.case_texts:
            self.texts = CaseTexts(generator, self.case_texts, self.labeled_texts, self.sides, settings.mask_texts)
        else:
            self.texts = ClassTexts(generator, self.prompts)
        n_classes, manager = self.texts.n_classes, self.label_manager
        self.text_labels = TextLabels(n_classes, settings.mask_labels, settings.mask_gate, manager)
        self.method_state |= self.text_labels.state

    def configure_optimizers(self):
        """Make nnU-Net's optimizer for the network only. The text masks have an optimizer of their own."""
        optimizer, scheduler = super().configure_optimizers()
        (group,), of_masks = optimizer.param_groups, {id(p) for p in self.auxiliary.parameters()}
        group["params"] = [p for p in group["params"] if id(p) not in of_masks]
        return optimizer, scheduler

    def backward(self, groups: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run the backward passes.

        The gradients of the text masks are first clipped to a norm of 1 on their own.
        """
        terms = super().backward(groups)
        self.ranks.mean_gradients([*self.auxiliary["text_masks"].parameters()])
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.mask_optimizer)
        nn.utils.clip_grad_norm_(self.auxiliary["text_masks"].parameters(), 1.0)
        return terms

    def train_step(self, batch: dict) -> dict:
        self.mask_optimizer.zero_grad(set_to_none=True)
        return super().train_step(batch)

    def step_masks(self, *_) -> None:
        """Let the optimizer of the text masks step, just before that of the network."""
        if self.grad_scaler is None:
            self.mask_optimizer.step()
        else:
            self.grad_scaler.step(self.mask_optimizer)

    def collect_checkpoint(self) -> dict:
        checkpoint = super().collect_checkpoint()
        checkpoint["semiseg"]["mask_optimizer"] = self.mask_optimizer.state_dict()
        return checkpoint

    def restore(self, checkpoint: dict) -> None:
        super().restore(checkpoint)
        self.mask_optimizer.load_state_dict(checkpoint["semiseg"]["mask_optimizer"])

    # ------------------------------------------------------------------------------------------------- augmentation

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Take nnU-Net's ranges, without changes that make a text false. The initial patch stays as large as before."""
        rotation, dummy_2d, patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.sides.axes:
            rotation = limited(rotation)
            false = set(chain(*self.sides.axes.values()))
            mirror_axes = tuple(axis for axis in mirror_axes if axis not in false)
            swapped = chain(*(self.sides.axes[side] for side in self.sides.swapped))
            self.inference_allowed_mirroring_axes = tuple(sorted((*mirror_axes, *swapped))) or None
        return rotation, dummy_2d, patch_size, mirror_axes

    def flipped(self, batch: Batch, flip: Flip) -> Batch:
        axes = [axis + 2 for axis in self.sides.axes_of(flip)]
        if not axes:
            return batch
        images, target, views = tree_map(lambda x: x.flip(axes), (batch.images, batch.target, batch.views))
        return replace(batch, images=images, target=target, views=views)

    # ------------------------------------------------------------------------------------------------------- losses

    def losses(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        settings = self.settings
        hears = settings.mask_labels == "evidence"
        flip, turn = self.sides.draw_flip(), self.draw_turn() if hears else NO_TURN
        batch = self.flipped(batch, flip)
        outputs = self.each(self.network, batch.images, turn(batch.views["strong"]))
        yield {"supervised": self.loss(next(outputs), batch.target)}

        weak = batch.views["weak"]
        with torch.no_grad():
            taught = probabilities(self.teacher(weak), self.label_manager)
        to_slices, put_back, samples = draw_slices(weak, settings.text_slices)
        masks, has_text, loss = self.texts.masks(to_slices(weak), [batch.cases[i] for i in samples], flip)
        yield {"mask": settings.mask_weight * loss}
        del loss

        taught_2d = to_slices(taught)
        text = self.text_labels(masks, has_text, taught_2d)
        if hears:
            heard = taught if text is None else put_back(taught, text)
            label = turn(self.decide(heard.logit(eps=1e-6)))
            weight = settings.pseudo_weight * gaussian_ramp(self.progress / RAMP)
            yield {"teacher": weight * self.pseudo_loss(next(outputs), label)}
            return
        self.decide(taught.logit())  # its classes are counted
        weight = settings.pseudo_weight * gaussian_ramp(self.progress)
        with self.shared(self.finest(next(outputs))) as logits:
            if settings.teacher_supervision:
                yield {"teacher": weight * soft_label_loss(self.finest_loss, logits, taught)}
            labels = {"text": text, "average": None if text is None else (text + taught_2d) / 2}
            wanted = {"text": settings.text_supervision, "average": settings.average_supervision}
            for name in (name for name in labels if wanted[name]):
                label = labels[name]
                if label is None:
                    yield {name: logits.new_zeros(())}
                else:
                    yield {name: weight * soft_label_loss(self.finest_loss, to_slices(logits), label)}

    # ------------------------------------------------------------------------------------------- how good masks are

    def on_train_start(self):
        super().on_train_start()
        manager = self.label_manager
        labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        cases = [c for c in self.labeled_cases if not self.case_texts or c in self.labeled_texts]
        # the towers may know by heart the labels that the pre-training saw, so masks are better there than elsewhere
        cases = [c for c in cases if c not in self.seen_cases] or cases
        data = self.dataset_class(self.preprocessed_dataset_folder, cases)
        self.examples = examples_of(data, cases, labels, manager.ignore_label)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        if self.settings.text_supervision or self.settings.average_supervision:
            self.measure_masks()

    def measure_masks(self) -> None:
        """Measure the text masks on labelled training cases, and log which are used."""
        masks = [self.masks_of(example) for example in self.examples]
        if said := self.text_labels.measure(masks, self.examples, self.class_names()):
            self.print_to_log_file("text masks, area under the ROC curve:", said)

    @torch.no_grad()
    def masks_of(self, example: Example) -> np.ndarray:
        """The text masks (K, H, W) of a labelled image."""
        image = torch.from_numpy(example.image).to(self.device)[None]
        texts = self.texts.of_labeled(example.case)
        return self.auxiliary["text_masks"](image, texts[None])[1][0].cpu().numpy()
