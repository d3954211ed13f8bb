"""Commands that train: train, demo."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from nnunet_semiseg.commands.command import Command, add_device, add_settings, say_next
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.training_command import add_continue_argument, add_training_arguments


class Train(Command):
    """Train as nnUNetv2_train does, with settings (--set).

    All options of nnUNetv2_train work here, too.
    """

    name = "train"
    examples = (
        "nnunet_semiseg train 501 3d_fullres 0 -tr MeanTeacherTrainer",
        "nnunet_semiseg train 501 3d_fullres 0 -tr UAMTTrainer --set mc_passes=4 seed=1",
        "nnunet_semiseg train 501 2d 0 -tr UAMTTrainer --as short --set num_epochs=50",
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_training_arguments(parser)
        add_continue_argument(parser)
        parser.add_argument(
            "--as", dest="copy", metavar="NAME",
            help="copy the plans under this name and train with the copy: this makes a separate model on the same"
            " preprocessed data",
        )  # fmt: skip
        parser.add_argument(
            "--accept-changes",
            action="store_true",
            help="with --c: continue although settings have changed since the training began",
        )
        add_settings(parser, "TRAINER")

    def run(self, args: Namespace) -> None:
        from nnunetv2.run.run_training import run_training_entry

        from nnunet_semiseg.devices import device_option
        from nnunet_semiseg.discovery import find_trainer
        from nnunet_semiseg.files import dataset_folder
        from nnunet_semiseg.planning import check_plans_name, copy_plans
        from nnunet_semiseg.runs import using_data
        from nnunet_semiseg.schema import check_name
        from nnunet_semiseg.settings.plans import given_settings, parse_assignments, refuse_foreign, update_settings
        from nnunet_semiseg.training import distributed
        from nnunet_semiseg.training_command import check_training, continued, run_of, words

        changes = parse_assignments(args.set)
        trainer = find_trainer(args.tr)
        refuse_foreign(trainer, changes)
        update_settings({}, changes, trainer)
        if args.copy:
            check_name("--as", args.copy)
        check_training(args, args.copy)
        if int(args.num_gpus or 1) > 1 and not distributed.is_one_of_several():
            return distributed.launch(int(args.num_gpus), args.words)
        args.num_gpus = None  # torchrun has started all processes
        distributed.join(args.device or "cuda")
        preprocessed = dataset_folder("nnUNet_preprocessed", args.dataset_name_or_id)
        run = run_of(args, args.copy or args.p)
        plans_file = preprocessed / f"{args.p}.json"
        if args.copy:
            if distributed.is_first():
                # interrupted before its first checkpoint, it has nothing to continue with --c
                keep = run.settings_file.exists() and not run.is_begun
                copy_plans(plans_file, args.copy, keep, run.is_begun)
            distributed.wait()
            plans_file, args.p = plans_file.with_name(f"{args.copy}.json"), args.copy
        check_plans_name(plans_file)
        sys.argv = words(args)
        try:
            # the trainer puts the settings into the plans when it begins
            data = using_data(preprocessed.name, args.configuration, args.tr, args.p)
            with continued(args, changes), given_settings(changes, args.accept_changes), data:
                run_training_entry()
            distributed.part()
            if distributed.is_first() and not args.tr.startswith(("nnUNetTrainer", "Supervised")):
                where = f"-d {args.dataset_name_or_id} -c {args.configuration} -f {args.fold} -p {args.p}"
                # a comparison of a model that trained on with one from the beginning would not be fair
                then = f"review {where} -tr {args.tr}"
                if not args.continue_from:
                    then = f"compare {where} --trainers SupervisedTrainer {args.tr} --run"
                say_next(f"nnunet_semiseg {then}{device_option(args.device)}")
        except (UserError, KeyboardInterrupt):
            if args.copy and distributed.is_first() and not (run.settings_file.exists() or run.is_begun):
                plans_file.unlink()
            raise


class Demo(Command):
    """Try it: two trainings on a small dataset, in minutes.

    It draws the images itself, and trains without and with unlabelled images. A CPU is enough.
    """

    name = "demo"
    examples = ("nnunet_semiseg demo", "nnunet_semiseg demo -o DEMO -device cuda")

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "-o",
            metavar="FOLDER",
            help="new or empty folder for all files of the demo; default: nnunet_semiseg_demo in the current folder",
        )
        add_device(parser, "cpu")

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.demo import run_demo

        run_demo(args.o, args.device)


COMMANDS = (Train(), Demo())
