"""The commands `review` and `accept`: their arguments, and what they run. What takes long is imported when it runs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace

from nnunet_semiseg.errors import UserError

PURPOSES = ("correction", "labelling", "random")
ESTIMATES = ("agreement", "expected", "certainty")
ENSEMBLES = ("auto", "folds", "seeds", "mirroring", "teacher", "snapshots", "single")


def add_review_arguments(parser: ArgumentParser) -> None:
    """Those of `review` beside data set, configuration, fold and plans."""
    parser.add_argument("-tr", metavar="TRAINER", help="of the model; default: what is trained")
    parser.add_argument("-n", type=int, default=20, metavar="N", help="cases on the list; default: %(default)s")
    parser.add_argument(
        "--for", dest="purpose", choices=PURPOSES, default="correction",
        help="correction: likely wrong; labelling: uncertain, and unlike each other and the labelled ones; random: a"
        " baseline; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--ensemble", choices=ENSEMBLES, default="auto",
        help="whose agreement is measured; default: the first of these that there is",
    )  # fmt: skip
    parser.add_argument(
        "--estimate", choices=ESTIMATES,
        help="what cases are ranked by; default: agreement, and expected where there is one member",
    )  # fmt: skip
    parser.add_argument("--num_parts", type=int, default=1, metavar="N", help="commands that share the work")
    parser.add_argument("--part_id", type=int, default=0, metavar="K", help="which of them this is, from 0 on")
    parser.add_argument("--no_pbar", action="store_true", help="no progress bar")
    parser.add_argument("-o", metavar="FOLDER", help="default: review/MODEL below the dataset's results")


def run_review(args: Namespace) -> None:
    """Predict, estimate, write the page; then say where it is and what comes next."""
    from nnunet_semiseg.evaluation.cluster import first_in_queue
    from nnunet_semiseg.review.request import make_request
    from nnunet_semiseg.review.review import review

    request = make_request(args)
    first_in_queue(args, request.output / "logs", request.parts)
    if args.executor != "local":
        request = replace(request, part=0, parts=1)
    page = review(request)
    if page is None:
        print(f"{request.output}: other parts are at work: the last one writes the page")
        return
    print(page)
    print(f"next: correct masks, put them into a folder, then nnunet_semiseg accept -d {args.d} -i FOLDER")


def add_accept_arguments(parser: ArgumentParser) -> None:
    """Those of `accept`."""
    parser.add_argument("-d", required=True, metavar="ID", help="dataset number or name")
    parser.add_argument("-i", metavar="FOLDER", help="labels, named like their cases: CASE.nii.gz")
    parser.add_argument("--all-of", metavar="REVIEW", help="take all masks of this review's folder, too, as they are")
    parser.add_argument("--undo", action="store_true", help="take back what was accepted last")
    parser.add_argument("--no_pbar", action="store_true", help="no progress bar")


def run_accept(args: Namespace) -> None:
    """Accept or take back, and say what was done."""
    from nnunet_semiseg.review.accept import accept, undo

    if args.undo:
        if args.i or args.all_of:
            raise UserError("--undo: takes back what was accepted last: leave out -i and --all-of")
        cases = undo(args.d)
        print(f"unlabelled again: {', '.join(cases)}")
        return
    labels = accept(args.d, args.i, args.all_of, not args.no_pbar)
    for label in labels:
        print(f"{label.case}: {label.origin}")
    if labels:
        print(f"{len(labels)} cases are labelled now; to take that back: nnunet_semiseg accept -d {args.d} --undo")
        print("next: nnunet_semiseg train DATASET CONFIGURATION FOLD -tr TRAINER --continue_from MODEL --as NAME")
