"""The base class of commands, and functions that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, ClassVar

from nnunet_semiseg.errors import UserError

if TYPE_CHECKING:
    from nnunet_semiseg.runs import Run


class Command:
    """A subcommand of `nnunet_semiseg`. Its docstring is its help. The list of all commands shows the first line.

    `run` imports the packages that take long to import, so that help is quick.

    Class attributes:
        name: the name that the user types.
        examples: whole command lines, shown below the options.
    """

    name: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's arguments; by default it has none."""

    def run(self, args: Namespace) -> None:
        """Do the work of the command. Raises UserError for errors that the user can fix."""
        raise NotImplementedError


def add_device(parser: ArgumentParser, default: str = "cuda") -> None:
    """Add the option `-device`: a GPU or the CPU."""
    parser.add_argument(
        "-device", default=default, choices=["cuda", "cpu", "mps"], help="where to compute; default: %(default)s"
    )


def add_settings(parser: ArgumentParser, of: str) -> None:
    """Add the option `--set`, which changes settings.

    Args:
        of: the trainer or command that has these settings. The help shows it as `nnunet_semiseg settings NAME`.
    """
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help=f"settings, such as num_epochs=100; nnunet_semiseg settings {of} lists them",
    )  # fmt: skip


def say_next(command: str) -> None:
    """Print the command that the user types next."""
    print(f"next: {command}")


def check_plans(dataset: int | str, plans: str) -> None:
    """Raises UserError if the dataset has no such plans. The error names those that it has."""
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.planning import read_plans

    read_plans(dataset_folder("nnUNet_preprocessed", dataset), plans)


def trained_run(args: Namespace) -> Run:
    """The training that the options of `ModelOptions` and `trainer` name.

    Raises:
        UserError: the dataset or the trainer does not exist, or the trainer has only models of other plans.
    """
    from nnunet_semiseg.discovery import find_trainer
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.runs import Run

    find_trainer(args.trainer)
    results = dataset_folder("nnUNet_results", args.dataset)
    run = Run(results.name, args.configuration, args.fold, args.trainer, args.plans)
    before, after = f"{args.trainer}__", f"__{args.configuration}"
    others = [f.name.removeprefix(before).removesuffix(after) for f in sorted(results.glob(f"{before}*{after}"))]
    if others and not run.model_folder.is_dir():
        names = f"there {'are models' if len(others) > 1 else 'is one'} with {', '.join(others)}"
        raise UserError(f"{run.model_folder}: no such model; {names}: choose with -p")
    return run
