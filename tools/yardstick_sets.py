"""The data sets of tools/yardstick.py, and how they are prepared: raw data, plans, preprocessed data."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLANS = "nnUNetSemiSegSmallPlans"  # of SemiSegPlannerSmall: width 16 to 128
BASELINE, ALL = "SupervisedTrainer", "all"
ITERATIONS_PER_EPOCH = 100


@dataclass(frozen=True)
class RealSet:
    """A data set and how it is trained.

    Attributes:
        number: the first digit of its dataset ids. The other digits are the number of labels, or 99 for `all`.
        few, some: the numbers of labels that `few` and `some` stand for in --labels.
        channel: the name of the channel. nnU-Net chooses the normalisation by it.
        spacing: the spacing of `3d_fullres`, in mm. None: that of the data.
        iterations: the iterations of a training, unless --iterations gives another number.
        source: the set whose folder has the cases, if it is not this one.
        shuffled: whether each case has the text of another case.
        unlabelled: the number of unlabelled cases. None: all.
        foreign: a set whose images take the place of half of the unlabelled cases.
    """

    number: int
    few: int
    some: int
    labels: tuple[str, ...]
    channel: str
    configuration: str
    patch: tuple[int, ...]
    batch: int
    spacing: float | None = None
    ending: str = ".nii.gz"
    iterations: int = 2000
    source: str | None = None
    shuffled: bool = False
    unlabelled: int | None = None
    foreign: str | None = None

    def count(self, labels: str) -> str:
        """Convert `few`, `some`, `all` or a number to a number or `all`."""
        return str(getattr(self, labels)) if labels in ("few", "some") else labels

    @property
    def label_map(self) -> dict[str, int]:
        return {name: value for value, name in enumerate(("background", *self.labels))}


SETS = {
    "hippocampus": RealSet(8, 4, 8, ("anterior", "posterior"), "MRI", "3d_fullres", (24, 40, 24), 2, 1.5),
    "acdc_small": RealSet(
        7, 6, 14, ("right ventricle", "myocardium", "left ventricle"), "MRI", "2d", (128, 128), 12
    ),
    "la_small": RealSet(6, 4, 8, ("left atrium",), "MRI", "3d_fullres", (24, 40, 48), 2, 2.5),
    "busi_small": RealSet(9, 24, 24, ("tumour",), "ultrasound", "2d", (128, 128), 12, ending=".png"),
}  # fmt: skip
SETS |= {
    "busi_shuffled": replace(SETS["busi_small"], number=5, source="busi_small", shuffled=True),
    "la_foreign": replace(SETS["la_small"], number=4, source="la_small", foreign="acdc_small"),
    "acdc_10": replace(SETS["acdc_small"], number=3, source="acdc_small", unlabelled=10),
    "acdc_30": replace(SETS["acdc_small"], number=2, source="acdc_small", unlabelled=30),
}


# ------------------------------------------------------------------------------------------------------- preparation


def dataset_name(name: str, labels: str) -> str:
    digits = "99" if labels == ALL else f"{int(labels):02d}"
    return f"Dataset{SETS[name].number}{digits}_{name}_{labels}"


def shuffle(texts: dict[str, str]) -> dict[str, str]:
    """Give each case the text of another case, the same one every time."""
    cases = sorted(texts)
    random.Random(0).shuffle(cases)
    return {case: texts[other] for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)}


def split(folder: Path) -> tuple[list[str], list[str]]:
    """The cases for training and for `dev_test` of a folder with `protocol.json`."""
    protocol = json.loads((folder / "protocol.json").read_bytes())
    listed = protocol.get("train") or [*protocol["labelled"], *protocol["unlabelled"]]
    return [case for case in listed if case not in protocol["dev_test"]], protocol["dev_test"]


def make_raw(data: Path, raw: Path, name: str, labels: str) -> None:
    """Copy one set into nnU-Net's layout: the first labelled cases, the other images, and `dev_test`.

    Args:
        data: the folder with a folder for each set: `images`, `labels` and `protocol.json`.
        raw: the folder to make.
        labels: the number of training cases that keep their label, or `all`.
    """
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    about = SETS[name]
    source = data / (about.source or name)
    training, test = split(source)
    labelled = training if labels == ALL else training[: int(labels)]
    unlabelled = [case for case in training if case not in labelled][: about.unlabelled]
    others = split(data / about.foreign)[0][: len(unlabelled) // 2] if about.foreign else []
    unlabelled = unlabelled[: len(unlabelled) - len(others)]
    parts = {"Tr": labelled, "Un": unlabelled, "Ts": test}
    missing = [c for c in (*labelled, *test) if not (source / "labels" / f"{c}{about.ending}").is_file()]
    if missing:
        sys.exit(f"error: {source / 'labels'}: has no {missing[0]}{about.ending}: choose fewer --labels")

    shutil.rmtree(raw, ignore_errors=True)  # what is left of an interrupted beginning
    for part, cases in parts.items():
        kinds = {"images": f"_0000{about.ending}"} | ({} if part == "Un" else {"labels": about.ending})
        for kind, ending in kinds.items():
            (raw / f"{kind}{part}").mkdir(parents=True)
            for case in cases:
                shutil.copyfile(source / kind / f"{case}{ending}", raw / f"{kind}{part}" / f"{case}{ending}")
    for case in others:
        file = f"{case}_0000{about.ending}"
        shutil.copyfile(data / str(about.foreign) / "images" / file, raw / "imagesUn" / file)
    if (source / "texts.json").exists():
        texts = json.loads((source / "texts.json").read_bytes())
        texts = {case: texts[case] for case in training if case in texts}
        (raw / "texts.json").write_text(json.dumps(shuffle(texts) if about.shuffled else texts))
    generate_dataset_json(str(raw), {0: about.channel}, about.label_map, len(labelled), about.ending)


def fit_plans(plans: dict, about: RealSet) -> dict:
    """The plans with the patch size and batch size of the set. The network has as many stages as the patch allows."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    configuration = plans["configurations"][about.configuration]
    _, strides, kernels, patch, _ = get_pool_and_conv_props(configuration["spacing"], about.patch, 4, 999999)
    if tuple(patch) != about.patch:
        sys.exit(f"error: a patch of {about.patch} does not fit a network: {tuple(map(int, patch))} would")
    n = len(strides)
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=n,
        features_per_stage=[min(128, 16 * 2**i) for i in range(n)],
        strides=strides,
        kernel_sizes=kernels,
        n_conv_per_stage=[2] * n,
        n_conv_per_stage_decoder=[2] * (n - 1),
    )
    configuration.update(patch_size=about.patch, batch_size=about.batch)
    return plans


def prepare(data: Path, work: Path, name: str, labels: str) -> None:
    """Make raw data, plans and preprocessed data of one set.

    All numbers of labels use the plans of `few`.
    """
    about, dataset = SETS[name], dataset_name(name, labels)
    few = dataset_name(name, str(about.few))
    preprocessed = work / "preprocessed" / dataset
    marker, made_with = preprocessed / "prepared.json", json.dumps(asdict(about))
    if marker.exists():
        if marker.read_text() != made_with:
            sys.exit(f"error: {preprocessed}: was made for other plans: choose another --work, or delete it")
        return
    if dataset != few:
        prepare(data, work, name, str(about.few))
    print(f"preparing {dataset}", flush=True)
    make_raw(data, work / "raw" / dataset, name, labels)
    number, log = dataset[7:10], work / "logs" / f"prepare_{dataset}.txt"
    one = ["-d", number, "-c", about.configuration, "-np", "1"]
    spacing = ["-overwrite_target_spacing", *[str(about.spacing)] * 3] if about.spacing else []
    no_unlabelled = ["--labeled_only"] if labels == ALL else []
    ours = ["-m", "nnunet_semiseg.cli"]
    planner = ["-pl", "SemiSegPlannerSmall", "--no_pp"]
    command(log, *ours, "plan_and_preprocess", *one, *planner, *spacing, *no_unlabelled)
    file = preprocessed / f"{PLANS}.json"
    if dataset == few:
        plans = fit_plans(json.loads(file.read_bytes()), about)
    else:
        plans = json.loads((work / "preprocessed" / few / file.name).read_bytes()) | {"dataset_name": dataset}
    file.write_text(json.dumps(plans, indent=4))
    entry = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import preprocess_entry as e; e()"
    command(log, "-c", entry, *one, "-plans_name", PLANS)
    if labels != ALL:
        command(log, *ours, "preprocess_unlabeled", *one, "-plans_name", PLANS, "--clean")
    marker.write_text(made_with)


def tower_config() -> dict:
    """The configuration of a text transformer of width 128 with 4 layers. Its image half is not used."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
    return {"model_cfg": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}


def command(log: Path, *words: str) -> None:
    """Run Python with these arguments. Its output goes to the log.

    If this process ends, a training or prediction ends, too (`end_with_parent`); other commands go on.

    Raises:
        RuntimeError: the command failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    with open(log, "ab") as printed:
        with subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        ) as process:
            process.wait()  # within: leaving the block closes stdin, and a process that watches it ends
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}; read its output in {log}")
