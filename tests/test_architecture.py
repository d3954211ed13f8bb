"""The order of the folders, as docs/architecture.md lists it, and imports that keep it."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = "nnunet_semiseg"
MAPPED = ("trainers", "planners", "dataset_conversion")
"""folders of the repository that are installed within the package"""


def find_modules() -> dict[str, Path]:
    """Every module of the package by the name that it is imported by."""
    modules = {}
    for folder in (PACKAGE, *MAPPED):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [*file.relative_to(ROOT).parent.parts, file.stem]
            parts = parts[:-1] if file.stem == "__init__" else parts
            modules[".".join(parts if folder == PACKAGE else [PACKAGE, *parts])] = file
    return modules


MODULES = find_modules()


def imports_of(source: str) -> list[str]:
    """The dotted names that a module imports: within functions, too, but not for type checkers alone.

    `from a import b` gives a.b, for b may be a module.
    """
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found.extend(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def module_of(name: str) -> str | None:
    """The module of ours that this name is, or is in."""
    if name in MODULES:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in MODULES else None


def graph() -> dict[str, set[str]]:
    """Each module, and those of ours that it imports."""
    sources = {module: file.read_text(encoding="utf-8") for module, file in MODULES.items()}
    return {
        module: {found for name in imports_of(source) if (found := module_of(name))}
        for module, source in sources.items()
    }


def folder_of(module: str) -> str:
    """The folder below the package, or the file that lies in it."""
    return module.split(".")[1] if "." in module else module


def floors() -> dict[str, int]:
    """The number of each folder's floor, from the page's list."""
    section = PAGE.partition("\n## Floors\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^(\d+)\. (.*?):", section, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    listed = [(name, int(number)) for number, names in lines for name in re.findall(r"`(\w+)`", names)]
    assert len(dict(listed)) == len(listed), "a folder is listed twice"
    return {PACKAGE: 0, **dict(listed)}


def upward(imports: dict[str, set[str]], floor: dict[str, int]) -> list[str]:
    """Imports from a higher floor, or from another folder of the same one, each with both files' places."""
    return [
        f"{module} (floor {floor[own]}) imports {found} (floor {floor[other]})"
        for module, names in imports.items()
        for found in sorted(names)
        if (own := folder_of(module)) != (other := folder_of(found)) and floor[other] >= floor[own]
    ]


def test_the_page_lists_every_folder_and_no_other():
    assert sorted(floors()) == sorted({folder_of(module) for module in MODULES})


def test_nothing_imports_upwards():
    assert upward(graph(), floors()) == []


def test_an_import_upwards_or_sideways_is_found():
    floor = {"losses": 1, "data": 2, "text": 2, "training": 3}
    imports = {
        f"{PACKAGE}.data.a": {f"{PACKAGE}.losses.x", f"{PACKAGE}.data.b", f"{PACKAGE}.text.y"},
        f"{PACKAGE}.losses.x": {f"{PACKAGE}.training.z"},
    }
    assert upward(imports, floor) == [
        f"{PACKAGE}.data.a (floor 2) imports {PACKAGE}.text.y (floor 2)",
        f"{PACKAGE}.losses.x (floor 1) imports {PACKAGE}.training.z (floor 3)",
    ]


def test_modules_import_each_other_in_no_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_no_trainer_imports_another():
    trainers = {module: names for module, names in graph().items() if folder_of(module) == "trainers"}
    assert len(trainers) > 10
    pairs = [f"{a} imports {b}" for a, names in trainers.items() for b in names if folder_of(b) == "trainers"]
    assert pairs == []


def test_mapped_folders_are_imported_by_their_whole_name():
    """By the bare name they would be there twice, and only where the repository is the working directory."""
    files = [*MODULES.values(), *(f for folder in ("tests", "tools") for f in sorted((ROOT / folder).glob("*.py")))]
    bare = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports_of(file.read_text(encoding="utf-8"))
        if name.partition(".")[0] in MAPPED
    ]
    assert bare == []


def test_imports_that_this_test_cannot_follow_are_in_discovery_alone():
    for module, file in MODULES.items():
        source = file.read_text(encoding="utf-8")
        assert not any(name.startswith(".") for name in imports_of(source)), f"{file}: write the whole name"
        if folder_of(module) != "discovery":
            assert "import_module(" not in source and "__import__(" not in source, f"{file}: import by name"


def test_what_counts_as_an_import():
    source = """
import a.b
from c import d as e, f
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
else:
    import g
def function():
    from h import i
    import j
from . import k
"""
    assert imports_of(source) == ["a.b", "c.d", "c.f", "typing.TYPE_CHECKING", "g", "h.i", "j", "..k"]
    assert module_of(f"{PACKAGE}.errors.UserError") == f"{PACKAGE}.errors"
    assert module_of(f"{PACKAGE}.vlm.losses") == f"{PACKAGE}.vlm.losses" and module_of("torch.nn") is None
