"""The parser of every command: its errors have one line, and it tells the shell what the tab key proposes."""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import PARSER, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from nnunet_semiseg.discovery import sources
from nnunet_semiseg.errors import UserError, report
from nnunet_semiseg.planning_request import CONFIGURATIONS


def words_to_complete() -> list[str]:
    """The words of the line that the shell wants to complete (argcomplete). Empty if the command shall run."""
    return os.environ.get("COMP_LINE", "").split() if "_ARGCOMPLETE" in os.environ else []


def trainer_names(**_) -> list[str]:
    """All trainers of this package."""
    from nnunet_semiseg.settings.described import trainers

    return list(trainers())


def setting_names() -> set[str]:
    """The settings of all trainers."""
    from nnunet_semiseg.settings.described import trainers

    return {name for trainer in trainers().values() for name in trainer.settings}


def names_with_settings(**_) -> list[str]:
    """What has settings: all trainers of this package, and some commands."""
    from nnunet_semiseg.settings.described import OF_COMMANDS

    return [*trainer_names(), *OF_COMMANDS]


def planner_names(**_) -> list[str]:
    """The planners of this package, and nnU-Net's default one. No planner is imported, as this needs torch."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in sources("planners"))
    return ["ExperimentPlanner", *re.findall(r"^class (\w+)\(", code, re.MULTILINE)]


def plans_names(parser: ArgumentParser, parsed_args: Namespace, **_) -> list[str]:
    """The plans of the dataset that is named earlier in the line. There are none if it is not named or not found."""
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.schema import names_of_plans

    argument = next(action.dest for action in parser._actions if action.metavar == "ID")
    given = getattr(parsed_args, argument, None)
    datasets = given if isinstance(given, list) else [given]  # some commands take several: the first one counts
    if not datasets[0]:
        return []
    try:
        return names_of_plans(dataset_folder("nnUNet_preprocessed", datasets[0]))
    except UserError:
        return []


def dataset_numbers(**_) -> list[str]:
    """The numbers of all raw datasets. There are none if `nnUNet_raw` is not set."""
    folders = Path(os.environ.get("nnUNet_raw") or os.devnull).glob("Dataset*")
    return sorted(str(int(match[1])) for folder in folders if (match := re.match(r"Dataset(\d{3})_", folder.name)))


def configurations(**_) -> list[str]:
    """nnU-Net's configurations."""
    return list(CONFIGURATIONS)


COMPLETERS = {
    "TRAINER": trainer_names,
    "TRAINER/COMMAND": names_with_settings,
    "ID": dataset_numbers,
    "CONFIG": configurations,
    "PLANNER": planner_names,
    "PLANS": plans_names,
}
"""For each metavar of an argument, the function that lists the possible values."""


class CompletingParser(ArgumentParser):
    """A parser that tells the shell which values each argument can have. Each of its errors has one line."""

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        if isinstance(action.metavar, str) and action.metavar in COMPLETERS:
            setattr(action, "completer", COMPLETERS[action.metavar])  # noqa: B010, argcomplete's name
        return action

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):  # pyright: ignore
        """Parse as argparse does. An unknown option is an error of this parser, not of the parser that contains it."""
        options = [option for action in self._actions for option in action.option_strings]
        args = [_as_in_help(word, options) for word in (sys.argv[1:] if args is None else args)]
        if all(action.nargs != PARSER for action in self._actions):  # argparse would read -device as -d evice
            for word in (word.partition("=")[0] for word in args):
                if re.fullmatch(r"-[a-z][a-z_]+", word) and not any(option.startswith(word) for option in options):
                    self._refuse(word, options)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and isinstance(found, Namespace):
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            self._refuse(word, options)
        return found, unknown

    def _refuse(self, word: str, options: Sequence[str]) -> None:
        if not word.startswith("-"):
            self.error(f"{word}: this is one word too many: remove it")
        name = word.lstrip("-")
        if "--set" in options and name in setting_names():
            self.error(f"{word}: this is a setting, not an option: write --set {name}=VALUE")
        hint = "; a setting is written as --set NAME=VALUE" if "--set" in options else ""
        near = difflib.get_close_matches(word, options, n=2)
        near = near or [option for option in options if option.lstrip("-").startswith(name)]  # -tr for --trainers
        self.error(f"{word}: no such option{did_you_mean(near[:2])}{hint}")

    def error(self, message: str):
        """Print one line, without the usage, and end the program."""
        report(UserError(f"{message} ({self.prog} -h shows all options)"))
        sys.exit(2)


def _as_in_help(word: str, options: Sequence[str]) -> str:
    """An option with as many dashes as its help has: users mix `-model` and `--model`. Other words stay as they are."""
    name, equals, value = word.partition("=")
    other = name[1:] if name.startswith("--") else f"-{name}"
    is_other = name.startswith("-") and len(name.lstrip("-")) > 1 and name not in options and other in options
    return f"{other}{equals}{value}" if is_other else word


def did_you_mean(near: Sequence[str]) -> str:
    """The text `: did you mean --labels?` for these names. Empty if there are none."""
    return f": did you mean {' or '.join(near)}?" if near else ""
