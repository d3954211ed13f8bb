"""Commands about texts: embed_prompts, pretrain_vlm, text_masks."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

from nnunet_semiseg.commands.command import Command, add_device, add_settings, check_plans, trained_run
from nnunet_semiseg.options import PLANS, ModelOptions, add_options, at_least, dataset_id, option

EMBED_OPTIONS = {"model": "-model ", "pretrained": "-pretrained ", "cache_dir": "-cache_dir "}
"""How messages about the text encoder name the options of `embed_prompts`."""


class EmbedPrompts(Command):
    """Write the embeddings of prompts, for use offline.

    On a machine without internet, train with --set text_embeddings=FILE.
    """

    name = "embed_prompts"
    examples = ("nnunet_semiseg embed_prompts -d 501 -o prompts.safetensors",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("-d", type=dataset_id, required=True, metavar="ID", help="number of the dataset")
        parser.add_argument("-o", required=True, metavar="FILE", help="the file to write, such as prompts.safetensors")
        parser.add_argument(
            "-model", default="ViT-B-32", help="text encoder: a model of open_clip, or wordllama; default: %(default)s"
        )
        parser.add_argument(
            "-pretrained",
            default="openai",
            help="weights of the text encoder: a tag of open_clip, a file, or none (random); default: %(default)s",
        )
        parser.add_argument("-cache_dir", help="folder for what open_clip downloads; default: open_clip's own folder")

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.files import dataset_folder
        from nnunet_semiseg.schema import read_dataset_json
        from nnunet_semiseg.text import prompt_learner

        raw = dataset_folder("nnUNet_raw", args.d)
        given = args.model, args.pretrained, args.cache_dir, args.o, str(raw / "dataset.json"), EMBED_OPTIONS
        if not prompt_learner.embed_prompts(read_dataset_json(raw), *given):
            print("The text encoder is UNTRAINED: prompts differ, but mean nothing to it.")


class PretrainVLM(Command):
    """Pre-train on images and their texts, for AMVLMTrainer.

    The dataset needs texts.json. On several GPUs, start it with torchrun.
    """

    name = "pretrain_vlm"
    examples = (
        "nnunet_semiseg pretrain_vlm -d 520 -c 2d --set num_epochs=30 fold=0",
        "torchrun --nproc_per_node=4 -m nnunet_semiseg.cli pretrain_vlm -d 520",
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("-d", required=True, metavar="ID", help="number or name of the dataset")
        parser.add_argument("-c", default="2d", metavar="CONFIG", help="nnU-Net's configuration; default: %(default)s")
        parser.add_argument("-p", default=PLANS, metavar="PLANS", help="name of the plans; default: %(default)s")
        parser.add_argument(
            "--model", metavar="MODEL",
            help="the model to start from: hf-hub:OWNER/NAME, NAME:TAG of open_clip, a folder of open_clip's, or"
            " timm:NAME (an image network of timm; WordLlama reads the texts); add :none for random weights; default:"
            " BiomedCLIP",
        )  # fmt: skip
        parser.add_argument(
            "-o", metavar="FOLDER", help="folder to write; default: vlm/CONFIGURATION in the dataset's results"
        )
        add_device(parser)
        add_settings(parser, "pretrain_vlm")

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.training.distributed import is_first
        from nnunet_semiseg.vlm import pretraining

        check_plans(args.d, args.p)
        model = args.model or pretraining.DEFAULT_MODEL
        chosen = {"configuration": args.c, "plans": args.p, "device": args.device}
        output = pretraining.pretrain(args.d, model, args.o, args.set, **chosen)
        if is_first():
            print(output)
            print(pretraining.what_it_saw(output))


@dataclass(frozen=True, kw_only=True)
class TextModelOptions(ModelOptions):
    """The options that name a model of `AMVLMTrainer`. The default configuration is 2d."""

    configuration: str = option("-c", metavar="CONFIG", default="2d", help="nnU-Net's configuration")
    trainer: str = option("-tr", metavar="TRAINER", default="AMVLMTrainer", help="trainer of the model")


class TextMasks(Command):
    """Draw the image regions that match the texts.

    A model of AMVLMTrainer finds them. The command also prints how well they match the labels of the labelled cases
    (area under the ROC curve).
    """

    name = "text_masks"
    examples = ("nnunet_semiseg text_masks -d 520 -o masks",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, TextModelOptions)
        parser.add_argument("-o", required=True, metavar="FOLDER", help="folder for the pictures")
        parser.add_argument(
            "-n",
            type=at_least(1),
            default=20,
            metavar="N",
            help="number of unlabelled cases to draw, and of labelled cases to measure; default: %(default)s",
        )

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.vlm.text_mask_pictures import how_well_labels_are_found, load_text_masks, write_text_masks

        trained = load_text_masks(trained_run(args))
        print(f"{args.o}: {len(write_text_masks(trained, args.o, args.n))} pictures")
        found = how_well_labels_are_found(trained, args.n)
        areas = ", ".join(f"{area:.3f} {name}" for name, area in found.items())
        print(f"ROC AUC of the masks against the labels (0.5 is chance): {areas or 'no labelled case has a text'}")


COMMANDS = (EmbedPrompts(), PretrainVLM(), TextMasks())
