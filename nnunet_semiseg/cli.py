"""The command ``nnunet_semiseg``: each subcommand is one function, which returns what is to be run.

What takes long to import is imported in there, so that help is quick.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import sys
import time
from argparse import REMAINDER, SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence

from nnunet_semiseg.errors import UserError, report

CONFIGURATIONS = ["2d", "3d_fullres", "3d_lowres"]
PLANS = "nnUNetPlans"  # nnU-Net's own, and its default
DEFAULT_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's

Command = Callable[[Namespace], None]


def plan_and_preprocess(parser: ArgumentParser) -> Command:
    """Fingerprint, plans and preprocessing of labelled and unlabelled cases."""
    parser.add_argument("-d", type=_dataset_id, nargs="+", required=True, metavar="ID", help="dataset numbers")
    parser.add_argument(
        "-pl",
        default="ExperimentPlanner",
        metavar="PLANNER",
        help=f"default: %(default)s, nnU-Net's own, which makes {PLANS}",
    )
    parser.add_argument("-gpu_memory_target", type=_positive, metavar="GB", help="default: the planner's own")
    parser.add_argument(
        "-overwrite_target_spacing",
        type=_positive,
        nargs=3,
        metavar="MM",
        help="of 3d_fullres; z y x, as in nnU-Net",
    )
    parser.add_argument("-overwrite_plans_name", metavar="NAME", help="default: the planner's own")
    parser.add_argument(
        "-npfp", type=_at_least(1), default=_cores(8), metavar="N", help="processes for the fingerprint"
    )
    parser.add_argument("--verify_dataset_integrity", action="store_true", help="recommended, once a dataset")
    parser.add_argument("--no_pp", action="store_true", help="end with the plans")
    parser.add_argument("--labeled_only", action="store_true", help="no imagesUn is needed: for the upper bound")
    _add_preprocessing_arguments(parser)
    _add_set_argument(parser)

    def run(args: Namespace) -> None:
        from nnunet_semiseg import planning

        planning.plan_and_preprocess(
            args.d,
            args.c,
            args.pl,
            num_processes=_num_processes(args),
            num_processes_fingerprint=args.npfp,
            gpu_memory_target=args.gpu_memory_target,
            overwrite_target_spacing=args.overwrite_target_spacing,
            overwrite_plans_name=args.overwrite_plans_name,
            verify_dataset_integrity=args.verify_dataset_integrity,
            clean=args.clean,
            preprocess=not args.no_pp,
            labeled_only=args.labeled_only,
            settings=args.set,
            show_progress_bar=not args.no_pbar,
            verbose=args.verbose,
        )
        if not args.no_pp:
            configuration = "3d_fullres" if "3d_fullres" in args.c else args.c[0]
            trainer = "SupervisedTrainer" if args.labeled_only else "SemiSegTrainer"
            plans = args.overwrite_plans_name or planning.plans_name_of(args.pl)
            _say_next(f"train {args.d[0]} {configuration} 0 -tr {trainer} -p {plans}")

    return run


def preprocess_unlabeled(parser: ArgumentParser) -> Command:
    """Preprocess imagesUn for plans that are there already, nnU-Net's own among them."""
    parser.add_argument("-d", type=_dataset_id, nargs="+", required=True, metavar="ID", help="dataset numbers")
    parser.add_argument("-plans_name", default=PLANS, metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "-num_parts", type=_at_least(1), default=1, metavar="N",
        help="divide the cases among N calls, on computers that share a disk; a last call without parts ends the work",
    )  # fmt: skip
    parser.add_argument("-part_id", type=_at_least(0), metavar="I", help="which of the parts: 0 to N - 1")
    _add_preprocessing_arguments(parser)

    def run(args: Namespace) -> None:
        if (args.part_id is None) != (args.num_parts == 1) or (args.part_id or 0) >= args.num_parts:
            raise UserError("-num_parts N and -part_id I: give both, with I from 0 to N - 1, or none of them")
        part = None if args.part_id is None else (args.part_id, args.num_parts)
        from nnunet_semiseg import planning
        from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled as preprocess
        from nnunet_semiseg.files import dataset_folder

        for dataset_id in args.d:
            dataset_folder("nnUNet_raw", dataset_id)
            planning.read_plans(dataset_folder("nnUNet_preprocessed", dataset_id), args.plans_name, "-plans_name")
        for dataset_id in args.d:
            preprocess(
                dataset_id,
                args.c,
                args.plans_name,
                _num_processes(args),
                args.clean,
                not args.no_pbar,
                args.verbose,
                part,
            )

    return run


def train(parser: ArgumentParser) -> Command:
    """What nnUNetv2_train does, and --set."""
    from nnunet_semiseg.training_command import add_continue_argument, add_training_arguments

    add_training_arguments(parser)
    add_continue_argument(parser)
    parser.add_argument(
        "--as",
        dest="copy",
        metavar="NAME",
        help="train with a copy of the plans, of this name: another experiment on the same preprocessed data",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="with --c: go on, though settings changed since it began",
    )
    _add_set_argument(parser)

    def run(args: Namespace) -> None:
        from nnunetv2.run.run_training import run_training_entry

        from nnunet_semiseg.discovery import find_trainer
        from nnunet_semiseg.files import dataset_folder
        from nnunet_semiseg.planning import check_plans_name, copy_plans
        from nnunet_semiseg.runs import Run, using_data
        from nnunet_semiseg.schema import check_name
        from nnunet_semiseg.settings.plans import given_settings, parse_assignments, refuse_foreign, update_settings
        from nnunet_semiseg.training import distributed
        from nnunet_semiseg.training_command import check_training, continued, words

        changes = parse_assignments(args.set)
        refuse_foreign(find_trainer(args.tr), changes)
        update_settings({}, changes)
        if args.copy:
            check_name("--as", args.copy)
        check_training(args, args.copy)
        if int(args.num_gpus or 1) > 1 and not distributed.is_one_of_several():
            return distributed.launch(int(args.num_gpus), args.words)
        args.num_gpus = None  # torchrun has started all processes
        distributed.join(args.device or "cuda")
        preprocessed = dataset_folder("nnUNet_preprocessed", args.dataset_name_or_id)
        results = dataset_folder("nnUNet_results", args.dataset_name_or_id)
        plans_file = preprocessed / f"{args.p}.json"
        if args.copy:
            if distributed.is_first():
                copy_plans(plans_file, args.copy)
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
                _say_next(f"compare {where} --trainers SupervisedTrainer {args.tr} --run")
        except UserError:
            if (
                args.copy
                and distributed.is_first()
                and not Run(results.name, args.configuration, args.fold, args.tr, args.p).settings_file.exists()
            ):
                plans_file.unlink()
            raise

    return run


def embed_prompts(parser: ArgumentParser) -> Command:
    """Write a dataset's prompt embeddings to a file, for training where there is no internet."""
    parser.add_argument("-d", type=_dataset_id, required=True, metavar="ID", help="dataset number")
    parser.add_argument("-o", required=True, metavar="FILE", help="FILE.safetensors")
    parser.add_argument("-model", default="ViT-B-32", help="of open_clip, or wordllama; default: %(default)s")
    parser.add_argument("-pretrained", default="openai", help="tag or file of weights; default: %(default)s")
    parser.add_argument("-cache_dir", help="where open_clip keeps its downloads")

    def run(args: Namespace) -> None:
        from nnunet_semiseg.files import dataset_folder
        from nnunet_semiseg.schema import read_dataset_json
        from nnunet_semiseg.text import prompt_learner

        raw = dataset_folder("nnUNet_raw", args.d)
        given = args.model, args.pretrained, args.cache_dir, args.o, str(raw / "dataset.json")
        if not prompt_learner.embed_prompts(read_dataset_json(raw), *given):
            print("The text encoder is UNTRAINED: prompts differ, but mean nothing to it.")

    return run


def convert(parser: ArgumentParser) -> Command:
    """Make a raw dataset with imagesUn of a public data set's download, or of your own folders."""
    parser.add_argument("--list", action="store_true", help="the data sets that are known")
    parser.add_argument("name", nargs="?", help="`nnunet_semiseg convert NAME -h` shows what it takes")
    parser.add_argument("rest", nargs=REMAINDER, help=SUPPRESS)

    def run(args: Namespace) -> None:
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
        own = ArgumentParser(f"nnunet_semiseg convert {args.name}", description=module.ABOUT.title, allow_abbrev=False)
        _add_conversion_arguments(own)
        getattr(module, "add_arguments", lambda parser: None)(own)
        given = vars(own.parse_args(args.rest))
        module.convert(given.pop("i"), given.pop("d"), **given)

    return run


def compare(parser: ArgumentParser) -> Command:
    """Compare trainers on one dataset: train what is missing, predict, evaluate, write a report."""
    _add_model_arguments(parser)
    _add_prediction_arguments(parser)
    parser.add_argument(
        "--trainers",
        nargs="+",
        default=["SupervisedTrainer", "SemiSegTrainer"],
        metavar="TRAINER",
        help="the first is the baseline; default: SupervisedTrainer SemiSegTrainer",
    )
    parser.add_argument("--run", action="store_true", dest="train", help="train what is missing, or go on with it")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each trainer; default: one, without a seed")
    parser.add_argument(
        "--labeled", type=_size, nargs="+", default=[], metavar="N", help="sizes of the labelled set: numbers, all"
    )
    parser.add_argument(
        "--curve", nargs="+", metavar="TRAINER", help="those trained at every size; default: all; others: at the first"
    )
    parser.add_argument("--upper-bound", metavar="ID", help="dataset with all labels, for the first trainer")
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[], metavar="SIGMA", help="on the normalised test images"
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[], metavar="N", help="one process on each")
    parser.add_argument(
        "--jobs",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="at a time, on a GPU or the CPU; default: %(default)s",
    )
    _add_executor_arguments(parser)
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="MM", help="of the NSD; default: %(default)s")
    parser.add_argument("-np", type=_at_least(0), default=_cores(8), metavar="N", help="processes for the evaluation")
    parser.add_argument(
        "-o", metavar="FOLDER", help="default: comparison/CONFIGURATION__fold_FOLD below the dataset's results"
    )

    def run(args: Namespace) -> None:
        from nnunet_semiseg.evaluation.compare import compare
        from nnunet_semiseg.evaluation.request import Request

        _check_plans(args)
        request = Request(
            dataset=args.d,
            configuration=args.c,
            fold=args.f,
            trainers=args.trainers,
            plans=args.p,
            seeds=args.seeds,
            labeled=args.labeled,
            curve=args.curve,
            upper_bound=args.upper_bound,
            noise=args.noise,
            device=args.device,
            gpus=args.gpus,
            jobs=args.jobs,
            executor=args.executor,
            slurm=args.slurm,
            mirroring=not args.disable_tta,
            tolerance=args.tolerance,
            num_processes=args.np,
        )
        print(compare(request, args.o, args.train))
        where = f"-d {args.d} -c {args.c} -f {args.f} -p {args.p} -tr {args.trainers[-1]}"
        print(f"next: nnUNetv2_predict {where} -i IMAGES -o PREDICTIONS")

    return run


def text_effect(parser: ArgumentParser) -> Command:
    """What a trained model's predictions owe to its text: true, shuffled, noise and empty prompts."""
    _add_model_arguments(parser)
    _add_prediction_arguments(parser)
    parser.add_argument("-tr", default="TextSemiSegTrainer", metavar="TRAINER", help="default: %(default)s")
    parser.add_argument("-o", metavar="FOLDER", help="default: text_effect/MODEL below the dataset's results")

    def run(args: Namespace) -> None:
        from nnunet_semiseg.evaluation import text_effect
        from nnunet_semiseg.evaluation.request import Request

        _check_plans(args)
        _trained_run(args)
        request = Request(
            dataset=args.d,
            configuration=args.c,
            fold=args.f,
            trainers=[args.tr],
            plans=args.p,
            device=args.device,
            mirroring=not args.disable_tta,
        )
        print(text_effect.text_effect(request, args.o))

    return run


def review(parser: ArgumentParser) -> Command:
    """Predict the unlabelled cases, estimate how good that is, and list those that are worth a look or a label."""
    from nnunet_semiseg.review.command import add_review_arguments, run_review

    _add_model_arguments(parser)
    _add_prediction_arguments(parser)
    add_review_arguments(parser)
    _add_executor_arguments(parser)
    return run_review


def accept(parser: ArgumentParser) -> Command:
    """Make labelled cases of unlabelled ones whose labels were drawn or corrected, and preprocess these alone."""
    from nnunet_semiseg.review.command import add_accept_arguments, run_accept

    add_accept_arguments(parser)
    return run_accept


def distill(parser: ArgumentParser) -> Command:
    """Teach a trained model to the plans' stock network, for machines without this package."""
    _add_model_arguments(parser)
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="of the model")
    _add_device_argument(parser)
    _add_set_argument(parser)
    _add_executor_arguments(parser)

    def run(args: Namespace) -> None:
        from nnunet_semiseg.deployment import distillation
        from nnunet_semiseg.evaluation.cluster import first_in_queue

        trained = _trained_run(args)
        first_in_queue(args, trained.model_folder.parent / "distillation_logs")
        stock = distillation.distill(trained, args.set, args.device if args.executor == "local" else "cpu")
        plans = stock.name.split("__")[1]
        print(f"{stock}\nnnUNetv2_predict -d {args.d} -c {args.c} -f {args.f} -p {plans} -i IMAGES -o PREDICTIONS")

    return run


def share(parser: ArgumentParser) -> Command:
    """Make a stock model of one whose network is nnU-Net's own, for machines without this package."""
    _add_model_arguments(parser)
    parser.add_argument("-tr", default="SemiSegTrainer", metavar="TRAINER", help="of the model; default: %(default)s")

    def run(args: Namespace) -> None:
        from nnunet_semiseg.deployment import sharing

        stock = sharing.share(_trained_run(args))
        model = f"-d {args.d} -c {args.c} -f {args.f} -p {stock.name.split('__')[1]}"
        print(
            f"{stock}\nnnUNetv2_predict {model} -i IMAGES -o PREDICTIONS\nnnUNetv2_export_model_to_zip {model} -o FILE"
        )

    return run


def export(parser: ArgumentParser) -> Command:
    """Write the network of a trained model as ONNX, checked against torch."""
    _add_model_arguments(parser)
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="of the model; nnU-Net's own, too")
    parser.add_argument("--onnx", required=True, metavar="FILE")

    def run(args: Namespace) -> None:
        from nnunet_semiseg.deployment.onnx_export import export_onnx

        difference = export_onnx(_trained_run(args), args.onnx)
        print(f"{args.onnx}: differs from torch by at most {difference:.1e} of the largest logit")

    return run


def pretrain_vlm(parser: ArgumentParser) -> Command:
    """Vision-language pre-training on a dataset's images and texts (AMVLM); under torchrun on several GPUs."""
    parser.add_argument("-d", required=True, metavar="ID", help="dataset number or name, with texts.json")
    parser.add_argument("-c", default="2d", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-p", default=PLANS, metavar="PLANS", help="default: %(default)s")
    parser.add_argument(
        "--model", metavar="MODEL",
        help="hf-hub:OWNER/NAME, NAME:TAG of open_clip's, a folder, or timm:NAME, an image network of timm's with the"
        " words of WordLlama; with :none at its end untrained; default: BiomedCLIP",
    )  # fmt: skip
    parser.add_argument("-o", metavar="FOLDER", help="default: vlm/CONFIGURATION below the dataset's results")
    _add_device_argument(parser)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the training")

    def run(args: Namespace) -> None:
        from nnunet_semiseg.training.distributed import is_first
        from nnunet_semiseg.vlm import pretraining

        _check_plans(args)
        model = args.model or pretraining.DEFAULT_MODEL
        chosen = {"configuration": args.c, "plans": args.p, "device": args.device}
        output = pretraining.pretrain(args.d, model, args.o, args.set, **chosen)
        if is_first():
            print(output)
            print(pretraining.what_it_saw(output))

    return run


def text_masks(parser: ArgumentParser) -> Command:
    """Draw what a trained AMVLM takes its texts to mean, and say how well its masks find the labels."""
    _add_model_arguments(parser, "2d")
    parser.add_argument("-tr", default="AMVLMTrainer", metavar="TRAINER", help="default: %(default)s")
    parser.add_argument("-o", required=True, metavar="FOLDER")
    parser.add_argument("-n", type=_at_least(1), default=20, metavar="N", help="cases; default: %(default)s")

    def run(args: Namespace) -> None:
        from nnunet_semiseg.vlm.text_mask_pictures import how_well_labels_are_found, load_text_masks, write_text_masks

        trained = load_text_masks(_trained_run(args))
        print(f"{args.o}: {len(write_text_masks(trained, args.o, args.n))} pictures")
        found = how_well_labels_are_found(trained, args.n)
        areas = ", ".join(f"{area:.3f} {name}" for name, area in found.items())
        print(f"the labels' pixels above others (ROC AUC; 0.5 is chance): {areas or 'no labelled case has a text'}")

    return run


def add_masks(parser: ArgumentParser) -> Command:
    """Add masks that another model made of the images, and measure each class on the labelled cases."""
    parser.add_argument("-d", type=_dataset_id, required=True, metavar="ID", help="dataset number")
    parser.add_argument("--name", required=True, metavar="NAME", help="of the other model, for example voxtell")
    parser.add_argument(
        "-i", required=True, metavar="FOLDER", help="its masks, a label file for each case: CASE.nii.gz"
    )
    parser.add_argument(
        "--map", nargs="+", action="extend", default=[], metavar="VALUE=CLASS",
        help="what values mean, for example 5=liver; others are background; default: as dataset.json says",
    )  # fmt: skip
    parser.add_argument(
        "-np", type=_at_least(0), default=_cores(4), metavar="N", help="processes; default: %(default)s"
    )

    def run(args: Namespace) -> None:
        from nnunet_semiseg.data import external_masks

        result = external_masks.add_masks(args.d, args.name, args.i, args.map, args.np)
        print(external_masks.table(result))
        print(f"Dice below {external_masks.LEAST_DICE} gives the weight 0.")

    return run


def demo(parser: ArgumentParser) -> Command:
    """Make a small data set, train with and without its unlabelled images, compare: minutes on a CPU."""
    parser.add_argument("-o", metavar="FOLDER", help="where to keep everything; default: nnunet_semiseg_demo")
    parser.add_argument("-device", default="cpu", choices=["cpu", "cuda"], help="default: %(default)s")

    def run(args: Namespace) -> None:
        from nnunet_semiseg.demo import run_demo

        run_demo(args.o, args.device)

    return run


def env(parser: ArgumentParser) -> Command:
    """Print the line that shows nnU-Net our trainers, for those who would rather set it than have it set."""

    def run(args: Namespace) -> None:
        from nnunet_semiseg.discovery import export_line

        print(export_line())

    return run


def list_trainers(parser: ArgumentParser) -> Command:
    """Show all trainers of this package, each with its method."""
    from nnunet_semiseg.commands.show import run_list_trainers

    return run_list_trainers


def settings(parser: ArgumentParser) -> Command:
    """Show the settings of a trainer: name, default, type, meaning."""
    from nnunet_semiseg.commands.show import add_settings_arguments, run_settings

    add_settings_arguments(parser)
    return run_settings


COMMANDS = (
    list_trainers, settings,
    convert, plan_and_preprocess, preprocess_unlabeled, train, compare, text_effect, review, accept, distill, share,
    export, pretrain_vlm, text_masks, embed_prompts, add_masks, demo, env,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. What the user can fix comes as `error: ` lines on stderr and exit status 1."""
    parser = ArgumentParser("nnunet_semiseg", description="Semi-supervised training with nnU-Net v2.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.__name__, help=command.__doc__, description=command.__doc__, allow_abbrev=False
        )
        subparser.set_defaults(run=command(subparser))
    words = _with_folder(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words, Namespace(words=words))
    try:
        args.run(args)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks, and has this one ended
            time.sleep(5)
        report(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _say_next(words: str) -> None:
    print(f"next: nnunet_semiseg {words}")


def _with_folder(words: Sequence[str]) -> list[str]:
    """`convert -i FOLDER ...` is meant as `convert folder -i FOLDER ...`."""
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


def _add_preprocessing_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        nargs="+",
        default=CONFIGURATIONS,
        metavar="CONFIGURATION",
        help=f"default: {' '.join(CONFIGURATIONS)}",
    )
    parser.add_argument(
        "-np", type=_at_least(0), nargs="+", metavar="N", help="processes, or one number for each of -c"
    )
    parser.add_argument("--clean", action="store_true", help="redo what is there already")
    parser.add_argument("--no_pbar", action="store_true", help="no progress bar")
    parser.add_argument("--verbose", action="store_true")


def _add_model_arguments(parser: ArgumentParser, configuration: str | None = None) -> None:
    parser.add_argument("-d", required=True, metavar="ID", help="dataset number or name")
    parser.add_argument("-c", required=configuration is None, default=configuration, metavar="CONFIGURATION")
    parser.add_argument("-f", default="0", metavar="FOLD", help="number, or all; default: %(default)s")
    parser.add_argument("-p", default=PLANS, metavar="PLANS", help="default: %(default)s")


def _check_plans(args: Namespace) -> None:
    """Raises UserError where the dataset has no such plans, with the names of those it has."""
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.planning import read_plans

    read_plans(dataset_folder("nnUNet_preprocessed", args.d), args.p)


def _trained_run(args: Namespace):
    """Raises UserError where the trainer does not exist, or its only models are those of other plans."""
    from nnunet_semiseg.discovery import find_trainer
    from nnunet_semiseg.files import dataset_folder
    from nnunet_semiseg.runs import Run

    find_trainer(args.tr)
    results = dataset_folder("nnUNet_results", args.d)
    run = Run(results.name, args.c, args.f, args.tr, args.p)
    before, after = f"{args.tr}__", f"__{args.c}"
    others = [f.name.removeprefix(before).removesuffix(after) for f in sorted(results.glob(f"{before}*{after}"))]
    if others and not run.model_folder.is_dir():
        names = f"there {'are models' if len(others) > 1 else 'is one'} with {', '.join(others)}"
        raise UserError(f"{run.model_folder}: no such model; {names}: choose with -p")
    return run


def _add_prediction_arguments(parser: ArgumentParser) -> None:
    _add_device_argument(parser)
    parser.add_argument("--disable_tta", action="store_true", help="predict without mirroring")


def _add_device_argument(parser: ArgumentParser) -> None:
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"], help="default: %(default)s")


def _add_executor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--executor", choices=["local", "slurm"], default="local", help="slurm: jobs of its queue")
    parser.add_argument(
        "--slurm", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="of each job: partition=gpu hours=12 gpus=1, or any other option of sbatch",
    )  # fmt: skip


def _add_conversion_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("-i", required=True, metavar="DOWNLOAD", help="folder, or archive (zip, tar)")
    parser.add_argument("-d", type=_dataset_id, required=True, metavar="ID", help="dataset number")
    parser.add_argument(
        "--labeled", type=_labeled, metavar="N", help="number, fraction or all; default: what is published"
    )
    parser.add_argument(
        "--protocol", choices=["published", "all"], default="published",
        help="keep to the published lists, or train on every case; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--crop", choices=["none", "published"], default="none",
        help="published: round the ground truth, of test cases too; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "-np", type=_at_least(0), default=_cores(8), dest="num_processes", metavar="N", help="processes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of this number and name")
    parser.add_argument(
        "--max-size", type=_positive, metavar="GB", help="that an archive may unpack to; default: 100 times its size"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--no_pbar", action="store_false", dest="show_progress_bar", help="no progress bar")


def _labeled(text: str) -> int | float | str:
    """Raises ArgumentTypeError for what is none of these."""
    if text == "all":
        return text
    try:
        number = int(text) if text.isdecimal() else float(text)
    except ValueError:
        number = 0
    if not (number >= 1 if isinstance(number, int) else 0 < number <= 1):
        raise ArgumentTypeError(f"{text}: give a number of cases, a fraction between 0 and 1, or all")
    return number


def _at_least(minimum: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ArgumentTypeError(f"{text}: give a whole number, {minimum} or more")
        return int(text)

    return convert


def _positive(text: str) -> float:
    """Raises ArgumentTypeError for what is no finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ArgumentTypeError(f"{text}: give a number above 0")


def _dataset_id(text: str) -> int:
    """Raises ArgumentTypeError for a number that nnU-Net cannot tell from others: it reads three digits."""
    if text.isdecimal() and 1 <= int(text) <= 999:
        return int(text)
    raise ArgumentTypeError(f"{text}: give a number from 1 to 999")


def _size(text: str) -> int | None:
    """Raises ArgumentTypeError for what is neither."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text}: give whole numbers, or all") from None


def _add_set_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings, kept in the plans for every trainer that uses them; for example num_epochs=100",
    )


def _num_processes(args: Namespace) -> list[int]:
    return args.np or [_cores(DEFAULT_PROCESSES.get(c, 4)) for c in args.c]


def _cores(at_most: int) -> int:
    return min(at_most, os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
