"""Settings in the plans, under ``semiseg``: read, check and change them.

    "semiseg": {"num_epochs": 100, "UAMTTrainer": {"mc_passes": 4}}

A setting that `settings.base` declares has the same meaning for all trainers. It is stored once, for all trainers that
use the plans. A setting that a trainer's own file declares is stored under the trainer's name, because it may mean
something else for another trainer. Older plans have all settings side by side. They are still read. If a value is also
under the trainer's name, that value is taken. A trainer ignores the settings of other trainers, and refuses those that
no trainer has.
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
"""A key of the plans in a trained model.

It holds facts about the data that the predictor needs to build the network.
"""

GIVEN, ACCEPT_CHANGES = "nnUNet_semiseg_set", "nnUNet_semiseg_accept_changes"
"""Environment variables: one holds the settings of a command, as JSON; the other says whether `--c` may continue with
other settings."""

S = TypeVar("S", bound=TrainingSettings)


def with_found(plans: dict, **found) -> dict:
    """A copy of the plans that also holds these facts about the data."""
    return {**plans, FOUND_KEY: {**plans.get(FOUND_KEY, {}), **found}}


def read_settings(settings_class: type[S], plans: dict, trainer: type | None = None) -> S:
    """Read the settings of one trainer from ``plans['semiseg']``.

    Args:
        trainer: the trainer. Values under its name, and under the names of its base classes, are used. None: only the
            values for all trainers.

    Raises:
        UserError: no trainer has such a setting (the message names similar ones, if there are any); a value has the
            wrong type or is out of range.
    """
    own = types_of(settings_class)
    foreign = {k for k, v in plans.get(PLANS_KEY, {}).items() if k not in own and not isinstance(v, dict)}
    if foreign:
        _refuse_unknown(foreign, known={*own, *known_settings()})
    return settings_from(settings_class, _given(settings_class, plans, trainer))


def _given(settings_class: type, plans: dict, trainer: type | None) -> dict[str, Any]:
    """The values that the plans give to this trainer.

    They are those for all trainers, then those under the names of its base classes, then those under its own name. A
    later value replaces an earlier one.
    """
    section = plans.get(PLANS_KEY, {})
    given = {k: v for k, v in section.items() if k in types_of(settings_class)}
    for cls in reversed(trainer.__mro__ if trainer else ()):
        given |= section.get(cls.__name__, {})
    return given


def settings_from(settings_class: type[S], given: dict[str, Any]) -> S:
    """Make settings from a dictionary that holds only settings.

    Raises:
        UserError: a key is unknown (the message names similar ones, if there are any); a value has the wrong type or is
            out of range.
    """
    own = _hints(settings_class)
    _refuse_unknown(given, own)
    return settings_class(**{k: _convert(v, own[k]) for k, v in given.items()})


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``["num_epochs=10", "tmr=copy"]`` into ``{"num_epochs": 10, "tmr": "copy"}``.

    A value is read as JSON, or as Python's True, False or None. Anything else is a text.

    Raises:
        UserError: an assignment is not KEY=VALUE, or a key is given twice.
    """
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
    """Make a copy of the plans with these settings. Each is checked against all trainers that will read it.

    Args:
        changes: values by name, or by `TRAINER.NAME`.
        trainer: the trainer that is meant if a name without `TRAINER.` has several meanings. None: such a name is
            refused.

    Raises:
        UserError: no trainer has such a setting, or the named one does not have it; it is not clear which trainer is
            meant; a value is wrong.
    """
    section = dict(plans.get(PLANS_KEY, {}))
    for key, value in changes.items():
        owner, name, classes = _place(key, trainer)
        for settings_class in classes:
            settings_class(**{name: _convert(value, _hints(settings_class)[name])})
        section |= {owner: {**section.get(owner, {}), name: value}} if owner else {name: value}
    return {**plans, PLANS_KEY: section}


def _place(key: str, trainer: type | None) -> tuple[str, str, list[type]]:
    """Find out where a setting is stored.

    Returns:
        The trainer under whose name it is stored ('' for all trainers); the name of the setting; the settings classes
        of the trainers that will read it.
    """
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
    """Pass settings to the trainer that nnU-Net's command makes. It puts them into the plans when training has begun.

    So nothing is written if the trainer refuses to train. The settings are passed in environment variables, which also
    reach nnU-Net's own processes.
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
    """The plans, with the settings from `given_settings` if there are any."""
    changes = json.loads(os.environ.get(GIVEN, "{}"))
    return update_settings(plans, changes, trainer) if changes else plans


def store_given(plans_file: Path, trainer: type | None = None) -> None:
    """Put the settings from `given_settings` into the plans file, if there are any."""
    if changes := json.loads(os.environ.get(GIVEN, "{}")):
        store_settings(plans_file, changes, trainer)


@contextmanager
def locked(plans_file: Path) -> Iterator[None]:
    """Keep other processes from changing the plans file. If one does so now, wait.

    Raises:
        BusyError: another process has held the file for more than a minute.
        DiskError: the lock cannot be written.
    """
    lock = plans_file.with_name(f".{plans_file.name}.lock")
    with only_one(lock, "changes these plans", wait=60):
        yield


def store_settings(plans_file: Path, changes: dict[str, Any], trainer: type | None = None) -> None:
    """Put settings into a plans file and print what changes. What other processes wrote there stays.

    Args:
        changes, trainer: see `update_settings`.

    Raises:
        UserError: there are no such plans; or see `update_settings`. Then nothing is written.
    """
    if not changes:
        return
    with locked(plans_file):
        plans = load_plans(plans_file, "plan first with nnunet_semiseg plan_and_preprocess")
        write_json(update_settings(plans, changes, trainer), plans_file)
    before = plans.get(PLANS_KEY, {})
    for key, value in changes.items():
        owner, name, _ = _place(key, trainer)
        old = before.get(owner, {}).get(name, before.get(name, "(default)"))
        if old != value:
            print(f"{plans_file}: {name} {old} -> {value}, for {owner or 'every trainer'} with these plans")


def settings_of(settings_class: type, plans: dict, trainer: type | None = None) -> dict[str, Any]:
    """The settings of a trainer in the plans, as JSON values, not checked. A missing setting has its default."""
    given = _given(settings_class, plans, trainer)
    return json.loads(json.dumps({f.name: given.get(f.name, f.default) for f in fields(settings_class)}))


def changed_settings(
    trainer: Any, before: dict, now: dict, used: dict[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """The settings of a trainer that differ between two plans: for each name both values, as JSON values.

    Args:
        used: the values that were used with the plans before. They differ from the plans where a setting is not given,
            and an older version of this package had another default.
    """
    old, new = (settings_of(trainer.settings_class, plans, trainer) for plans in (before, now))
    old |= json.loads(json.dumps(used or {}))
    return {name: (old[name], new[name]) for name in new if old[name] != new[name]}


def refuse_foreign(trainer: type, changes: Iterable[str]) -> None:
    """Refuse settings of other trainers, because they would have no effect here.

    Raises:
        UserError: another trainer has the setting, but this one does not; or `TRAINER.NAME` names another trainer.
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
    """For the name of every setting, the installed trainers that have it, with their settings classes."""
    from nnunet_semiseg.discovery import iter_classes  # here: discovery imports trainers, which import this module

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
    """Convert values that JSON cannot express: tuples, and whole numbers where any number is allowed."""
    if isinstance(value, list):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return float(value) if hint is float and type(value) is int else value
