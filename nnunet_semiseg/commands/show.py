"""Commands that only show something: trainers, settings."""

from __future__ import annotations

import textwrap
from argparse import ArgumentParser, Namespace

WIDTH, INDENT = 80, " " * 4


def add_settings_arguments(parser: ArgumentParser) -> None:
    """The argument of `settings`."""
    parser.add_argument(
        "trainer", nargs="?", metavar="TRAINER", help="show the settings of this trainer; default: of all trainers"
    )


def run_settings(args: Namespace) -> None:
    """Print the settings of one trainer, or of all."""
    from nnunet_semiseg.settings.described import settings_named

    if args.trainer:
        print("\n".join(in_lines(setting) for setting in settings_named(args.trainer).values()))
    else:
        print("\n\n".join(all_settings()))


def run_list_trainers(args: Namespace) -> None:
    """Print every trainer with its method."""
    from nnunet_semiseg.settings.described import trainers

    width = max(map(len, trainers())) + 2
    for trainer in trainers().values():
        text = trainer.title + (" [text]" if trainer.text == "optional" else "")
        print(textwrap.fill(f"{trainer.name:{width}}{text}", WIDTH, subsequent_indent=" " * width))
    print("\n[text]: with --set text=true, class prompts guide this method, too.")
    print("nnunet_semiseg settings TRAINER shows what can be set.")


def in_lines(setting) -> str:
    """A setting as `--set` takes it, its type, and its meaning below."""
    first = textwrap.fill(f"{setting.name}={setting.default} ({setting.type})", WIDTH, subsequent_indent=INDENT)
    return f"{first}\n{textwrap.fill(setting.meaning, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)}"


def all_settings() -> list[str]:
    """Every setting, those of the same trainers together, below the trainers' names."""
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
