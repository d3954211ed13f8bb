"""Commands that evaluate trained models, or correct their predictions: compare, text_effect, review, accept."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace

from nnunet_semiseg.commands.command import Command, check_plans, say_next, trained_run
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.asked import EvaluationOptions, Request
from nnunet_semiseg.options import ModelOptions, PredictionOptions, add_options, from_args
from nnunet_semiseg.review.options import ReviewOptions


class Compare(Command):
    """Compare trainers, and write a report. --run trains them."""

    name = "compare"
    examples = (
        "nnunet_semiseg compare -d 501 -c 3d_fullres --run \\\n      --trainers SupervisedTrainer MeanTeacherTrainer",
        "nnunet_semiseg compare -d 501 -c 3d_fullres --run --seeds 3 --labeled 4 8 16 \\\n"
        "      --trainers SupervisedTrainer MeanTeacherTrainer",
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, Request)
        parser.add_argument(
            "--run",
            action="store_true",
            dest="train",
            help="first train the models that are missing, and continue interrupted trainings",
        )
        parser.add_argument(
            "-o", metavar="FOLDER",
            help="folder of the report; default: comparison/CONFIGURATION__fold_FOLD in the dataset's results",
        )  # fmt: skip

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.devices import device_option
        from nnunet_semiseg.evaluation.compare import compare
        from nnunet_semiseg.evaluation.request import make_runs

        check_plans(args.dataset, args.plans)
        request = from_args(Request, args)
        print(compare(request, args.o, args.train))
        run = next(r for r in make_runs(request)[0] if r.trainer == request.trainers[-1])
        where = f"-d {request.dataset} -c {request.configuration} -f {request.fold} -p {run.plans} -tr {run.trainer}"
        line = f"nnUNetv2_predict {where} -i IMAGES -o PREDICTIONS"
        say_next(line + device_option(request.device))


class TextEffect(Command):
    """Measure how much predictions depend on the text.

    It predicts the test set with the true, shuffled, random and empty prompts.
    """

    name = "text_effect"
    examples = ("nnunet_semiseg text_effect -d 501 -c 3d_fullres -tr TextSemiSegTrainer",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, ModelOptions)
        add_options(parser, PredictionOptions)
        add_options(parser, EvaluationOptions)
        parser.add_argument(
            "-tr", dest="trainer", default="TextSemiSegTrainer", metavar="TRAINER",
            help="trainer of the model; default: %(default)s",
        )  # fmt: skip
        parser.add_argument(
            "-o", metavar="FOLDER", help="folder of the report; default: text_effect/MODEL in the dataset's results"
        )

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.evaluation import text_effect

        check_plans(args.dataset, args.plans)
        trained_run(args)
        print(text_effect.text_effect(from_args(Request, args, trainers=[args.trainer]), args.o))


class Review(Command):
    """Find unlabelled cases that need a look or a label.

    It predicts all unlabelled cases, estimates how good each prediction is, and writes a page with pictures.
    """

    name = "review"
    examples = (
        "nnunet_semiseg review -d 501 -c 3d_fullres",
        "nnunet_semiseg review -d 501 -c 3d_fullres --for labelling -n 10",
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, ReviewOptions)

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.evaluation.cluster import first_in_queue
        from nnunet_semiseg.review.labels import MASKS
        from nnunet_semiseg.review.request import make_request
        from nnunet_semiseg.review.review import review

        request = make_request(from_args(ReviewOptions, args))
        first_in_queue(args, request.folder / "logs", request.parts)
        if request.executor != "local":
            request = replace(request, part=0, parts=1)
        page = review(request)
        if page is None:
            print(f"{request.folder}: other parts are at work: the last one writes review.html")
            return
        print(page)
        print(f"correct masks of {page.with_name(MASKS)}, and put them into a folder of their own")
        say_next(f"nnunet_semiseg accept -d {request.dataset} -i FOLDER")


class Accept(Command):
    """Turn unlabelled cases into labelled ones.

    Only these cases are preprocessed again.
    """

    name = "accept"
    examples = (
        "nnunet_semiseg accept -d 501 -i CORRECTED",
        "nnunet_semiseg accept -d 501 --undo",
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("-d", required=True, metavar="ID", help="number or name of the dataset")
        parser.add_argument(
            "-i", metavar="FOLDER",
            help="folder of the new labels: corrected masks, or labels that you drew. Name each file like its case,"
            " with the file ending of the dataset: CASE.nii.gz",
        )  # fmt: skip
        parser.add_argument(
            "--all-of",
            metavar="REVIEW",
            help="folder of a review: also accept the masks of all cases that are not in -i, as they are",
        )
        parser.add_argument("--undo", action="store_true", help="undo the last acceptance")
        parser.add_argument("--no_pbar", action="store_true", help="show no progress bar")

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.files import dataset_folder
        from nnunet_semiseg.review.accept import accept, undo
        from nnunet_semiseg.status import count, status

        if args.undo:
            if args.i or args.all_of:
                raise UserError("--undo: takes back what was accepted last: leave out -i and --all-of")
            print(f"unlabelled again: {', '.join(undo(args.d))}")
            return
        labels = accept(args.d, args.i, args.all_of, not args.no_pbar)
        for label in labels:
            print(f"{label.case}: {label.origin}")
        if labels:
            raw = dataset_folder("nnUNet_raw", args.d)
            if not count(raw).num_unlabeled:
                print(
                    f"no unlabelled case is left: only SupervisedTrainer and nnUNetTrainer can train now; for the other"
                    f" trainers, put further images without labels into {raw / 'imagesUn'} and run nnunet_semiseg"
                    f" preprocess_unlabeled"
                )
            print(f"newly labelled cases: {len(labels)}; to take that back: nnunet_semiseg accept -d {args.d} --undo")
            print(status(args.d)[-1])


COMMANDS = (Compare(), TextEffect(), Review(), Accept())
