"""The settings of trainers: frozen dataclasses, each with its defaults and its checks.

A trainer's settings are the argument of its base class, as in `SemiSupervisedTrainer[MeanTeacherSettings]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar, Literal

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.losses.ramps import gaussian_ramp

DECAY_BETWEEN = (2_000, 50_000)
"""iterations of a training: an EMA over 100 of them up to the first, over 1,000 from the second on"""


def require(settings, name: str, minimum: float | None = None, maximum: float | None = None) -> None:
    """Raise a UserError unless the setting is None or lies within the bounds, both included."""
    value = getattr(settings, name)
    if value is None or ((minimum is None or value >= minimum) and (maximum is None or value <= maximum)):
        return
    bounds = [f"at least {minimum}"] * (minimum is not None) + [f"at most {maximum}"] * (maximum is not None)
    raise UserError(f"setting {name}={value}: must be {' and '.join(bounds)}; fix it with --set {name}=VALUE")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The length of a training and the like; every trainer of this package has these."""

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    save_every: int = 50
    """epochs between two `checkpoint_latest.pth`"""
    seed: int | None = None
    """fixes the initialisation, and with `nnUNet_n_proc_DA=0` on a CPU the whole training"""
    num_labeled: int | None = None
    """use the labels of so many training cases; the others' images are unlabelled. None: of all"""
    pretrained_encoder: str | None = None
    """a checkpoint of nnssl, such as OpenMind's: its encoder is what a new training begins with"""
    bfloat16_on_cpu: bool = False
    """on a CPU, run the network in bfloat16: faster on CPUs that have instructions for it (AVX512-BF16)"""

    def __post_init__(self):
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            require(self, name, minimum=1)
        require(self, "seed", minimum=0, maximum=2**32 - 1)
        require(self, "num_labeled", minimum=1)


@dataclass(frozen=True, kw_only=True)
class SemiSupervisedSettings(TrainingSettings):
    """Settings of every method with unlabelled samples."""

    unlabeled_batch_size: int | None = None
    """unlabelled samples in a batch; None: as many as labelled ones"""
    memory: Literal["stock", "fast", "small"] = "stock"
    """stock: within 1.15 of nnU-Net's memory; fast: streams joined where a method runs them alike, one backward pass,
    several times the memory; small: one sample at a time, computed twice"""
    strong_probability: float | None = 0.8
    """of each of nnU-Net's intensity transforms in a strong view, which is never without any; null: nnU-Net's own"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "unlabeled_batch_size", minimum=1)
        require(self, "strong_probability", minimum=0.01, maximum=1)


@dataclass(frozen=True, kw_only=True)
class PseudoLabelSettings(SemiSupervisedSettings):
    """Settings of a method that learns from hard pseudo-labels."""

    largest_component: Literal["auto", "on", "off"] = "auto"
    """keep a class's largest component in pseudo-labels; auto: where each labelled case has the class in one piece"""


@dataclass(frozen=True, kw_only=True)
class TurnSettings(SemiSupervisedSettings):
    """Settings of a method whose student sees another view than what labels its samples."""

    turns: bool = True
    """flip the student's view and turn it by right angles, where nnU-Net mirrors; the pseudo-label is turned alike"""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(SemiSupervisedSettings):
    """Settings of a method with an EMA teacher; having them is what gives a trainer its teacher."""

    ema_decay: float | None = None
    """None: by the length of the training, 0.99 up to 2,000 iterations and 0.999 from 50,000 on"""
    deploy: Literal["student", "teacher"] = "student"
    """whose weights validation and prediction use"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "ema_decay", minimum=0, maximum=1)

    @property
    def decay(self) -> float:
        """Of the EMA; the logarithm of 1 - decay falls linearly with that of the number of iterations."""
        if self.ema_decay is not None:
            return self.ema_decay
        iterations = self.num_epochs * self.num_iterations_per_epoch
        (first, last), (fast, slow) = DECAY_BETWEEN, (0.01, 0.001)
        share = log(min(max(iterations, first), last) / first) / log(last / first)
        return 1 - fast * (slow / fast) ** share


@dataclass(frozen=True, kw_only=True)
class ConsistencySettings(SemiSupervisedSettings):
    """Settings of a method with one consistency term under a Gaussian ramp.

    The papers' distances and weights belong to code whose supervised loss is half of nnU-Net's: where probabilities
    differ by 0.3, a voxel's 0.1 MSE has 1/254 of the gradient of Dice, and teaches next to nothing.

    Class attributes:
        paper_weight, paper_ramp: with `consistency=paper`.
    """

    paper_weight: ClassVar[float] = 0.1
    paper_ramp: ClassVar[float] = 1.0

    consistency: Literal["dice_ce", "paper"] = "dice_ce"
    """nnU-Net's loss towards decisions, with deep supervision; or the loss, weight and ramp of the paper"""
    consistency_weight: float | None = None
    """at the end of the ramp; null: 1, or the paper's"""
    ramp_length: float | None = None
    """of the consistency's weight, as a share of the training; null: 0.4, or the paper's"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "consistency_weight", minimum=0)
        require(self, "ramp_length", minimum=1e-6, maximum=1)

    def ramp(self, progress: float) -> float:
        """The share of the consistency's weight at this share of the training."""
        default = self.paper_ramp if self.consistency == "paper" else 0.4
        return gaussian_ramp(progress / (default if self.ramp_length is None else self.ramp_length))

    def weight(self, progress: float) -> float:
        """Of the consistency, at this share of the training."""
        default = self.paper_weight if self.consistency == "paper" else 1.0
        return (default if self.consistency_weight is None else self.consistency_weight) * self.ramp(progress)


@dataclass(frozen=True, kw_only=True)
class MatchSettings(PseudoLabelSettings, TurnSettings):
    """Settings of a method that learns from its own pseudo-labels where these are certain."""

    consistency: Literal["dice_ce", "paper"] = "dice_ce"
    """nnU-Net's loss with deep supervision, or the paper's"""
    match_weight: float = 1.0
    """lambda_u, of the unsupervised loss"""
    match_threshold: float = 0.95
    """tau: pseudo-labels with a lower probability do not count"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "match_weight", minimum=0)
        require(self, "match_threshold", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class TextSettings(SemiSupervisedSettings):
    """Settings of a method that is guided by class prompts."""

    text_model: str = "ViT-B-32"
    """an open_clip model, `hf-hub:NAME`, the path of a folder with `open_clip_config.json`, or `wordllama`: trained
    embeddings of words that come with a package, and know nothing of the order of words"""
    text_pretrained: str = "openai"
    """a tag of open_clip, the path of a checkpoint, or `none` for an untrained encoder"""
    text_cache_dir: str | None = None
    text_embeddings: str | None = None
    """a file of `nnunet_semiseg embed_prompts`, in place of an encoder"""
    n_ctx: int = 4
    """learnable context tokens a class, 0: the text does not learn; with wordllama they are averaged with the words"""
    tmr: Literal["multiplanar", "copy", "off"] = "multiplanar"
    csa: bool = True
    csa_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_ctx", "csa_weight"):
            require(self, name, minimum=0)


@dataclass(frozen=True, kw_only=True)
class OptionalTextSettings(TextSettings):
    """Settings of a method that Text-SemiSeg's text module can be added to (TMR in the network, CSA as a loss)."""

    text: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.text and self.tmr == "off" and not self.csa:
            raise UserError("settings text=true tmr=off csa=false: nothing is left of the text: set text=false")


def uses_text(settings: TrainingSettings) -> bool:
    """Whether a method with these settings is guided by class prompts; with `OptionalTextSettings` the user decides."""
    return getattr(settings, "text", isinstance(settings, TextSettings))
