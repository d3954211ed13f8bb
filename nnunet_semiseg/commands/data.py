"""Commands that prepare the data of a training: convert, plan, preprocess, add masks of other models."""

from __future__ import annotations

import difflib
import textwrap
from argparse import (
    REMAINDER,
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from nnunet_semiseg.commands.command import Command, say_next
from nnunet_semiseg.commands.completion import CompletingParser, words_to_complete
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.options import PLANS, add_options, at_least, cores, dataset_id, from_args, option, positive
from nnunet_semiseg.planning_request import PlanningRequest, PreprocessingRequest, proposed_planning


class Convert(Command):
    """Make a raw dataset of your own or of public images.

    NAME is `folder` for your own images, or one of the data sets of --list. A data set can have more options:
    nnunet_semiseg convert NAME -h shows them.
    """

    name = "convert"
    examples = (
        "nnunet_semiseg convert --list",
        'nnunet_semiseg convert folder -i MYDATA -d 501 --labels "left atrium"',
        "nnunet_semiseg convert la2018 -i DOWNLOAD.zip -d 502 --labeled 8",
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.usage = "nnunet_semiseg convert NAME -i DOWNLOAD -d ID [options]"
        parser.add_argument("--list", action="store_true", help="show the data sets that have a converter")
        add_conversion_arguments(parser, required=False)  # for the help: what stands behind NAME is parsed in `run`
        if words := words_to_complete():
            return _add_data_sets(parser, words)
        parser.add_argument(
            "name",
            nargs="?",
            metavar="NAME",
            help="name of a data set of --list, or the word folder for your own images",
        )
        parser.add_argument("rest", nargs=REMAINDER, help=SUPPRESS)

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg import discovery

        names = discovery.module_names("dataset_conversion")
        if args.list or not args.name:
            for name in names:
                print(f"{name:12} {discovery.load_module('dataset_conversion', name).ABOUT.title}")
            return
        if args.name not in names:
            near = difflib.get_close_matches(args.name, names, n=3, cutoff=0.5) or names
            raise UserError(f"convert {args.name}: no such data set: did you mean {' or '.join(near)}?")
        module = discovery.load_module("dataset_conversion", args.name)
        lines = map(str.strip, module.ABOUT.layout.splitlines())
        layout = [textwrap.fill(line, 78, initial_indent="  ", subsequent_indent="    ") for line in lines]
        examples = getattr(module, "EXAMPLES", (f"nnunet_semiseg convert {args.name} -i DOWNLOAD -d 501",))
        own = CompletingParser(
            f"nnunet_semiseg convert {args.name}",
            description="\n".join([textwrap.fill(module.ABOUT.title, 78), "", "What DOWNLOAD holds:", *layout]),
            epilog="\n".join(["examples:", *(f"  {line}" for line in examples)]),
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_all_arguments(own, module)
        given = vars(own.parse_args(args.rest))
        module.convert(given.pop("i"), given.pop("d"), **given)


def add_conversion_arguments(parser: ArgumentParser, required: bool = True) -> None:
    """Add the arguments that every converter has.

    Args:
        required: whether `-i` and `-d` must be given. False if the parser is there only to show its help.
    """
    parser.add_argument(
        "-i", required=required, metavar="DOWNLOAD", help="folder or archive (zip, tar) with images and labels"
    )
    parser.add_argument("-d", type=dataset_id, required=required, metavar="ID", help="number of the new dataset")
    parser.add_argument(
        "--labeled", type=_num_labeled, dest="num_labeled", metavar="N",
        help="how many cases keep their labels: a number, a fraction of the training cases, or all; default: the"
        " published number, or all if nothing is published",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", choices=["published", "all"], default="published",
        help="published: use the lists of training, validation and test cases (of your own data: those of --split,"
        " --test or the folders); all: ignore these lists and train on all cases; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--crop", choices=["none", "published"], default="none",
        help="published: crop each case around its label, as the papers do; none: keep whole images; default:"
        " %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--register", choices=["off", "check", "rigid"], default="off",
        help="whether channels of a case are aligned with the first one. check: print by how many mm they are"
        " displaced. rigid: move them. off: do nothing; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "-np", type=at_least(0), default=cores(8), dest="num_processes", metavar="N",
        help="number of processes; default: one for each core, at most 8",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset that has this number and name")
    parser.add_argument(
        "--max-size", type=positive, metavar="GB",
        help="the largest size, in GB, that an archive may unpack to; default: 100 times its own size, at least 1 GB",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="show what the command would do, and write nothing")
    parser.add_argument("--no_pbar", action="store_false", dest="show_progress_bar", help="show no progress bar")


def _add_data_sets(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Make each data set a subcommand, so that the tab key completes its name, and the options of those in `words`."""
    from nnunet_semiseg import discovery

    data_sets = parser.add_subparsers()
    for name in discovery.module_names("dataset_conversion"):
        own = data_sets.add_parser(name, allow_abbrev=False)
        if name in words:  # it takes long to import them all
            _add_all_arguments(own, discovery.load_module("dataset_conversion", name))


def _add_all_arguments(parser: ArgumentParser, converter: ModuleType) -> None:
    add_conversion_arguments(parser)
    if hasattr(converter, "add_arguments"):
        converter.add_arguments(parser)


def _num_labeled(text: str) -> int | float | str:
    """Read a number, a fraction or `all`. Raises ArgumentTypeError for other text."""
    if text == "all":
        return text
    try:
        number = int(text) if text.isdecimal() else float(text)
    except ValueError:
        number = 0
    if not (number >= 1 if isinstance(number, int) else 0 < number <= 1):
        raise ArgumentTypeError(f"{text}: give a number of cases, a fraction between 0 and 1, or all")
    return number


class PlanAndPreprocess(Command):
    """Make plans, then preprocess all cases, labelled or not."""

    name = "plan_and_preprocess"
    examples = (
        "nnunet_semiseg plan_and_preprocess -d 501 -c 3d_fullres -np 8",
        "nnunet_semiseg plan_and_preprocess -d 501 -c 3d_fullres -pl SemiSegPlanner",
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, PlanningRequest)

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg import planning
        from nnunet_semiseg.devices import device_option
        from nnunet_semiseg.files import dataset_folder

        request = from_args(PlanningRequest, args)
        planning.plan_and_preprocess(request)
        if not request.preprocess:
            return
        number, trainer = request.dataset_ids[0], "SupervisedTrainer" if request.labeled_only else "SemiSegTrainer"
        plans = request.overwrite_plans_name or planning.plans_name_of(request.planner)
        known = planning.read_plans(dataset_folder("nnUNet_preprocessed", number), plans)["configurations"]
        made = [c for c in request.configurations if c in known]  # plans for 2D images have 2d only
        if made:
            configuration = "3d_fullres" if "3d_fullres" in made else made[0]
            say_next(f"nnunet_semiseg train {number} {configuration} 0 -tr {trainer} -p {plans}{device_option()}")


@dataclass(frozen=True, kw_only=True)
class UnlabeledRequest(PreprocessingRequest):
    """The options of `preprocess_unlabeled`."""

    plans: str = option("-plans_name", metavar="PLANS", default=PLANS, help="name of the plans")
    num_parts: int = option(
        "-num_parts", type=at_least(1), metavar="N", default=1,
        help="divide the cases among N commands, on computers that share a disk. When all have ended, run the command"
        " once more without parts; default: %(default)s",
    )  # fmt: skip
    part_id: int | None = option(
        "-part_id",
        type=at_least(0),
        metavar="I",
        default=None,
        help="which of the N commands this is, from 0 to N - 1",
    )


class PreprocessUnlabeled(Command):
    """Preprocess the unlabelled images for existing plans.

    The images are in imagesUn. The plans may be nnU-Net's own or ours.
    """

    name = "preprocess_unlabeled"
    examples = ("nnunet_semiseg preprocess_unlabeled -d 501 -c 3d_fullres",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, UnlabeledRequest)

    def run(self, args: Namespace) -> None:
        request = from_args(UnlabeledRequest, args)
        if (request.part_id is None) != (request.num_parts == 1) or (request.part_id or 0) >= request.num_parts:
            raise UserError("-num_parts N and -part_id I: give both (N of 2 or more, I from 0 to N - 1), or none")
        part = None if request.part_id is None else (request.part_id, request.num_parts)
        from nnunet_semiseg import planning
        from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled
        from nnunet_semiseg.files import dataset_folder

        for number in request.dataset_ids:
            dataset_folder("nnUNet_raw", number)
            planning.read_plans(dataset_folder("nnUNet_preprocessed", number), request.plans, "-plans_name")
        how = request.processes, request.clean, request.show_progress_bar, request.verbose, part
        for number in request.dataset_ids:
            preprocess_unlabeled(number, request.configurations, request.plans, *how)


class AddMasks(Command):
    """Add masks of another model, and measure them.

    It measures the Dice of each class on the labelled cases.
    """

    name = "add_masks"
    examples = ("nnunet_semiseg add_masks -d 501 --name voxtell -i MASKS --map 1=liver 2=spleen",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("-d", type=dataset_id, required=True, metavar="ID", help="number of the dataset")
        parser.add_argument("--name", required=True, metavar="NAME", help="name of the other model, such as voxtell")
        parser.add_argument(
            "-i",
            required=True,
            metavar="FOLDER",
            help="folder of the masks of the other model, a file for each case: CASE.nii.gz",
        )
        parser.add_argument(
            "--map", nargs="+", action="extend", default=[], metavar="VALUE=CLASS",
            help="the class that a value in the masks stands for, such as 5=liver; all other values are background;"
            " default: the values in dataset.json",
        )  # fmt: skip
        parser.add_argument(
            "-np", type=at_least(0), default=cores(4), metavar="N",
            help="number of processes; default: one for each core, at most 4",
        )  # fmt: skip

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.data import external_masks, prepared_masks
        from nnunet_semiseg.files import dataset_folder
        from nnunet_semiseg.schema import names_of_plans, read_dataset_json

        result = external_masks.add_masks(args.d, args.name, args.i, args.map, args.np)
        print(external_masks.table(result))
        print(f"Dice below {prepared_masks.LEAST_DICE} gives the weight 0.")
        print(f"then train with --set external_masks={args.name}")
        there = names_of_plans(dataset_folder("nnUNet_preprocessed", args.d))
        if there:
            plans = PLANS if PLANS in there else there[0]
            say_next(f"nnunet_semiseg preprocess_unlabeled -d {args.d} -plans_name {plans}")
        else:
            file_ending = read_dataset_json(dataset_folder("nnUNet_raw", args.d))["file_ending"]
            say_next(proposed_planning(args.d, file_ending))


COMMANDS = (Convert(), PlanAndPreprocess(), PreprocessUnlabeled(), AddMasks())
