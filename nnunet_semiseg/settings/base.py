"""The settings of trainers: frozen dataclasses, each with its defaults and its checks.

The class of a trainer's settings is the type argument of its base class: `TextGuidedTrainer[MeanTeacherSettings]`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.json_types import Bounds, in_words, matches
from nnunet_semiseg.losses.ramps import gaussian_ramp

EMA_LENGTHS = {200: 10, 2_000: 100, 50_000: 1_000}
"""For some lengths of the training, in steps, the length of the EMA, 1 / (1 - decay), in steps."""


Share = Annotated[float, Bounds(0, 1)]
"""A part of a whole, or a probability, from 0 to 1."""
Probability = Annotated[float, Bounds(0.01, 1)]
"""The probability that a transform is applied, from 0.01 to 1."""
Dropout = Annotated[float, Bounds(0, 0.99)]
"""The probability that a value is dropped, from 0 to 0.99."""
Weight = Annotated[float, Bounds(0)]
"""The factor of a term of the loss; 0 switches the term off."""
Count = Annotated[int, Bounds(1)]


@cache
def types_of(settings_class: type) -> dict[str, Any]:
    """The name of every setting and its type, with the bounds in it."""
    hints = get_type_hints(settings_class, include_extras=True)
    return {f.name: hints[f.name] for f in fields(settings_class)}


def check_types(settings) -> None:
    """Raises UserError for a setting with a wrong type or a value out of its bounds."""
    for name, hint in types_of(type(settings)).items():
        if not matches(value := getattr(settings, name), hint):
            fix = f"fix it with --set {name}={_example(hint)}"
            raise UserError(f"setting {name}={json.dumps(value)}: must be {in_words(hint)}; {fix}")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings that every trainer of this package has, such as the length of the training.

    `nnunet_semiseg settings` prints the text below each setting.
    """

    num_epochs: Count = 1000
    """The length of the training, in epochs."""
    num_iterations_per_epoch: Count = 250
    """The number of training steps in an epoch."""
    num_val_iterations_per_epoch: Count = 50
    """The number of batches on which an epoch's validation loss and pseudo Dice are measured."""
    save_every: Count = 50
    """How many epochs pass before `checkpoint_latest.pth` is written again."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] | None = None
    """The seed of the initial weights and of the augmentation. On a CPU, `nnUNet_n_proc_DA=0` then makes the whole
    training repeatable. By default every training differs."""
    num_labeled: Count | None = None
    """How many of the training cases keep their labels; by default all. The images of the others are used as unlabelled
    ones. `SupervisedTrainer` does not use them."""
    pretrained_encoder: str | None = None
    """The path of a checkpoint of nnssl, such as one of the OpenMind models. The training starts with the weights of
    its encoder."""
    contrast_probability: Probability | None = None
    """The probability of each of nnU-Net's transforms of brightness, contrast and gamma on labelled patches. By default
    it is nnU-Net's own: 0.1 to 0.3."""
    local_probability: Share = 0.0
    """The probability, for each channel, of each of two changes of a part of the image, as in nnU-Net's trainer DA5: a
    wide hill or valley of brightness, and another gamma. Labelled patches and strong views have them. With 0 there are
    none."""
    bfloat16_on_cpu: bool = False
    """Whether a training on a CPU computes in bfloat16. This is faster on a CPU with AVX512-BF16 instructions; other
    CPUs may be slower with it."""

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class SemiSupervisedSettings(TrainingSettings):
    """Settings of every method with unlabelled samples."""

    unlabeled_batch_size: Count | None = None
    """The number of unlabelled samples in a batch. By default it is the number of labelled samples."""
    memory: Literal["stock", "fast", "small"] = "stock"
    """How much memory a training step may use. `stock` needs at most 1.15 times the memory of nnU-Net. `fast` runs
    labelled and unlabelled samples together where the method allows it, and needs several times the memory. `small`
    runs one sample at a time and computes its features twice."""
    strong_probability: Probability | None = 0.8
    """The probability of each intensity transform that `strong_transforms` names, in a strong view. A view that has not
    changed is made again, at most 10 times in all. `null` keeps the probabilities that labelled patches have."""
    strong_transforms: Literal["all", "contrast"] = "all"
    """The transforms that have `strong_probability`. `contrast`: only those of brightness, contrast and gamma. Noise,
    blur and low resolution, which can hide small structures, then keep nnU-Net's own probabilities."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabelSettings(SemiSupervisedSettings):
    """Settings of a method that learns from hard pseudo-labels."""

    largest_component: Literal["auto", "on", "off"] = "auto"
    """Whether pseudo-labels keep only the largest connected component of a class. `auto` does this for the classes
    that are one piece in every labelled case. At most 20 cases are looked at."""


@dataclass(frozen=True, kw_only=True)
class ExternalMaskSettings(SemiSupervisedSettings):
    """Settings of a method that learns from other models' masks, too."""

    external_masks: str | tuple[str, ...] | None = None
    """Other models whose masks also teach the network: the name that `add_masks` gave to their masks, or a list of
    names."""
    external_unsure: Share = 0.9
    """The teacher is unsure where the probability of its decision is below this. There the masks of other models
    replace its decision. Elsewhere its decision stays, and gets more weight where a mask agrees with it."""


@dataclass(frozen=True, kw_only=True)
class CertainSettings(PseudoLabelSettings):
    """Settings of a method that learns from pseudo-labels where these are certain."""

    match_threshold: Share = 0.95
    """Pseudo-labels with a probability below this do not count (tau in the paper)."""


@dataclass(frozen=True, kw_only=True)
class TurnSettings(SemiSupervisedSettings):
    """Settings of a method whose student sees another view than the model that makes the pseudo-labels."""

    turns: bool = True
    """Whether the student's view is flipped and turned by right angles, along the axes that nnU-Net mirrors. The
    pseudo-label is flipped and turned in the same way."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(SemiSupervisedSettings):
    """Settings of a method with an EMA teacher. A trainer with these settings has a teacher."""

    ema_decay: Share | None = None
    """The decay of the exponential moving average (EMA) that makes the teacher. By default it follows the length of
    the training: 0.9 up to 200 steps, 0.99 at 2,000 steps, 0.999 from 50,000 steps on."""
    deploy: Literal["student", "teacher"] = "student"
    """Which network validates and predicts: the student or its EMA teacher."""

    @property
    def decay(self) -> float:
        """The decay of the EMA: `ema_decay` if the user has set it, else a value for the length of the training.

        For that the length of the EMA, 1 / (1 - decay), is interpolated between `EMA_LENGTHS` on a logarithmic scale.
        """
        if self.ema_decay is not None:
            return self.ema_decay
        iterations = self.num_epochs * self.num_iterations_per_epoch
        length = np.exp(np.interp(np.log(iterations), np.log([*EMA_LENGTHS]), np.log([*EMA_LENGTHS.values()])))
        return float(1 - 1 / length)


@dataclass(frozen=True, kw_only=True)
class WarmUpSettings(SemiSupervisedSettings):
    """Settings of a method that begins with labels only."""

    warm_up: Share | None = None
    """The share of the training that uses labels only. By default this part ends when the network has learnt every
    class: on the labelled patches of an epoch each class has a Dice of 0.5 or more. It takes at least 0.1 and at most
    0.4 of the training."""


@dataclass(frozen=True, kw_only=True)
class ConsistencySettings(SemiSupervisedSettings):
    """Settings of a method with a consistency term whose weight grows along a Gaussian ramp.

    The losses and weights of the papers were chosen for code whose supervised loss is half as large as nnU-Net's. With
    nnU-Net's loss they teach almost nothing: where probabilities differ by 0.3, the gradient of 0.1 MSE for a voxel is
    1/254 of that of Dice.

    Class attributes:
        paper_weight, paper_ramp: the defaults of `consistency_weight` and `ramp_length` with `consistency=paper`.
    """

    paper_weight: ClassVar[float] = 0.1
    paper_ramp: ClassVar[float] = 1.0

    consistency: Literal["dice_ce", "paper"] = "dice_ce"
    """The loss on unlabelled samples. `dice_ce` is nnU-Net's loss towards pseudo-labels, with deep supervision.
    `paper` is the loss of the paper, with its usual weight and ramp where you do not set these."""
    consistency_weight: Weight | None = None
    """The weight of the loss on unlabelled samples at the end of its ramp. By default it is 1, or with
    `consistency=paper` the weight that is usual for the method."""
    ramp_length: Annotated[float, Bounds(1e-6, 1)] | None = None
    """The share of the training over which the weight of the loss on unlabelled samples grows. By default it is 0.4, or
    with `consistency=paper` the length that is usual for the method."""

    def ramp(self, progress: float) -> float:
        """The share of its final weight that a loss has now, from 0 to 1. `weight` is already multiplied by it.

        `progress` is the share of the training that is done, from 0 to 1.
        """
        default = self.paper_ramp if self.consistency == "paper" else 0.4
        return gaussian_ramp(progress / (default if self.ramp_length is None else self.ramp_length))

    def weight(self, progress: float) -> float:
        """The weight of the consistency loss now, with its ramp. For `progress` see `ramp`."""
        default = self.paper_weight if self.consistency == "paper" else 1.0
        return (default if self.consistency_weight is None else self.consistency_weight) * self.ramp(progress)


@dataclass(frozen=True, kw_only=True)
class SharpeningSettings(ConsistencySettings):
    """Settings of a method whose paper sharpens pseudo-labels p to p^(1/T)."""

    sharpening: Annotated[float, Bounds(1e-3, 1)] = 0.1
    """The temperature that sharpens pseudo-labels with `consistency=paper`. The smaller it is, the closer they are to 0
    and 1."""


@dataclass(frozen=True, kw_only=True)
class MatchSettings(CertainSettings, TurnSettings):
    """Settings of a method that learns from its own pseudo-labels where these are certain."""

    consistency: Literal["dice_ce", "paper"] = "dice_ce"
    """The loss on unlabelled samples. `dice_ce` is nnU-Net's loss towards pseudo-labels, with deep supervision.
    `paper` has no deep supervision, as in the paper: FixMatch then uses CE alone, UniMatch keeps Dice + CE."""
    match_weight: Weight = 1.0
    """The weight of the loss on unlabelled samples (lambda_u in the paper of FixMatch)."""


@dataclass(frozen=True, kw_only=True)
class TextSettings(SemiSupervisedSettings):
    """Settings of a method that is guided by class prompts."""

    text_model: str = "ViT-B-32"
    """The text encoder: the name of an open_clip model, `hf-hub:NAME`, a folder with `open_clip_config.json`, or
    `wordllama`. `wordllama` comes with the Python package of this name (`pip install 'nnunet-semiseg[words]'`) and
    downloads nothing later. It averages the embeddings of the words, so it does not know their order."""
    text_pretrained: str = "openai"
    """The weights of the text encoder: a tag of open_clip, the path of a checkpoint, or `none` for an untrained one.
    A model from the hub, a folder and `wordllama` have their own weights and ignore a tag."""
    text_cache_dir: str | None = None
    """The folder in which open_clip keeps its downloads. By default open_clip chooses it."""
    text_embeddings: str | None = None
    """The path of a file that `nnunet_semiseg embed_prompts` wrote. It replaces the text encoder, for example where
    there is no internet."""
    n_ctx: Annotated[int, Bounds(0)] = 4
    """The number of tokens that are learnt for each class and put before its prompts. With 0 the prompts stay as they
    are. With `text_embeddings` there are no tokens: 0 keeps the embeddings as they are, any other number lets them be
    learnt."""
    tmr: Literal["multiplanar", "copy", "off"] = "multiplanar"
    """How text changes the features of the image (TMR in the paper). `multiplanar` is attention in three planes, `copy`
    adds the same text to every voxel, `off` means no change."""
    csa: bool = True
    """Whether a loss aligns the features of each class with its text (CSA in the paper)."""
    csa_weight: Weight = 1.0
    """The weight of the loss that `csa` switches on."""


@dataclass(frozen=True, kw_only=True)
class OptionalTextSettings(TextSettings):
    """Settings of a method to which Text-SemiSeg's text module can be added (TMR in the network, CSA as a loss)."""

    text: bool = False
    """Whether the method also uses text: the text module of Text-SemiSeg, with `tmr` and `csa`."""

    def __post_init__(self):
        super().__post_init__()
        if self.text and self.tmr == "off" and not self.csa:
            raise UserError("settings text=true tmr=off csa=false: the text would have no effect: set text=false")


def uses_text(settings: TrainingSettings) -> bool:
    """Whether class prompts guide a method with these settings. With `OptionalTextSettings` the user decides."""
    return getattr(settings, "text", isinstance(settings, TextSettings))


def _example(hint: Any) -> str:
    """A value as the user types it after the equals sign, in quotes if the shell would change it."""
    lists = [h for h in (hint, *get_args(hint)) if get_origin(h) is tuple]
    if not lists:
        return "VALUE"
    (inner, *_) = get_args(lists[0])
    item = '"VALUE"' if inner is str else _example(inner).strip("'")
    return f"'[{item}, {item}]'"
