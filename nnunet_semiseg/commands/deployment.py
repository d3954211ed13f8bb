"""Commands that make models for machines without this package: distill, share, export."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

from nnunet_semiseg.commands.command import Command, add_device, add_settings, say_next, trained_run
from nnunet_semiseg.options import ExecutorOptions, ModelOptions, add_options, option


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(ModelOptions):
    """The options that name a trained model."""

    trainer: str = option("-tr", metavar="TRAINER", help="trainer of the model")


@dataclass(frozen=True, kw_only=True)
class SharedOptions(ModelOptions):
    """The options that name a trained model. By default it is the model of `SemiSegTrainer`."""

    trainer: str = option("-tr", metavar="TRAINER", default="SemiSegTrainer", help="trainer of the model")


class Distill(Command):
    """Distil a trained model into nnU-Net's own network.

    The result is a model of nnU-Net's own trainer: machines without this package can use it.
    """

    name = "distill"
    examples = ("nnunet_semiseg distill -d 501 -c 3d_fullres -tr TextSemiSegTrainer",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, TrainedOptions)
        add_device(parser)
        add_settings(parser, "distill")
        add_options(parser, ExecutorOptions)

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.deployment import distillation
        from nnunet_semiseg.devices import device_option
        from nnunet_semiseg.evaluation.cluster import first_in_queue

        trained = trained_run(args)
        first_in_queue(args, trained.model_folder.parent / "distillation_logs")
        stock = distillation.distill(trained, args.set, args.device if args.executor == "local" else "cpu")
        print(stock)
        say_next(f"nnUNetv2_predict {_options(args, stock.name)} -i IMAGES -o PREDICTIONS{device_option(args.device)}")


class Share(Command):
    """Write a model as a stock model of nnU-Net.

    Its network must be nnU-Net's own. Machines without this package can use the result.
    """

    name = "share"
    examples = ("nnunet_semiseg share -d 501 -c 3d_fullres -tr SemiSegTrainer",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, SharedOptions)

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.deployment import sharing
        from nnunet_semiseg.devices import device_option

        stock = sharing.share(trained_run(args))
        model = _options(args, stock.name)
        print(stock)
        say_next(f"nnUNetv2_predict {model} -i IMAGES -o PREDICTIONS{device_option()}")
        say_next(f"nnUNetv2_export_model_to_zip {model} -o FILE")


class Export(Command):
    """Write the network of a model as an ONNX file.

    The command compares the file with the model. Models of nnU-Net's own trainers can be exported, too.
    """

    name = "export"
    examples = ("nnunet_semiseg export -d 501 -c 3d_fullres -tr CPSTrainer --onnx cps.onnx",)

    def add_arguments(self, parser: ArgumentParser) -> None:
        add_options(parser, TrainedOptions)
        parser.add_argument("--onnx", required=True, metavar="FILE", help="the ONNX file to write")
        parser.add_argument(
            "--time", action="store_true",
            help="show how long a patch takes in torch and in ONNX Runtime, with each provider that is installed",
        )  # fmt: skip

    def run(self, args: Namespace) -> None:
        from nnunet_semiseg.deployment.onnx_export import export_onnx
        from nnunet_semiseg.deployment.runtimes import time_runtimes

        trained = trained_run(args)
        difference = export_onnx(trained, args.onnx)
        print(f"{args.onnx}: differs from torch by at most {difference:.1e} of the largest logit")
        times = time_runtimes(trained, args.onnx) if args.time else {}
        for runtime, seconds in times.items():
            print(f"{runtime}: {1000 * seconds:.1f} ms a patch")


def _options(args: Namespace, model: str) -> str:
    """The options with which nnU-Net finds the model in a folder TRAINER__PLANS__CONFIGURATION."""
    return f"-d {args.dataset} -c {args.configuration} -f {args.fold} -p {model.split('__')[1]}"


COMMANDS = (Distill(), Share(), Export())
