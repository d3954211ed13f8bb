"""Find what is in ``trainers/``, ``planners/`` and ``dataset_conversion/``. To add something, add a file."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from nnunet_semiseg.errors import UserError

# names, so that this module imports no large package
BASE_CLASSES = {"trainers": "nnUNetTrainer", "planners": "ExperimentPlanner"}


def find_class(package: str, name: str) -> type | None:
    """Find the class ``name`` in ``nnunet_semiseg.<package>``. None if there is none.

    It reads the source files, and imports only the module that defines the class. So a package that only another method
    needs may be missing. If the module itself needs a missing package, the caller gets the ImportError.
    """
    definition = re.compile(rf"^class {re.escape(name)}\s*[(:]", re.MULTILINE)
    for module, file in _modules(package):
        if definition.search(file.read_text(encoding="utf-8")):
            return getattr(importlib.import_module(module), name)
    return None


def iter_classes(package: str) -> Iterator[type]:
    """Yield every public trainer or planner. Modules that need a missing package are skipped."""
    for module, _ in _modules(package):
        try:
            namespace = vars(importlib.import_module(module))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "nnunet_semiseg":  # not a dependency: a mistake in our own code
                raise
            continue
        for name, value in list(namespace.items()):
            if isinstance(value, type) and value.__module__ == module and not name.startswith("_"):
                if BASE_CLASSES[package] in (base.__name__ for base in value.__mro__):
                    yield value


def find_trainer(name: str) -> type:
    """Find a trainer of this package, of nnU-Net, or of the user.

    Raises:
        UserError: there is no such trainer. The message lists similar names or, if there are none, all.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    if (found := find_class("trainers", name)) is not None:
        return found
    try:
        with contextlib.redirect_stdout(None):
            return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, TypeError, AssertionError) as error:
        # nnU-Net's own errors: nothing has this name; or it is the name of a module (TypeError) or of another class
        if not any(word in str(error) for word in (name, "issubclass", "must inherit")):
            raise  # the error of a user's module
        near = similar_trainers(name) or sorted(trainer.__name__ for trainer in iter_classes("trainers"))
        raise UserError(f"{name}: no such trainer: use {' or '.join(near)}, or one of nnU-Net's") from None


def similar_trainers(name: str) -> list[str]:
    """Up to three names of trainers of this package that are spelt nearly like this one, the most similar first."""
    return difflib.get_close_matches(name, sorted(trainer.__name__ for trainer in iter_classes("trainers")), n=3)


def module_names(package: str) -> list[str]:
    """The names of the modules of ``nnunet_semiseg.<package>``."""
    return sorted(module.rpartition(".")[2] for module, _ in _modules(package))


def sources(package: str) -> list[Path]:
    """The paths of the modules of ``nnunet_semiseg.<package>``."""
    return sorted(file for _, file in _modules(package))


def load_module(package: str, name: str) -> ModuleType:
    """Import a module by a name from `module_names`. Its errors are not caught."""
    return importlib.import_module(f"nnunet_semiseg.{package}.{name}")


def ext_folder() -> str:
    """The folder that must be in ``nnUNet_extTrainer``, so that nnU-Net finds our trainers."""
    return str(Path(__file__).with_name("nnunet_ext"))


def export_line() -> str:
    """The shell command that adds our folder to the variable `nnUNet_extTrainer`, after the folders that are in it."""
    folders = [f for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f]
    if ext_folder() not in folders:
        folders.append(ext_folder())
    return f"export nnUNet_extTrainer={shlex.quote(os.pathsep.join(folders))}"


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    parent = importlib.import_module(f"nnunet_semiseg.{package}")
    for finder, name, is_package in pkgutil.iter_modules(parent.__path__):
        if not is_package:
            yield f"{parent.__name__}.{name}", Path(finder.path, f"{name}.py")
