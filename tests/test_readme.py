"""What README and the pages show works: commands, links, trainers, settings, code, messages."""

import ast
import math
import re
import shlex
import sys
import types
from argparse import ArgumentParser, _SubParsersAction
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from training import CLASSES, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg import cli
from nnunet_semiseg.deployment.distillation import DistillationSettings
from nnunet_semiseg.discovery import iter_classes, load_module, module_names
from nnunet_semiseg.settings.plans import known_settings
from nnunet_semiseg.vlm.task import PretrainingSettings

ROOT = Path(__file__).parent.parent
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
}
README, CHINESE = PAGES["README.md"], PAGES["README.zh-CN.md"]


def commands_of(page: str) -> list[str]:
    """The commands in a page's code, each in one line: of this package and of nnU-Net."""
    lines = re.findall(r"^(?: {4,}|`(?=\S+ [^`]*`$))(.*)", page.replace("\\\n", " "), re.MULTILINE)
    lines += [line for block in re.findall(r"```\w*\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    return [line for line in map(without_comment, lines) if re.match(r"nnunet_semiseg |nnUNetv2_\w+ ", line)]


def without_comment(line: str) -> str:
    line = re.sub(r"torchrun .*?-m nnunet_semiseg\.cli", "nnunet_semiseg", line.strip())
    return " ".join(line.partition(" # ")[0].split())


COMMANDS = sorted({command for page in PAGES.values() for command in commands_of(page)})
OURS = [command for command in COMMANDS if command.startswith("nnunet_semiseg")]
THEIRS = [command for command in COMMANDS if command.startswith("nnUNetv2_")]


def test_how_commands_are_found():
    page = "Text.\n\n    nnunet_semiseg a \\\n        --b   # why\n\n- x\n\n      nnUNetv2_c d\n\n"
    page += "```\nnnunet_semiseg e\n```\n\n    torchrun --n=2 -m nnunet_semiseg.cli f\n\nnnunet_semiseg is text.\n"
    assert commands_of(page) == ["nnunet_semiseg a --b", "nnUNetv2_c d", "nnunet_semiseg f", "nnunet_semiseg e"]
    assert len(OURS) > 40 and len(THEIRS) > 5


@pytest.mark.parametrize("command", OURS)
def test_our_commands_are_understood(command, monkeypatch):
    parsed, parse = [], ArgumentParser.parse_args

    def parse_only(self, *args):
        namespace = parse(self, *args)
        namespace.run = parsed.append
        return namespace

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
    assert cli.main(shlex.split(command)[1:]) == 0 and len(parsed) == 1


@pytest.mark.parametrize("command", THEIRS)
def test_commands_of_nnunet_have_these_options(command):
    name, *words = shlex.split(command)
    (script,) = entry_points(group="console_scripts", name=name)
    spec = find_spec(script.module)
    source = Path(spec.origin).read_text(encoding="utf-8")
    options = [word for word in words if re.match(r"--?[a-z]", word)]
    assert [option for option in options if not re.search(rf"""["']{option}["']""", source)] == []


def test_commands_and_options_in_sentences_exist():
    (commands,) = (a.choices for a in cli.make_parser()._actions if isinstance(a, _SubParsersAction))
    parsers = [*commands.values()]
    for module in (load_module("dataset_conversion", name) for name in module_names("dataset_conversion")):
        parsers.append(own := ArgumentParser())
        getattr(module, "add_arguments", lambda parser: None)(own)
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    elsewhere = {"--nproc_per_node", "--standalone", "--max_restarts", "--rdzv_endpoint", "--logdir"}
    for name in PAGES.keys() - {"docs/results.md", "docs/release.md"}:
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL))
        words = [word for span in spans for word in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", span)]
        assert set(words) - options - elsewhere == set(), name
        named = {word for span in spans for word in re.findall(r"^nnunet_semiseg (\w+)", span)} - {"COMMAND"}
        assert named - set(commands) == set(), name


def test_trainers_in_commands_exist():
    known = {trainer.__name__ for trainer in iter_classes("trainers")} | {"EntropyTrainer", "nnUNetTrainer_1epoch"}
    lists = [re.findall(r"(?:-tr|--trainers|--curve)((?: \w+)+)", command) for command in COMMANDS]
    named = {name for found in lists for words in found for name in words.split()} - {"TRAINER"}
    assert len(named) > 10 and named - known == set()


def test_settings_in_pages_exist():
    """But for results, which tell of settings that there were."""
    known = {*known_settings(), *DistillationSettings.__dataclass_fields__, *PretrainingSettings.__dataclass_fields__}
    pages = [page for name, page in PAGES.items() if name not in ("docs/results.md", "CHANGELOG.md")]
    lists = [re.findall(r"--set ((?:'?\w+=\S+ ?)+)", page) for page in pages]
    named = {name for found in lists for words in found for name in re.findall(r"(\w+)=", words)}
    named -= {"KEY", "NAME", "entropy_weight"}
    assert len(named) > 15 and named - known == set()


# ------------------------------------------------------------------------------------------------------- the links


def anchors_of(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        key = str(target.resolve().relative_to(ROOT))
        if not target.exists() or (anchor and anchor not in anchors_of(PAGES[key])):
            broken.append(link)
    assert broken == []


def test_every_page_is_linked_from_the_readme():
    pages = {name for name in PAGES if name.startswith("docs/")} | {"docs/tutorial.ipynb", "CHANGELOG.md"}
    indirect = {"docs/stlu_net.md", "docs/release.md"}  # from the methods, from CONTRIBUTING
    assert [name for name in sorted(pages - indirect) if f"({name})" not in README] == []


# ------------------------------------------------------------------------------------------------------ the README


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150
    assert README.index("SemiSegTrainer") < README.index("TextSemiSegTrainer")


def test_the_chinese_readme_has_the_same_commands_links_tables_and_numbers():
    def parts(page: str):
        links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page) if "README" not in link]
        rows = [line.count("|") for line in page.splitlines() if line.startswith("|")]
        numbers = sorted(re.findall(r"0\.\d\d\d", page))
        return commands_of(page), sorted(links), rows, re.findall(r"^#+", page, re.MULTILINE), numbers

    assert parts(CHINESE) == parts(README)


# --------------------------------------------------------------------------------------------------- the reference


def test_the_reference_is_as_the_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_reference

    made = {name: make() for name, make in make_reference.PAGES.items()}
    assert {name: PAGES[f"docs/reference/{name}"] for name in made} == made, "run make reference"


# ------------------------------------------------------------------------------------------------------ the method


def test_the_method_in_the_pages_trains(tiny_dataset, monkeypatch):
    page = PAGES["docs/add_a_method.md"]
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 25
    module = types.ModuleType("readme_method")
    monkeypatch.setitem(sys.modules, "readme_method", module)
    exec(code, module.__dict__)
    (its_test,) = re.findall(r"```\n(trainer = .*?)```", page, re.DOTALL)
    shared = {"CLASSES": CLASSES, "bare_trainer": bare_trainer, "terms_of": terms_of, "batch_of": batch_of}
    names = {"math": math, "pytest": pytest, "torch": torch} | shared
    exec(its_test, names | module.__dict__)
    dataset = tiny_dataset()
    dataset.plan()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(module.EntropyTrainer, dataset)
    trainer.on_train_start()
    trainer.step = 6  # the end of the ramp
    out = trainer.train_step(next(trainer.dataloader_train))
    assert list(out) == ["loss", "supervised", "entropy"] and torch.isfinite(out["loss"])
    assert 0 < out["entropy"] <= 0.1 * torch.tensor(3.0).log()  # three classes


# --------------------------------------------------------------------------------------------------- troubleshooting


def texts_in(source: str) -> list[str]:
    """The texts in code, with … for each part that changes."""
    trees = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr | ast.Constant)]
    values = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in trees]
    return ["".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in parts) for parts in values]


def test_the_messages_that_are_explained_are_in_the_code():
    messages = re.findall(r"^\*\*`(.*)`\*\*$", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(messages) == len(set(messages)) == 20
    files = [*(ROOT / "nnunet_semiseg").rglob("*.py"), *(ROOT / "trainers").glob("*.py")]
    texts = "\n".join(text for file in files for text in texts_in(file.read_text(encoding="utf-8")))
    assert [message for message in messages if message not in texts] == []


def test_how_a_text_in_code_is_read():
    assert "…: no such file: use … or x" in texts_in('f"{a}: no such" f" file: use {b!r} or x"')
