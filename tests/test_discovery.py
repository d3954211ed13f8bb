"""nnU-Net finds our trainers, as the classes they are, and a broken method does not hide the others."""

import importlib
import os
import pickle
import shlex
import sys
from pathlib import Path

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunet_semiseg.trainers
from nnunet_semiseg.discovery import _modules, export_line, ext_folder, find_class, find_trainer, iter_classes
from nnunet_semiseg.errors import UserError

STUB = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class StubTrainer(nnUNetTrainer):
    pass


class _PrivateTrainer(nnUNetTrainer):
    pass


class StubTrainerSettings:
    pass
"""


@pytest.fixture
def add_trainer(tmp_path, monkeypatch):
    """Writes a module that is found as if it lay in trainers/."""
    monkeypatch.setattr(nnunet_semiseg.trainers, "__path__", [str(tmp_path), *nnunet_semiseg.trainers.__path__])

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    before = set(sys.modules)
    yield write
    for module in set(sys.modules) - before:
        if module.startswith("nnunet_semiseg.trainers."):
            del sys.modules[module]


@pytest.fixture
def stub(add_trainer):
    add_trainer("stub", STUB)
    return find_class("trainers", "StubTrainer")


def test_no_trainer_imports_another():
    folder = Path(nnunet_semiseg.trainers.__path__[0])
    found = [file.name for file in folder.glob("*.py") if "nnunet_semiseg.trainers" in file.read_text(encoding="utf-8")]
    assert len(list(folder.glob("*.py"))) > 15 and found == []


@pytest.mark.parametrize("package", ["trainers", "planners"])
def test_finds_every_class_of_the_package(package):
    classes = list(iter_classes(package))
    assert [find_class(package, c.__name__) for c in classes] == classes  # fails on a name used twice, too


def test_every_trainer_file_has_a_trainer():
    assert {module for module, _ in _modules("trainers")} == {c.__module__ for c in iter_classes("trainers")}


def test_finds_public_trainers_only(stub):
    assert stub.__module__ == "nnunet_semiseg.trainers.stub"
    assert [c for c in iter_classes("trainers") if c.__module__ == stub.__module__] == [stub]


@pytest.mark.parametrize("name", ["NoSuchTrainer", "Stub", "StubTrainerX", "nnUNetTrainer", "Stub.*"])
def test_finds_nothing_else(stub, name):
    assert find_class("trainers", name) is None


def test_missing_dependency_stops_only_the_method_that_needs_it(stub, add_trainer):
    add_trainer("a_first", "import no_such_package\n\n\nclass NeedyTrainer:\n    pass\n")
    assert find_class("trainers", "StubTrainer") is stub
    assert stub in iter_classes("trainers")
    assert recursive_find_trainer_class_by_name("StubTrainer") is stub
    for find in (lambda name: find_class("trainers", name), recursive_find_trainer_class_by_name):
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            find("NeedyTrainer")


def test_missing_module_of_our_own_is_not_hidden(add_trainer):
    add_trainer("a_first", "import nnunet_semiseg.no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        list(iter_classes("trainers"))


def test_lookup_imports_the_wanted_module_only(stub, add_trainer):
    add_trainer("other", "class OtherTrainer:\n    pass\n")
    del sys.modules[stub.__module__]
    find_class("trainers", "OtherTrainer")
    assert "nnunet_semiseg.trainers.other" in sys.modules
    assert stub.__module__ not in sys.modules


def test_nnunet_gets_the_class_itself(stub):
    for trainer in [stub, *iter_classes("trainers")]:
        found = recursive_find_trainer_class_by_name(trainer.__name__)
        assert found is trainer
        assert found is getattr(importlib.import_module(found.__module__), found.__name__)
        assert found.__module__.startswith("nnunet_semiseg.trainers.")
        assert pickle.loads(pickle.dumps(found)) is trainer


def test_unknown_trainer_gives_nnunets_own_error(capsys):
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer NoSuchTrainer"):
        recursive_find_trainer_class_by_name("NoSuchTrainer")
    output = capsys.readouterr().out
    assert "Inspecting module: nnunet_semiseg_trainers" in output
    assert "Found class" not in output


@pytest.mark.parametrize("name", ["os", "DC_and_CE_loss"])  # nnU-Net's modules have both
def test_a_name_that_is_not_that_of_a_trainer(name):
    with pytest.raises(UserError, match=f"^{name}: no such trainer: use .*"):
        find_trainer(name)


def test_users_own_folder_is_searched_first(stub, add_trainer, tmp_path_factory, monkeypatch):
    add_trainer("another", STUB.replace("Stub", "Another"))
    theirs = tmp_path_factory.mktemp("theirs")
    (theirs / "my_trainers.py").write_text(STUB + STUB.replace("Stub", "My"))
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(theirs), ext_folder()]))
    for name, module in [
        ("MyTrainer", "my_trainers"),
        ("StubTrainer", "my_trainers"),
        ("AnotherTrainer", "nnunet_semiseg.trainers.another"),
    ]:
        assert recursive_find_trainer_class_by_name(name).__module__ == module


@pytest.mark.parametrize("before", [None, "", "/my folder", ext_folder(), f"/a{os.pathsep}{ext_folder()}"])
def test_export_line_keeps_what_is_set(monkeypatch, before):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    if before is not None:
        monkeypatch.setenv("nnUNet_extTrainer", before)
    export, assignment = shlex.split(export_line())
    name, _, value = assignment.partition("=")
    theirs = [f for f in (before or "").split(os.pathsep) if f not in ("", ext_folder())]
    assert (export, name, value.split(os.pathsep)) == ("export", "nnUNet_extTrainer", [*theirs, ext_folder()])


def test_ext_folder_holds_one_module():
    assert [f for f in os.listdir(ext_folder()) if f != "__pycache__"] == ["nnunet_semiseg_trainers.py"]
