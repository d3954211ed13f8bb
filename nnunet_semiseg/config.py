"""Settings of a training: frozen dataclasses, kept in the plans under ``semiseg``.

The key is flat and shared by every trainer that uses the plans, so a trainer passes over the settings that
belong to another trainer and refuses those that belong to none.
"""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.training.schedules import gaussian_ramp

PLANS_KEY = "semiseg"


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
    bfloat16_on_cpu: bool = False
    """on a CPU, run the network in bfloat16: faster on CPUs that have instructions for it (AVX512-BF16)"""

    def __post_init__(self):
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
            require(self, name, minimum=1)
        require(self, "seed", minimum=0, maximum=2**32 - 1)
        require(self, "num_labeled", minimum=1)


@dataclass(frozen=True, kw_only=True)
class SemiSupervisedSettings(TrainingSettings):
    unlabeled_batch_size: int | None = None
    """unlabelled samples in a batch; None: as many as labelled ones"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "unlabeled_batch_size", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(SemiSupervisedSettings):
    """Settings of a method with an EMA teacher; having them is what gives a trainer its teacher."""

    ema_decay: float = 0.99
    deploy: Literal["student", "teacher"] = "student"
    """whose weights validation and prediction use"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "ema_decay", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class ConsistencySettings(SemiSupervisedSettings):
    """Settings of a method with one consistency term under a Gaussian ramp."""

    consistency_weight: float = 0.1
    """of the consistency, at the end of the ramp"""
    ramp_length: float = 1.0
    """of the consistency's weight, as a share of the training"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "consistency_weight", minimum=0)
        require(self, "ramp_length", minimum=1e-6, maximum=1)

    def ramp(self, progress: float) -> float:
        """The share of the consistency's weight at this share of the training."""
        return gaussian_ramp(progress / self.ramp_length)


@dataclass(frozen=True, kw_only=True)
class MatchSettings(SemiSupervisedSettings):
    """Settings of a method that learns from its own pseudo-labels where these are certain."""

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
    """an open_clip model, `hf-hub:NAME`, or the path of a folder with `open_clip_config.json`"""
    text_pretrained: str = "openai"
    """a tag of open_clip, the path of a checkpoint, or `none` for an untrained encoder"""
    text_cache_dir: str | None = None
    text_embeddings: str | None = None
    """a file of `nnunet_semiseg embed_prompts`, in place of an encoder"""
    n_ctx: int = 4
    """learnable context tokens a class"""
    tmr: Literal["multiplanar", "copy", "off"] = "multiplanar"
    csa: bool = True
    text_shape: tuple[int, ...] | None = None
    """(K, d), found by the trainer and kept in its plans, for the predictor"""

    def __post_init__(self):
        super().__post_init__()
        require(self, "n_ctx", minimum=1)


@dataclass(frozen=True, kw_only=True)
class OptionalTextSettings(TextSettings):
    """Settings of a method that Text-SemiSeg's text module can be added to (TMR in the network, CSA as a loss)."""

    text: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.text and self.tmr == "off" and not self.csa:
            raise UserError("settings text=true tmr=off csa=false: nothing is left of the text: set text=false")


def uses_text(settings: TrainingSettings) -> bool:
    return getattr(settings, "text", isinstance(settings, TextSettings))


S = TypeVar("S", bound=TrainingSettings)


def require(settings, name: str, minimum: float | None = None, maximum: float | None = None) -> None:
    """Raise a UserError unless the setting is None or lies within the bounds, both included."""
    value = getattr(settings, name)
    if value is None or ((minimum is None or value >= minimum) and (maximum is None or value <= maximum)):
        return
    bounds = [f"at least {minimum}"] * (minimum is not None) + [f"at most {maximum}"] * (maximum is not None)
    raise UserError(f"setting {name}={value}: must be {' and '.join(bounds)}; mend it with --set {name}=VALUE")


def read_settings(settings_class: type[S], plans: dict) -> S:
    """The settings of one trainer from ``plans['semiseg']``.

    Raises:
        UserError: a key that no trainer knows (names the nearest), a value of the wrong type or out of range.
    """
    given = plans.get(PLANS_KEY, {})
    own = _hints(settings_class)
    foreign = set(given) - set(own)
    if foreign:
        _refuse_unknown(foreign, known={*own, *known_settings()})
    return settings_from(settings_class, {k: v for k, v in given.items() if k in own})


def settings_from(settings_class: type[S], given: dict[str, Any]) -> S:
    """Settings from a dictionary of nothing else.

    Raises:
        UserError: an unknown key (names the nearest), a value of the wrong type or out of range.
    """
    own = _hints(settings_class)
    _refuse_unknown(given, own)
    return settings_class(**{k: _convert(k, v, own[k]) for k, v in given.items()})


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["num_epochs=10", "tmr=copy"]`` to ``{"num_epochs": 10, "tmr": "copy"}``; values are JSON or else text."""
    settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not (key and equals):
            raise UserError(f"--set {assignment}: write KEY=VALUE, for example --set num_epochs=100")
        try:
            settings[key] = json.loads(text)
        except json.JSONDecodeError:
            settings[key] = {"True": True, "False": False, "None": None}.get(text, text)
    return settings


def update_settings(plans: dict, changes: dict[str, Any]) -> dict:
    """A copy of the plans with these settings in it, each checked against the trainers that have it."""
    known = known_settings()
    _refuse_unknown(changes, known)
    for key, value in changes.items():
        for settings_class in known[key]:
            settings_class(**{key: _convert(key, value, _hints(settings_class)[key])})
    return {**plans, PLANS_KEY: {**plans.get(PLANS_KEY, {}), **changes}}


def refuse_foreign(trainer: type, changes: Iterable[str]) -> None:
    """Refuse settings of other trainers: for this one they would do nothing.

    Raises:
        UserError: another trainer has the setting, this one does not.
    """
    settings_class, known = getattr(trainer, "settings_class", None), known_settings()
    own = _hints(settings_class) if settings_class else {}
    for key in sorted(set(changes) & set(known) - set(own)):
        hint = f"it has {', '.join(sorted(own))}" if own else "nnU-Net's own trainers have none: use SupervisedTrainer"
        raise UserError(f"--set {key}: {trainer.__name__} has no such setting: {hint}")


def known_settings() -> dict[str, list[type[TrainingSettings]]]:
    """Every setting's name, with the settings classes of the installed trainers that have it."""
    from nnunet_semiseg.discovery import iter_classes  # discovery imports trainers, which import this module

    known: dict[str, list[type[TrainingSettings]]] = {}
    for trainer in iter_classes("trainers"):
        settings_class = getattr(trainer, "settings_class", None)
        for field in fields(settings_class) if settings_class else ():
            if settings_class not in known.setdefault(field.name, []):
                known[field.name].append(settings_class)
    return known


def _hints(settings_class) -> dict[str, Any]:
    hints = get_type_hints(settings_class)
    return {f.name: hints[f.name] for f in fields(settings_class)}


def _refuse_unknown(keys: Iterable[str], known: Iterable[str]) -> None:
    for key in sorted(set(keys) - set(known)):
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known settings: {', '.join(sorted(known))}"
        raise UserError(f"unknown setting {key} (--set, or key '{PLANS_KEY}' of the plans): {hint}")


def _convert(key: str, value: Any, hint: Any) -> Any:
    if not _matches(value, hint):
        raise UserError(
            f"setting {key}={json.dumps(value)}: must be {_name(hint)}; mend it with --set {key}={_example(hint)}"
        )
    if isinstance(value, list):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return float(value) if hint is float else value


def _matches(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, a) for a in args)
    if origin is Literal:
        return value in args and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_matches(v, args[0]) for v in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def _example(hint: Any) -> str:
    """What is to be typed after the equals sign; a shell takes the quotes of JSON away."""
    lists = [h for h in (hint, *get_args(hint)) if get_origin(h) is tuple]
    if not lists:
        return "VALUE"
    (inner, *_) = get_args(lists[0])
    item = '"VALUE"' if inner is str else _example(inner).strip("'")
    return f"'[{item}, {item}]'"


def _name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) for a in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"a list of {_name(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "null")
