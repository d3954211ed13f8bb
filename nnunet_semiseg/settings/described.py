"""Descriptions of trainers and settings, for `nnunet_semiseg settings`, `list_trainers` and docs/reference.

The source files are parsed and not imported, because a trainer imports torch, which takes seconds, and maybe a package
that is not installed. A test compares the parsed values with the imported ones.
"""

from __future__ import annotations

import ast
import difflib
import json
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Any

from nnunet_semiseg.discovery import sources
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.json_types import in_words
from nnunet_semiseg.settings import base

OF_COMMANDS = {
    "distill": ("deployment/distillation.py", "DistillationSettings"),
    "pretrain_vlm": ("vlm/task.py", "PretrainingSettings"),
}
"""The commands that have settings (`--set`) of their own: for each the file in the package, and the class."""


@dataclass(frozen=True)
class Setting:
    """The description of one setting of a trainer or of a command in `OF_COMMANDS`.

    Attributes:
        type: the type in words, such as `a whole number of 1 or more`.
        default: the default as the user types it after `--set NAME=`. A float is rounded to three significant digits.
        meaning: what the setting does, in sentences.
        group: the settings class that declares it, such as `TeacherSettings`.
    """

    name: str
    type: str
    default: str
    meaning: str
    group: str


@dataclass(frozen=True)
class Trainer:
    """The description of one trainer of this package.

    Attributes:
        title: the name of the method, often with what it does, without a full stop.
        settings: its settings by name.
        source: the file that defines the trainer.
    """

    name: str
    title: str
    settings: dict[str, Setting]
    source: Path

    @property
    def text(self) -> str:
        """Whether class prompts guide the trainer: `always`, `optional` (with `--set text=true`) or `no`."""
        return "optional" if "text" in self.settings else "always" if "text_model" in self.settings else "no"

    @property
    def has_teacher(self) -> bool:
        """Whether the trainer has an EMA teacher."""
        return "ema_decay" in self.settings


@cache
def trainers() -> dict[str, Trainer]:
    """Every trainer of this package by name, in alphabetical order."""
    found = {}
    for file in sources("trainers"):
        module = ast.parse(file.read_text(encoding="utf-8"))
        classes = _classes(module)
        title = (ast.get_docstring(module) or "").partition("\n")[0].rstrip(".")
        for name, node in classes.items():
            arguments = [
                b.slice.id for b in node.bases if isinstance(b, ast.Subscript) and isinstance(b.slice, ast.Name)
            ]
            if arguments and not name.startswith("_"):
                found[name] = Trainer(name, title, _settings(arguments[0], classes), file)
    return dict(sorted(found.items()))


def settings_of_command(command: str) -> dict[str, Setting]:
    """The settings of a command in `OF_COMMANDS`, by name."""
    file, name = OF_COMMANDS[command]
    source = Path(__file__).parents[1].joinpath(file).read_text(encoding="utf-8")
    return _settings(name, _classes(ast.parse(source)))


def settings_named(name: str) -> dict[str, Setting]:
    """The settings of a trainer of this package, or of a command in `OF_COMMANDS`, by name.

    Raises:
        UserError: for any other name, also of nnU-Net's own trainers. The error names similar ones, if there are any.
    """
    if name in OF_COMMANDS:
        return settings_of_command(name)
    if name in trainers():
        return trainers()[name].settings
    if name.startswith("nnUNetTrainer"):
        raise UserError(f"{name}: nnU-Net's own trainers have no settings: use SupervisedTrainer in its place")
    near = difflib.get_close_matches(name, [*trainers(), *OF_COMMANDS], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "nnunet_semiseg list_trainers shows all"
    raise UserError(f"{name}: no such trainer: {hint}")


@cache
def _shared() -> dict[str, ast.ClassDef]:
    """The settings classes that several trainers build on."""
    return _classes(ast.parse(Path(base.__file__).read_text(encoding="utf-8")))


def _classes(module: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}


def _settings(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, Setting]:
    """The fields of a dataclass, inherited ones included, in the order of `dataclasses.fields`."""
    node = classes.get(name) or _shared()[name]
    found: dict[str, Setting] = {}
    for parent in reversed(node.bases):
        found |= _settings(ast.unparse(parent), classes)
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if (
            isinstance(field, ast.AnnAssign)
            and field.value
            and not ast.unparse(field.annotation).startswith("ClassVar")
        ):
            meaning = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            key = ast.unparse(field.target)
            hint, default = _value(field.annotation), _value(field.value)
            found[key] = Setting(key, in_words(hint), _typed(default), " ".join(cleandoc(str(meaning)).split()), name)
    return found


def _value(node: ast.expr) -> Any:
    """Evaluate an annotation or a default of a setting. It may use only names that `settings.base` defines or imports.

    Only source code of this package is evaluated.
    """
    return eval(ast.unparse(node), {**vars(base)})


def _typed(default: Any) -> str:
    if isinstance(default, float):
        return f"{default:.3g}"
    return default if isinstance(default, str) else json.dumps(default)
