"""Write the pages of docs/reference from the code: trainers, settings, commands.

python tools/make_reference.py
"""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterable
from pathlib import Path

from nnunet_semiseg import cli
from nnunet_semiseg.settings.described import OF_COMMANDS, Setting, Trainer, settings_of_command, trainers

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
MADE = "<!-- Made from the code by `make reference`. Change the code, not this page. -->"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make a table in Markdown. A cell may contain `|`."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])


def page(title: str, *parts: str) -> str:
    """Make a page in Markdown."""
    return "\n\n".join([MADE, f"# {title}", *parts]) + "\n"


# ---------------------------------------------------------------------------------------------------- the trainers


def trainers_page() -> str:
    """Make the page of all trainers: the method, its use of text, and the settings that only this trainer has."""
    texts = {"always": "yes", "optional": "with `text=true`", "no": "no"}
    rows = [
        (f"`{t.name}`", t.title, texts[t.text], "yes" if t.has_teacher else "no", ", ".join(own_settings(t)) or "none")
        for t in trainers().values()
    ]
    intro = (
        "Give the name with `-tr`. [Methods](../methods.md) says what each costs and what was measured."
        " [Settings](settings.md) explains the settings."
    )
    head = ("trainer", "method", "class prompts", "EMA teacher", "its own settings")
    return page("Trainers", intro, table(head, rows))


def own_settings(trainer: Trainer) -> list[str]:
    """The settings of a trainer that no other trainer has with the same meaning."""
    return [f"`{name}`" for name, s in trainer.settings.items() if owners()[s] == (trainer.name,)]


def owners() -> dict[Setting, tuple[str, ...]]:
    """Every setting, with all trainers in which it has the same meaning."""
    found: dict[Setting, tuple[str, ...]] = {}
    for trainer in trainers().values():
        for setting in trainer.settings.values():
            found[setting] = (*found.get(setting, ()), trainer.name)
    return found


# ---------------------------------------------------------------------------------------------------- the settings


def settings_page() -> str:
    """Make the page of all settings. Settings that the same trainers have are in one table."""
    groups: dict[tuple[str, ...], list[Setting]] = {}
    for setting, names in owners().items():
        groups.setdefault(names, []).append(setting)
    parts = [
        "Type a setting as `--set NAME=VALUE`. `nnunet_semiseg settings TRAINER` lists those of one trainer."
        " [Plan and train](../training.md#settings) says where settings are kept. `null` means none."
        " Two trainers may mean different things by one name; then the setting is in two tables.",
        "## Settings of several trainers",
    ]
    for names in sorted((names for names in groups if len(names) > 1), key=len, reverse=True):
        listed = ", ".join(f"`{s.name}`" for s in groups[names])
        parts += [f"### {listed}", f"Trainers: {together(names)}.", settings_table(groups[names])]
    parts.append("## Settings of one trainer")
    for names in sorted(names for names in groups if len(names) == 1):
        parts += [f"### {names[0]}", settings_table(groups[names])]
    parts.append("## Settings of commands")
    for command in OF_COMMANDS:
        own = [s for s in settings_of_command(command).values() if s not in owners()]
        parts += [f"### nnunet_semiseg {command}", settings_table(own)]
    return page("Settings", *parts)


def settings_table(settings: Iterable[Setting]) -> str:
    """Make a table with a row for each setting."""
    rows = [(f"`{s.name}`", f"`{s.default}`", s.type, s.meaning) for s in settings]
    return table(("setting", "default", "type", "meaning"), rows)


def together(names: tuple[str, ...]) -> str:
    """Join the names of trainers into a text."""
    others = sorted(set(trainers()) - set(names))
    if len(others) > 1:
        return ", ".join(names)
    return "all" + (f" but {others[0]}" if others else "")


# ---------------------------------------------------------------------------------------------------- the commands


def commands_page() -> str:
    """Make the page of all commands, with their options and examples."""
    parser = cli.make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, _SubParsersAction))
    parts = ["`nnunet_semiseg COMMAND -h` shows the same in the terminal. Long names may have one dash or two."]
    for group, members in cli.GROUPS.items():
        parts.append(f"## {group.capitalize()}")
        for command in members:
            parts += [f"### {command.name}", *command_parts(commands.choices[command.name], command.examples)]
    return page("Commands", *parts)


def command_parts(parser: ArgumentParser, examples: Iterable[str]) -> list[str]:
    """The parts of the section of a command: what it does, its options, and examples."""
    paragraphs = [" ".join(text.split()) for text in (parser.description or "").split("\n\n")]
    shown = [action for action in parser._actions if action.help != SUPPRESS and action.dest != "help"]
    rows = [(f"`{option(action)}`", meaning(action, parser)) for action in shown]
    code = "\n".join(f"    {line}" for example in examples for line in example.splitlines())
    return [*paragraphs, *([table(("option", "meaning"), rows)] if rows else []), *([code] if code else [])]


def option(action: Action) -> str:
    """An option as the user types it: its names and its value."""
    value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = action.metavar or value
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    several = f"{value} ..." if action.nargs in ("+", "*") else str(value)
    return " ".join([*action.option_strings, several])


def meaning(action: Action, parser: ArgumentParser) -> str:
    """The help text of an option, with its default."""
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return f"{text}{' (required)' if action.required and action.option_strings else ''}"


PAGES = {"trainers.md": trainers_page, "settings.md": settings_page, "commands.md": commands_page}


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    ArgumentParser(description=__doc__).parse_args()
    main()
