"""Settings in the plans, under ``semiseg``: read, checked, changed.

The key is flat and shared by every trainer that uses the plans. A trainer skips the settings of other trainers and
refuses those that no trainer has.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import only_one, write_json
from nnunet_semiseg.schema import load_plans
from nnunet_semiseg.settings.base import TrainingSettings

PLANS_KEY = "semiseg"
FOUND_KEY = "semiseg_found"
"""of the plans in a trained model: what a trainer found in its data and the predictor needs to build the network"""

GIVEN, ACCEPT_CHANGES = "nnUNet_semiseg_set", "nnUNet_semiseg_accept_changes"
"""variables of the environment: settings of one command, as JSON, and whether `--c` may go on with other settings"""

S = TypeVar("S", bound=TrainingSettings)


def with_found(plans: dict, **found) -> dict:
    """A copy of the plans that also holds these findings."""
    return {**plans, FOUND_KEY: {**plans.get(FOUND_KEY, {}), **found}}


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


def update_settings(plans: dict, changes: dict[str, Any]) -> dict:
    """A copy of the plans with these settings in it, each checked against the trainers that have it."""
    known = known_settings()
    _refuse_unknown(changes, known)
    for key, value in changes.items():
        for settings_class in known[key]:
            settings_class(**{key: _convert(value, _hints(settings_class)[key])})
    return {**plans, PLANS_KEY: {**plans.get(PLANS_KEY, {}), **changes}}


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


def with_given(plans: dict) -> dict:
    """The plans with the settings of `given_settings`, if there are any."""
    changes = json.loads(os.environ.get(GIVEN, "{}"))
    return update_settings(plans, changes) if changes else plans


def store_given(plans_file: Path) -> None:
    """Put the settings of `given_settings` into the plans file, if there are any."""
    if changes := json.loads(os.environ.get(GIVEN, "{}")):
        store_settings(plans_file, changes)


@contextmanager
def locked(plans_file: Path) -> Iterator[None]:
    """Keep other processes from changing the plans file; it waits for its turn.

    Raises:
        BusyError: another process holds it for more than a minute.
    """
    lock = plans_file.with_name(f".{plans_file.name}.lock")
    with only_one(lock, "changes these plans", wait=60):
        yield


def store_settings(plans_file: Path, changes: dict[str, Any]) -> None:
    """Put settings into a plans file, beside what other processes put there, and print what changes.

    Raises:
        UserError: no such plans; a setting that no trainer has, or of the wrong type; nothing is written.
    """
    if not changes:
        return
    with locked(plans_file):
        plans = load_plans(plans_file, "plan first")
        write_json(update_settings(plans, changes), plans_file)
    before = plans.get(PLANS_KEY, {})
    for key, value in changes.items():
        if (old := before.get(key, "(default)")) != value:
            print(f"{plans_file}: {key} {old} -> {value}, for every trainer with these plans")


def settings_of(settings_class: type[TrainingSettings], plans: dict) -> dict[str, Any]:
    """A trainer's settings as they stand in the plans, unchecked, with the defaults of the others, as in JSON."""
    given = plans.get(PLANS_KEY, {})
    return json.loads(json.dumps({f.name: given.get(f.name, f.default) for f in fields(settings_class)}))


def changed_settings(settings_class: type[TrainingSettings], before: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """The settings of a trainer that differ between two plans: name to their values, as in JSON."""
    old, new = (settings_of(settings_class, plans) for plans in (before, now))
    return {name: (old[name], new[name]) for name in new if old[name] != new[name]}


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
        settings_class: Any = getattr(trainer, "settings_class", None)
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


def _convert(value: Any, hint: Any) -> Any:
    """What JSON has no type for: tuples, and whole numbers where any number will do."""
    if isinstance(value, list):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return float(value) if hint is float and type(value) is int else value
