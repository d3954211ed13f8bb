"""The names of other packages in docs/architecture.md are there as the page says, and no private one is missing."""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from test_architecture import MODULES, PACKAGE, PAGE, ROOT, folder_of, imports_of


@dataclass(frozen=True)
class Name:
    """One name of the page's table.

    Attributes:
        path: within its module, `function` or `Class.attribute`.
        parameters: those in round brackets, None where there are none.
        words: those in square brackets.
        module, files: where it comes from, and where we use it.
    """

    path: str
    parameters: tuple[str, ...] | None
    words: tuple[str, ...]
    module: str
    files: tuple[str, ...]

    @property
    def last(self) -> str:
        return self.path.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.module}:{self.path}"


def split(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip('"') for part in text.split(",") if part.strip())


def read_table(page: str) -> list[list[Name]]:
    """The names of every row."""
    table = page.partition("\n## Names that are not ours\n")[2]
    rows = []
    for first, module, files in re.findall(r"^\| (`.*`) \| `(.*?)` \| (.*?) \| .*\|$", table, re.MULTILINE):
        owner, names = "", []
        for text in re.findall(r"`(.*?)`", first):
            path, given, words = re.fullmatch(r"([\w.]+)(?:\((.*)\))?(?:\[(.*)\])?", text).groups()
            path = owner + path if path.startswith(".") else path
            owner = path.partition(".")[0]
            parameters = None if given is None else split(given)
            names.append(Name(path, parameters, split(words or ""), module, split(files.replace("`", ""))))
        rows.append(names)
    return rows


ROWS = read_table(PAGE)
NAMES = [name for names in ROWS for name in names]
CALLED_UNNAMED = ("__init__", "forward")


def problem_of(name: Name) -> str | None:
    """In which way the installed package is not what the page says."""
    try:
        owner = importlib.import_module(name.module)
    except ImportError as error:
        return f"its module is gone ({error})"
    *classes, last = name.path.split(".")
    for part in classes:
        if not hasattr(owner, part):
            return f"{part} is gone"
        owner = getattr(owner, part)
    if not hasattr(owner, last):
        if name.parameters is None and not name.words and inspect.isclass(owner) and last in attributes_of(owner):
            return None
        return "is gone"
    found = getattr(owner, last)
    if name.parameters is not None and (problem := parameters_differ(found, name.parameters)):
        return problem
    if missing := set(name.words) - words_in(found):
        return f"its code has no more {' '.join(sorted(missing))}"
    return None


def attributes_of(owner: type) -> set[str]:
    """What the methods of a class and of its bases assign to `self`."""
    found = set()
    for base in owner.__mro__[:-1]:
        for node in ast.walk(tree_of(base)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_name(node.value, "self"):
                found.add(node.attr)
    return found


def words_in(function) -> set[str]:
    if not inspect.isroutine(function):
        return set()
    try:
        nodes = ast.walk(tree_of(function))
    except (OSError, TypeError):  # of no Python code
        return set()
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def tree_of(thing) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def parameters_differ(function, wanted: tuple[str, ...]) -> str | None:
    """`...` at the end stands for further parameters, in the middle for some that are left out."""
    if wanted == ("...",):
        return None if callable(function) else "is no function any more"
    found = [name for name in inspect.signature(function).parameters if name != "self"]
    first = wanted[: wanted.index("...")] if "..." in wanted else wanted
    rest = wanted[len(first) + 1 :]
    fits = tuple(found[: len(first)]) == first and set(rest) <= set(found[len(first) :])
    if fits and ("..." in wanted or len(found) == len(first)):
        return None
    return f"its parameters are now ({', '.join(found)}), and were ({', '.join(wanted)})"


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def file_of(place: str) -> Path:
    return next(file for file in (ROOT / PACKAGE / place, ROOT / place) if file.is_file())


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_it_is_there_as_the_page_says(name):
    if problem := problem_of(name):
        distribution = packages_distributions()[name.module.partition(".")[0]][0]
        pytest.fail(
            f"{distribution} {version(distribution)}: {name.path} of {name.module}: {problem}: look at"
            f" {', '.join(name.files)}, and correct docs/architecture.md"
        )


@pytest.mark.parametrize("names", ROWS, ids=lambda names: str(names[0]))
def test_each_file_of_a_row_uses_it(names):
    sources = {file: file_of(file).read_text(encoding="utf-8") for file in names[0].files}
    words = [word for name in names for word in name.words or [name.last] if word not in CALLED_UNNAMED]
    for word in words:
        assert any(contains(source, word) for source in sources.values()), f"{word}: in none of {', '.join(sources)}"
    for file, source in sources.items():
        assert not words or any(contains(source, word) for word in words), f"{file}: has none of {', '.join(words)}"


def contains(source: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source) is not None


# --------------------------------------------------------------------------------------- private names in our code


def foreign_names(source: str, ours: set[str] = frozenset()) -> set[str]:
    """Private names that a module takes from elsewhere.

    Args:
        ours: private names of the attributes and methods of our classes.
    """
    tree = ast.parse(source)
    local, found = own_names(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if isinstance(node.value, ast.Name) and node.value.id in sys.stdlib_module_names:
                continue  # os._exit is documented
            of_super = isinstance(node.value, ast.Call) and is_name(node.value.func, "super")
            own = ours if is_name(node.value, "self") or is_name(node.value, "cls") else local
            if of_super or node.attr not in own:
                found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and isinstance(node.args[1], ast.Constant):
                found |= {node.args[1].value} if is_private(node.args[1].value) else set()
    for name in imports_of(source):
        if name.partition(".")[0] not in (PACKAGE, *sys.stdlib_module_names):
            parts = name.split(".")
            found |= {parts[-1]} if any(is_private(part) for part in parts) else set()
    return found


def own_names(source: str) -> set[str]:
    """Private names that a module defines: functions, classes, and what it assigns to `self`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_name(node.value, "self"):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_(?!_).+", name) is not None


def overridden(owner: type) -> set[str]:
    """Private names that a class of ours has, and a base of another package has, too."""
    bases = [base for base in owner.__mro__ if base.__module__.partition(".")[0] not in (PACKAGE, "builtins", "typing")]
    inherited = {name for base in bases for name in (*vars(base), *assigned(base))}
    return {name for name in (*vars(owner), *assigned(owner)) if is_private(name) and name in inherited}


def assigned(owner: type) -> set[str]:
    try:
        return own_names(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError):  # of no Python code
        return set()


LISTED = {name.last for name in NAMES} | {part for name in NAMES for part in name.module.split(".")}
PYTHONS = {"_abc_impl", "_is_protocol"}
"""what Python itself puts into a class"""


def test_no_private_name_is_missing_from_the_page():
    sources = {module: file.read_text(encoding="utf-8") for module, file in MODULES.items()}
    ours = set().union(*map(own_names, sources.values()))
    missing = {
        f"{MODULES[module].relative_to(ROOT)}: {name}"
        for module, source in sources.items()
        for name in foreign_names(source, ours) - LISTED
    }
    assert not missing, f"write into the table of docs/architecture.md: {'; '.join(sorted(missing))}"


def test_no_class_of_ours_overrides_a_private_name_that_the_page_lacks():
    modules = [importlib.import_module(module) for module in MODULES if folder_of(module) != "nnunet_ext"]
    classes = {
        owner
        for module in modules
        for owner in vars(module).values()
        if inspect.isclass(owner) and owner.__module__ == module.__name__
    }
    assert len(classes) > 50
    missing = {
        f"{owner.__module__}: {owner.__name__}.{name}"
        for owner in classes
        for name in overridden(owner) - LISTED - PYTHONS
    }
    assert not missing, f"write into the table of docs/architecture.md: {'; '.join(sorted(missing))}"


def test_a_change_is_found():
    module = "test_private_names"
    assert problem_of(Name("Name.last", None, (), module, ())) is None
    assert problem_of(Name("MultiDecoderUNet.guidance", None, (), f"{PACKAGE}.networks.multi_decoder", ())) is None
    assert problem_of(Name("Name.lost", None, (), module, ())) == "is gone"
    assert problem_of(Name("Lost.path", None, (), module, ())) == "Lost is gone"
    assert problem_of(Name("Name.last", None, (), "no_such_module", ())).startswith("its module is gone")
    assert problem_of(Name("is_name", ("node", "name"), (), module, ())) is None
    assert problem_of(Name("is_name", ("node", "..."), (), module, ())) is None
    assert problem_of(Name("is_name", ("node", "...", "name"), (), module, ())) is None
    changed = "its parameters are now (node, name), and were "
    assert problem_of(Name("is_name", ("node",), (), module, ())) == f"{changed}(node)"
    assert problem_of(Name("is_name", ("name", "..."), (), module, ())) == f"{changed}(name, ...)"
    assert problem_of(Name("is_name", ("node", "...", "lost"), (), module, ())) == f"{changed}(node, ..., lost)"
    assert problem_of(Name("words_in", None, ("lost",), module, ())) == "its code has no more lost"


def test_the_table_is_read_as_it_is_meant():
    page = '\n## Names that are not ours\n\n| `A(x, ..., y)`, `.b["k", "l"]`, `.c` | `m.n` | `f.py`, `g.py` | what |\n'
    files = ("f.py", "g.py")
    assert read_table(page) == [
        [
            Name("A", ("x", "...", "y"), (), "m.n", files),
            Name("A.b", None, ("k", "l"), "m.n", files),
            Name("A.c", None, (), "m.n", files),
        ]
    ]


def test_what_counts_as_a_private_name():
    source = """
import os, torch
from torch.utils._pytree import tree_map
class Own(Base):
    def _mine(self):
        self._kept = 1
        return self._kept, self._mine(), self._inherited, super()._mine(), other._taken, other._kept
    def use(self, x):
        os._exit(1)
        return getattr(x, "_asked"), x.public, x.__name__, "_text"
"""
    ours = own_names(source)
    assert ours == {"_mine", "_kept"}
    assert foreign_names(source, ours) == {"tree_map", "_inherited", "_mine", "_taken", "_asked"}
