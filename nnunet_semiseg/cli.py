"""The command `nnunet_semiseg`. Its subcommands are in `commands/`."""

from __future__ import annotations

import difflib
import os
import sys
import textwrap
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from inspect import getdoc

from nnunet_semiseg import __version__
from nnunet_semiseg.commands import data, deployment, evaluation, show, text, training
from nnunet_semiseg.commands.command import Command
from nnunet_semiseg.commands.completion import CompletingParser, did_you_mean, words_to_complete
from nnunet_semiseg.errors import UserError, report
from nnunet_semiseg.quiet import hide_foreign_warnings
from nnunet_semiseg.training_command import how_to_continue

GROUPS = {
    "data": data.COMMANDS,
    "training": training.COMMANDS,
    "evaluation": evaluation.COMMANDS,
    "text": text.COMMANDS,
    "deployment": deployment.COMMANDS,
    "what there is": show.COMMANDS,
}
COMMANDS = tuple(command for commands in GROUPS.values() for command in commands)
WIDTH = 78


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    An error that the user can fix is printed as `error: ` lines on stderr.

    Returns:
        The exit status: 0; 1 after an error; 2 without a known command; 130 after Ctrl-C. If the arguments are wrong,
        the parser ends the program with 2.
    """
    parser = make_parser()
    if words_to_complete():
        import argcomplete  # an optional extra

        argcomplete.autocomplete(parser)
    words = _with_folder(sys.argv[1:] if argv is None else argv)
    if not words:
        parser.print_help()
        return 2
    if not words[0].startswith("-") and words[0] not in (names := [command.name for command in COMMANDS]):
        from importlib.metadata import entry_points

        near = difflib.get_close_matches(words[0], names, n=2)
        near += [entry.name for entry in entry_points(group="console_scripts", name=f"nnUNetv2_{words[0]}")][:1]
        report(UserError(f"{words[0]}: no such command{did_you_mean(near) or ': nnunet_semiseg -h lists them'}"))
        return 2
    args = parser.parse_args(words, Namespace(words=words))
    hide_foreign_warnings()
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; without this, Python complains when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":  # the first of several processes prints it, and then all are ended
            time.sleep(5)
        report(error)
        return 1
    except KeyboardInterrupt:
        how = f": {how_to_continue(args)}" if words[0] == "train" else ""
        print(f"interrupted{how}", file=sys.stderr)
        return 130
    except Exception:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # perhaps another process failed first: then its error is printed
            time.sleep(5)
        raise
    return 0


def make_parser() -> ArgumentParser:
    """Make the parser of all commands, with their help."""
    parser = CompletingParser(
        "nnunet_semiseg",
        description="Semi-supervised and text-guided training with nnU-Net v2.",
        epilog=_list_of_commands(),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnunet_semiseg {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", help="one of the commands below")
    for command in COMMANDS:
        own = subparsers.add_parser(
            command.name,
            description="\n\n".join(textwrap.fill(part, WIDTH) for part in (getdoc(command) or "").split("\n\n")),
            epilog="\n".join(["examples:", *(f"  {line}" for line in command.examples)]),
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser


def _list_of_commands() -> str:
    lines = []
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {c.name:22}{_summary(c)}" for c in commands), ""]
    return "\n".join([*lines, "nnunet_semiseg COMMAND -h shows the options of a command, and examples."])


def _summary(command: Command) -> str:
    return (getdoc(command) or "").partition("\n")[0]


def _with_folder(words: Sequence[str]) -> list[str]:
    """Turn `convert -i FOLDER ...` into `convert folder -i FOLDER ...`, which is what the user means."""
    words = list(words)
    if (
        words[:1] == ["convert"]
        and words[1:2]
        and words[1].startswith("-")
        and words[1] not in ("-h", "--help", "--list")
    ):
        print("convert: taken for `convert folder`, your own images")
        words.insert(1, "folder")
    return words


if __name__ == "__main__":
    sys.exit(main())
