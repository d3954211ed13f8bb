"""Commands that only show something: status, list_trainers, settings, env."""

from __future__ import annotations

import textwrap
from argparse import ArgumentParser, Namespace

from nnunet_semiseg.commands.command import Command

WIDTH, INDENT = 80, " " * 4


class ListTrainers(Command):
    """Show all trainers, each with its method."""

    name = "list_trainers"
    examples = ("nnunet_semiseg list_trainers",)

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.settings.described import trainers

        width = max(map(len, trainers())) + 2
        for trainer in trainers().values():
            text = trainer.title + (" [text]" if trainer.text == "optional" else "")
            print(textwrap.fill(f"{trainer.name:{width}}{text}", WIDTH, subsequent_indent=" " * width))
        print("\n[text]: with --set text=true, class prompts guide this method, too.")
        print("nnunet_semiseg settings TRAINER shows what can be set.")


class Settings(Command):
    """Show a trainer's settings: default, type, meaning.

    Without a name it shows the settings of all trainers. To see the settings of the commands distill and pretrain_vlm,
    give their name.
    """

    name = "settings"
    examples = ("nnunet_semiseg settings MeanTeacherTrainer", "nnunet_semiseg settings pretrain_vlm")

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "trainer",
            nargs="?",
            metavar="TRAINER/COMMAND",
            help="name of the trainer, or of the command distill or pretrain_vlm; default: all trainers",
        )

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.settings.described import settings_named

        if args.trainer:
            print("\n".join(in_lines(setting) for setting in settings_named(args.trainer).values()))
        else:
            print("\n\n".join(all_settings()))


class Status(Command):
    """Show what there is of a dataset, and the next command.

    It lists cases, plans, trainings and reports, and opens no image. It does not know reports of compare and
    text_effect that were written elsewhere with -o.
    """

    name = "status"
    examples = ("nnunet_semiseg status -d 501",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("-d", required=True, metavar="ID", help="number or name of the dataset")

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.status import status

        print("\n".join(status(args.d)))


class Env(Command):
    """Print the line that lets nnU-Net find the trainers.

    The installation does this by itself. You need the line only if nnU-Net does not find the trainers.
    """

    name = "env"
    examples = ('eval "$(nnunet_semiseg env)"',)

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.discovery import export_line

        print(export_line())


def in_lines(setting) -> str:
    """The lines that describe a setting: first what the user types after `--set`, and its type; then its meaning."""
    first = textwrap.fill(f"{setting.name}={setting.default} ({setting.type})", WIDTH, subsequent_indent=INDENT)
    return f"{first}\n{textwrap.fill(setting.meaning, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)}"


def all_settings() -> list[str]:
    """The description of every setting. Settings of the same trainers stand together, below their names."""
    from nnunet_semiseg.settings.described import Setting, trainers

    owners: dict[Setting, list[str]] = {}
    for trainer in trainers().values():
        for setting in trainer.settings.values():
            owners.setdefault(setting, []).append(trainer.name)
    groups: dict[tuple[str, ...], list[Setting]] = {}
    for setting, names in owners.items():
        groups.setdefault(tuple(names), []).append(setting)
    return [
        "\n".join([textwrap.fill(f"# {_together(names)}", WIDTH, subsequent_indent="#   "), *map(in_lines, settings)])
        for names, settings in sorted(groups.items(), key=lambda group: -len(group[0]))
    ]


def _together(names: tuple[str, ...]) -> str:
    from nnunet_semiseg.settings.described import trainers

    others = sorted(set(trainers()) - set(names))
    if len(others) < 2:
        return "all trainers" + (f" but {others[0]}" if others else "")
    return ", ".join(names)


COMMANDS = (Status(), ListTrainers(), Settings(), Env())
