"""Check the arguments of `nnUNetv2_train` before anything is made.

Our own command calls `check_training`. nnU-Net's command does not call it. But nnU-Net's command first asks for the
class of the trainer. If that is one of ours, its arguments are checked at that moment.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_semiseg.errors import UserError

if TYPE_CHECKING:
    from nnunet_semiseg.runs import Run

COMMAND = "nnUNetv2_train"
NAMES = {
    "dataset_name_or_id": ("ID", "number or name of the dataset"),
    "configuration": ("CONFIG", "nnU-Net's configuration, such as 2d or 3d_fullres"),
    "fold": ("FOLD", "number of the fold, or all to train on all cases"),
}
OPTIONS = {
    "-tr": ("nnUNetTrainer", "TRAINER", "trainer, see nnunet_semiseg list_trainers; default: %(default)s"),
    "-p": ("nnUNetPlans", "PLANS", "name of the plans; default: %(default)s"),
    "-pretrained_weights": (None, "FILE", "checkpoint of nnU-Net whose weights the training starts with"),
    "-num_gpus": (None, "N", "number of GPUs, or of processes with -device cpu; default: 1"),
    "-device": (None, "DEVICE", "where to compute: cuda, cpu or mps; default: cuda"),
}
"""The default, the metavar and the help text of each option."""
FLAGS = {
    "--npz": "also save the probabilities of the validation cases",
    "--c": "continue a training that was interrupted",
    "--val": "only run the validation, after a finished training",
    "--val_best": "validate with the best checkpoint in place of the last",
    "--disable_checkpointing": "save no checkpoint",
}


def add_training_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `nnUNetv2_train` to a parser."""
    for name, (metavar, text) in NAMES.items():
        parser.add_argument(name, metavar=metavar, help=text)
    for name, (default, metavar, text) in OPTIONS.items():
        parser.add_argument(name, default=default, metavar=metavar, help=text)
    for flag, text in FLAGS.items():
        parser.add_argument(flag, action="store_true", help=text)


def words(args: Namespace) -> list[str]:
    """The words of a command line of `nnUNetv2_train` with these arguments."""
    given = {key: getattr(args, key.lstrip("-")) for key in (*OPTIONS, *FLAGS)}
    line = [COMMAND, *(getattr(args, name) for name in NAMES)]
    line += [word for option in OPTIONS if given[option] for word in (option, given[option])]
    return line + [flag for flag in FLAGS if given[flag]]


def check_running_command() -> None:
    """Check the arguments if this process is `nnUNetv2_train`. The predictor and others ask for a trainer, too.

    Raises:
        UserError: see `check_training` and `check_plans_name`; or there are several processes, but not on GPUs.
    """
    if Path(sys.argv[0]).stem != COMMAND:
        return
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.planning import check_plans_name

    args = _running_arguments()
    check_training(args)
    if int(args.num_gpus or 1) > 1 and args.device not in (None, "cuda"):
        raise UserError(
            f"-num_gpus {args.num_gpus}: {COMMAND} starts several processes on GPUs only: use nnunet_semiseg train for"
            f" -device {args.device}"
        )
    check_plans_name(dataset_folder("nnUNet_preprocessed", args.dataset_name_or_id) / f"{args.p}.json")


def check_spelling(name: str) -> None:
    """Refuse the trainer of `nnUNetv2_train` if it is probably one of ours, misspelt.

    It is called when nnU-Net has found no such trainer in its own folder and in ours. nnU-Net then ends with a
    traceback that speaks of `nnUNet_extTrainer`. If other folders follow ours in this variable, the trainer
    may be there.

    Raises:
        UserError: no trainer has this name, but some of ours have a similar one.
    """
    from nnunet_semiseg.discovery import ext_folder, similar_trainers

    last = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)[-1]
    if Path(sys.argv[0]).stem != COMMAND or last != ext_folder() or _running_arguments().tr != name:
        return
    if near := similar_trainers(name):
        raise UserError(f"{name}: no such trainer: use {' or '.join(near)}, or one of nnU-Net's")


def _running_arguments() -> Namespace:
    parser = ArgumentParser(COMMAND)
    add_training_arguments(parser)
    return parser.parse_known_args(sys.argv[1:])[0]


def check_training(args: Namespace, plans_name: str | None = None) -> None:
    """Refuse arguments with which nnU-Net would end in a traceback or leave a useless training behind.

    Args:
        plans_name: the name of the plans in the name of the model, if it is not `args.p`.

    Raises:
        UserError: a fold, a device or a number of GPUs is wrong; the data set, plans or configuration does not exist or
            is damaged; weights are missing, damaged or can run code; two options exclude each other; the model of
            `--continue_from` does not fit; `--val` before a training is finished; or torchrun has restarted a training
            that would not continue.
    """
    import torch

    from nnunet_semiseg.devices import check_device
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.planning import planning_command, read_plans
    from nnunet_semiseg.runs import has_settings
    from nnunet_semiseg.schema import check_configuration, read_dataset_json
    from nnunet_semiseg.training import checkpoint as checkpoints

    preprocessed = dataset_folder("nnUNet_preprocessed", args.dataset_name_or_id)
    dataset_folder("nnUNet_results", args.dataset_name_or_id)
    plans = read_plans(preprocessed, args.p)
    fix = f"plan again with {planning_command(preprocessed.name, args.p)}"
    check_configuration(plans, args.configuration, preprocessed / f"{args.p}.json", fix)
    read_dataset_json(preprocessed)

    if not (args.fold == "all" or args.fold.isdecimal()):
        raise UserError(f"fold {args.fold}: give the number of a fold, 0 or more, or all")
    device = args.device or "cuda"
    check_device(device)
    gpus = args.num_gpus or "1"
    if not gpus.isdecimal() or int(gpus) < 1:
        raise UserError(f"-num_gpus {gpus}: give a whole number, 1 or more")
    if int(gpus) > 1 and device != "cuda" and not has_settings(args.tr):
        raise UserError(f"-num_gpus {gpus}: nnU-Net's own trainers need -device cuda for several processes")
    if int(gpus) > 1 and device == "cuda" and int(gpus) > (there := torch.cuda.device_count()):
        raise UserError(f"-num_gpus {gpus}: this machine has {there}: give {there} or less")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not (args.c or args.val):
        again = "a process died and torchrun has started all again: without --c the training would begin from scratch"
        raise UserError(f"{again}: give --c, also at the first start, so that a restart continues")
    if args.c and args.val:
        raise UserError("--c and --val: give one of them: --c continues a training, --val validates a finished one")
    if args.val_best and args.disable_checkpointing:
        raise UserError("--val_best and --disable_checkpointing: give one of them: --val_best needs the checkpoint")
    if args.pretrained_weights:
        if args.c:
            raise UserError("-pretrained_weights and --c: give one of them: weights are for the start of a training")
        here, all_ranks = (int(os.environ.get(f"{name}WORLD_SIZE", "1")) for name in ("LOCAL_", ""))
        if here != all_ranks or (device != "cuda" and max(int(gpus), all_ranks) > 1):
            raise UserError(
                "-pretrained_weights: with several processes, nnU-Net can load these weights only on the GPUs of one"
                " machine: use -device cuda and one machine"
            )
        fix = "give a checkpoint of nnU-Net's with -pretrained_weights"
        checkpoints.read(args.pretrained_weights, fix, mmap=True, keys=("network_weights",))
    if getattr(args, "continue_from", None):
        _check_continuation(args, plans, plans_name)
    run = run_of(args, plans_name or args.p)
    if args.val and not run.is_trained:
        raise UserError(f"{run.checkpoint}: no such file: --val needs a finished training: train without --val first")


def run_of(args: Namespace, plans_name: str) -> Run:
    """The training of these arguments, with the plans of this name. Raises UserError if there is no such dataset."""
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.runs import Run

    fold = str(int(args.fold)) if args.fold.isdecimal() else args.fold  # nnU-Net reads 00 as 0
    dataset = dataset_folder("nnUNet_results", args.dataset_name_or_id).name
    return Run(dataset, args.configuration, fold, args.tr, plans_name)


SHORTER = 4
"""A training that continues from a model has by default this many times fewer epochs."""


def add_continue_argument(parser: ArgumentParser) -> None:
    """Add the option `--continue_from`, which `nnUNetv2_train` does not have."""
    parser.add_argument(
        "--continue_from", metavar="MODEL",
        help="start with the weights of this model: its folder, the folder of its fold, or a checkpoint. The training"
        f" has 1/{SHORTER} of the model's epochs, unless --set num_epochs gives a number. Use it together with --as",
    )  # fmt: skip


def checkpoint_of(model: str, fold: str) -> Path:
    """Find the last checkpoint of a model. If there is none, return the absolute path of `model`.

    Args:
        model: the folder of the model, the folder of a fold, or the checkpoint itself.
    """
    path = Path(model).absolute()
    files = (folder / "checkpoint_final.pth" for folder in (path / f"fold_{fold}", path))
    return next(filter(Path.is_file, files), path)


@contextmanager
def continued(args: Namespace, changes: dict) -> Iterator[None]:
    """Give the model of `--continue_from` to the trainer, if the option is used, and shorten the training."""
    from nnunet_semiseg.training import checkpoint as checkpoints

    if not args.continue_from:
        yield
        return
    model = checkpoint_of(args.continue_from, args.fold)
    changes.setdefault("num_epochs", fewer_epochs(model))
    os.environ[checkpoints.CONTINUE_FROM] = str(model)
    try:
        yield
    finally:
        del os.environ[checkpoints.CONTINUE_FROM]


def fewer_epochs(model: Path) -> int:
    """The number of epochs of a training that continues from this checkpoint."""
    from nnunet_semiseg.settings.base import TrainingSettings
    from nnunet_semiseg.settings.plans import settings_of
    from nnunet_semiseg.training import checkpoint as checkpoints

    plans = checkpoints.read(model, "train this model again", mmap=True)["init_args"]["plans"]
    return max(1, settings_of(TrainingSettings, plans)["num_epochs"] // SHORTER)


def how_to_continue(args: Namespace) -> str:
    """What to type after a training was interrupted, in words."""
    if args.val or (args.copy and not _has_checkpoint(args)):
        return "run the same command again"
    if args.copy:  # the copy of the plans exists already, with the settings
        again = {"p": args.copy, "c": True, "pretrained_weights": None}  # nnU-Net refuses --c with these weights
        return f"continue with nnunet_semiseg train {shlex.join(words(Namespace(**{**vars(args), **again}))[1:])}"
    return "continue with the same command and --c"


def _has_checkpoint(args: Namespace) -> bool:
    """Whether the training with `--as` has saved a checkpoint."""
    with suppress(UserError):  # interrupted before the arguments were checked
        return run_of(args, args.copy).is_begun
    return False


def _check_continuation(args: Namespace, plans: dict, plans_name: str | None) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_semiseg.runs import has_settings
    from nnunet_semiseg.training import checkpoint as checkpoints

    for option in ("c", "val", "val_best", "pretrained_weights"):
        if getattr(args, option):
            dashes = "-" if option == "pretrained_weights" else "--"
            raise UserError(f"--continue_from and {dashes}{option}: give one of them")
    if not has_settings(args.tr):
        raise UserError(
            f"--continue_from: {args.tr} has no settings, so its training cannot be shortened: use SupervisedTrainer"
        )
    if plans_name is None:
        raise UserError("--continue_from: name the new model with --as NAME: it must not replace another one")
    model = checkpoint_of(args.continue_from, args.fold)
    if model.is_dir():
        raise UserError(f"{model}: has no checkpoint_final.pth of fold {args.fold}: give a trained model of this fold")
    content = checkpoints.read(model, "give a trained model with --continue_from", mmap=True)
    now = PlansManager(plans).get_configuration(args.configuration).configuration
    if _architecture(content["init_args"]) != now["architecture"]:
        fix = "give the plans and the configuration that it was trained with"
        raise UserError(f"{model}: its network is not that of {args.p}, {args.configuration}: {fix}")
    seen = content["init_args"].get("fold")
    if args.fold != "all" and str(seen) != str(int(args.fold)):  # else no score of the new model could be trusted
        raise UserError(
            f"{model}: was trained with fold {seen}, so it has seen validation cases of fold {args.fold}: continue from"
            f" a model of fold {args.fold}, or give the fold all"
        )


def _architecture(made_with: dict) -> dict | None:
    """The architecture of the network of a model, from the arguments of its trainer. None if they do not contain it."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        manager = PlansManager(made_with["plans"])
        return manager.get_configuration(made_with["configuration"]).configuration["architecture"]
    except (KeyError, TypeError, ValueError, AssertionError):  # from another version
        return None
