"""Settings in the plans, under ``semiseg``: read, checked, changed.

    "semiseg": {"num_epochs": 100, "UAMTTrainer": {"mc_passes": 4}}

What `settings.base` declares means the same to every trainer: it stands there once, for all that use the plans. What
a trainer's own file declares stands below the trainer's name, for another trainer may mean something else by it. Plans
in which that stands for all, as it did before, are read as they were: the trainer's own value goes first. A trainer
passes over the settings of other trainers and refuses those that no trainer has.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import only_one, write_json
from nnunet_semiseg.schema import load_plans
from nnunet_semiseg.settings.base import TrainingSettings, types_of

PLANS_KEY = "semiseg"
FOUND_KEY = "semiseg_found"
"""of the plans in a trained model: what a trainer found in its data and the predictor needs to build the network"""

GIVEN, ACCEPT_CHANGES = "nnUNet_semiseg_set", "nnUNet_semiseg_accept_changes"
"""variables of the environment: settings of one command, as JSON, and whether `--c` may go on with other settings"""

S = TypeVar("S", bound=TrainingSettings)


def with_found(plans: dict, **found) -> dict:
    """A copy of the plans that also holds these findings."""
    return {**plans, FOUND_KEY: {**plans.get(FOUND_KEY, {}), **found}}


def read_settings(settings_class: type[S], plans: dict, trainer: type | None = None) -> S:
    """The settings of one trainer from ``plans['semiseg']``.

    Args:
        trainer: whose own values count, and those of the trainers that it inherits from; None: values for all.

    Raises:
        UserError: a key that no trainer knows (names the nearest), a value of the wrong type or out of range.
    """
    own = types_of(settings_class)
    foreign = {k for k, v in plans.get(PLANS_KEY, {}).items() if k not in own and not isinstance(v, dict)}
    if foreign:
        _refuse_unknown(foreign, known={*own, *known_settings()})
    return settings_from(settings_class, _given(settings_class, plans, trainer))


def _given(settings_class: type, plans: dict, trainer: type | None) -> dict[str, Any]:
    """What the plans say for all trainers and has a meaning for this one, and what they say for it alone."""
    section = plans.get(PLANS_KEY, {})
    given = {k: v for k, v in section.items() if k in types_of(settings_class)}
    for cls in reversed(trainer.__mro__ if trainer else ()):
        given |= section.get(cls.__name__, {})
    return given


def settings_from(settings_class: type[S], given: dict[str, Any]) -> S:
    """Settings from a dictionary of nothing else.

    Raises:
        UserError: an unknown key (names the nearest), a value of the wrong type or out of range.
    """
    own = _hints(settings_class)
    _refuse_unknown(given, own)
    return settings_class(**{k: _convert(v, own[k]) for k, v in given.items()})


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["num_epochs=10", "tmr=copy"]`` to ``{"num_epochs": 10, "tmr": "copy"}``; values are JSON or else text."""
    settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not (key and equals):
            raise UserError(f"--set {assignment}: write KEY=VALUE, for example --set num_epochs=100")
        if key in settings:
            raise UserError(f"--set {assignment}: {key} is given twice: give it once")
        try:
            settings[key] = json.loads(text)
        except (ValueError, RecursionError):
            settings[key] = {"True": True, "False": False, "None": None}.get(text, text)
    return settings


def update_settings(plans: dict, changes: dict[str, Any], trainer: type | None = None) -> dict:
    """A copy of the plans with these settings in it, each where it belongs, and checked against those that have it.

    Args:
        changes: a name, or `TRAINER.NAME`, to its value.
        trainer: whose settings these are; None: of all trainers that have them.

    Raises:
        UserError: a name that no trainer has, or that without `trainer` means several things; a wrong value.
    """
    section = dict(plans.get(PLANS_KEY, {}))
    for key, value in changes.items():
        owner, name, classes = _place(key, trainer)
        for settings_class in classes:
            settings_class(**{name: _convert(value, _hints(settings_class)[name])})
        section |= {owner: {**section.get(owner, {}), name: value}} if owner else {name: value}
    return {**plans, PLANS_KEY: section}


def _place(key: str, trainer: type | None) -> tuple[str, str, list[type]]:
    """Below which trainer's name a setting stands, or '' for all; its name; the classes that have it."""
    known = known_settings()
    if trainer is not None and hasattr(trainer, "settings_class"):
        for name in types_of(trainer.settings_class):
            known.setdefault(name, {})[trainer.__name__] = trainer.settings_class
    owner, _, name = key.rpartition(".")
    _refuse_unknown([name], known)
    have = known[name]
    if not owner and all(_is_shared(settings_class, name) for settings_class in have.values()):
        return "", name, list(have.values())
    if not owner and trainer is not None and trainer.__name__ in have:
        owner = trainer.__name__
    if not owner and len(have) == 1:
        (owner,) = have
    if owner not in have:
        what = f"{owner} has no such setting" if owner else "it means another thing to each trainer that has it"
        raise UserError(f"--set {key}: {what}: write {' or '.join(f'{t}.{name}=VALUE' for t in sorted(have))}")
    return owner, name, [have[owner]]


def _is_shared(settings_class: type, name: str) -> bool:
    """Whether the setting is first declared in `settings.base`, and not by a trainer."""
    first = next(cls for cls in reversed(settings_class.__mro__) if name in get_annotations(cls))
    return first.__module__ == TrainingSettings.__module__


@contextmanager
def given_settings(changes: dict[str, Any], accept_changes: bool = False) -> Iterator[None]:
    """Hand settings to the trainer that nnU-Net's command makes; it puts them into the plans when it has begun.

    So nothing is written where it refuses to train. Environment variables reach nnU-Net's processes, too.
    """
    new = {GIVEN: json.dumps(changes)} | ({ACCEPT_CHANGES: "1"} if accept_changes else {})
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def with_given(plans: dict, trainer: type | None = None) -> dict:
    """The plans with the settings of `given_settings`, if there are any."""
    changes = json.loads(os.environ.get(GIVEN, "{}"))
    return update_settings(plans, changes, trainer) if changes else plans


def store_given(plans_file: Path, trainer: type | None = None) -> None:
    """Put the settings of `given_settings` into the plans file, if there are any."""
    if changes := json.loads(os.environ.get(GIVEN, "{}")):
        store_settings(plans_file, changes, trainer)


@contextmanager
def locked(plans_file: Path) -> Iterator[None]:
    """Keep other processes from changing the plans file; it waits for its turn.

    Raises:
        BusyError: another process holds it for more than a minute.
    """
    lock = plans_file.with_name(f".{plans_file.name}.lock")
    with only_one(lock, "changes these plans", wait=60):
        yield


def store_settings(plans_file: Path, changes: dict[str, Any], trainer: type | None = None) -> None:
    """Put settings into a plans file, beside what other processes put there, and print what changes.

    Args:
        changes, trainer: of `update_settings`.

    Raises:
        UserError: no such plans; what `update_settings` refuses; nothing is written.
    """
    if not changes:
        return
    with locked(plans_file):
        plans = load_plans(plans_file, "plan first")
        write_json(update_settings(plans, changes, trainer), plans_file)
    before = plans.get(PLANS_KEY, {})
    for key, value in changes.items():
        owner, name, _ = _place(key, trainer)
        old = before.get(owner, {}).get(name, before.get(name, "(default)"))
        if old != value:
            print(f"{plans_file}: {name} {old} -> {value}, for {owner or 'every trainer'} with these plans")


def settings_of(settings_class: type, plans: dict, trainer: type | None = None) -> dict[str, Any]:
    """A trainer's settings as they stand in the plans, unchecked, with the defaults of the others, as in JSON."""
    given = _given(settings_class, plans, trainer)
    return json.loads(json.dumps({f.name: given.get(f.name, f.default) for f in fields(settings_class)}))


def changed_settings(trainer: Any, before: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """The settings of a trainer that differ between two plans: name to their values, as in JSON."""
    old, new = (settings_of(trainer.settings_class, plans, trainer) for plans in (before, now))
    return {name: (old[name], new[name]) for name in new if old[name] != new[name]}


def refuse_foreign(trainer: type, changes: Iterable[str]) -> None:
    """Refuse settings of other trainers: for this one they would do nothing.

    Raises:
        UserError: another trainer has the setting, this one does not.
    """
    settings_class, known = getattr(trainer, "settings_class", None), known_settings()
    own = _hints(settings_class) if settings_class else {}
    for key in sorted(changes):
        owner, _, name = key.rpartition(".")
        if owner not in ("", trainer.__name__) or (name in known and name not in own):
            hint = (
                f"it has {', '.join(sorted(own))}" if own else "nnU-Net's own trainers have none: use SupervisedTrainer"
            )
            raise UserError(f"--set {key}: {trainer.__name__} has no such setting: {hint}")


def known_settings() -> dict[str, dict[str, type[TrainingSettings]]]:
    """Every setting's name, with the installed trainers that have it and their settings classes."""
    from nnunet_semiseg.discovery import iter_classes  # discovery imports trainers, which import this module

    known: dict[str, dict[str, type[TrainingSettings]]] = {}
    for trainer in iter_classes("trainers"):
        settings_class: Any = getattr(trainer, "settings_class", None)
        for field in fields(settings_class) if settings_class else ():
            known.setdefault(field.name, {})[trainer.__name__] = settings_class
    return known


def _hints(settings_class) -> dict[str, Any]:
    hints = get_type_hints(settings_class)
    return {f.name: hints[f.name] for f in fields(settings_class)}


def _refuse_unknown(keys: Iterable[str], known: Iterable[str]) -> None:
    for key in sorted(set(keys) - set(known)):
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known settings: {', '.join(sorted(known))}"
        raise UserError(f"unknown setting {key} (--set, or key '{PLANS_KEY}' of the plans): {hint}")


def _convert(value: Any, hint: Any) -> Any:
    """What JSON has no type for: tuples, and whole numbers where any number will do."""
    if isinstance(value, list):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return float(value) if hint is float and type(value) is int else value
