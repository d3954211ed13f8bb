import gc
import json
import shutil
from functools import partial
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from conftest import in_threads, write_image
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from training import make_trainer

from nnunet_semiseg.discovery import iter_classes
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import BusyError, only_one
from nnunet_semiseg.planning import SemiSegMemory, find_planner, plan_and_preprocess, read_plans
from nnunet_semiseg.planning_request import PlanningRequest
from nnunet_semiseg.trainers.mean_teacher import MeanTeacherTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.trainers.urpc import URPCTrainer

PLANNERS = {
    "SemiSegPlanner": ("nnUNetSemiSegPlans", 8),
    "SemiSegPlannerFast": ("nnUNetSemiSegFastPlans", 8),
    "SemiSegPlannerResEncM": ("nnUNetSemiSegResEncUNetMPlans", 8),
    "SemiSegPlannerResEncL": ("nnUNetSemiSegResEncUNetLPlans", 24),
    "SemiSegPlannerResEncXL": ("nnUNetSemiSegResEncUNetXLPlans", 40),
    "SemiSegPlannerSmall": ("nnUNetSemiSegSmallPlans", 8),
}
STOCK = {
    "SemiSegPlanner": "ExperimentPlanner",
    "SemiSegPlannerResEncM": "nnUNetPlannerResEncM",
    "SemiSegPlannerResEncL": "nnUNetPlannerResEncL",
    "SemiSegPlannerResEncXL": "nnUNetPlannerResEncXL",
}
"""planners that count the unlabelled images, and those they are otherwise equal to"""


def architecture(dim: int) -> tuple:
    stages = 6
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [min(32 * 2**i, 320 if dim == 3 else 512) for i in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[3] * dim] * stages,
        "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {},
        "dropout_op": None,
        "nonlin": "torch.nn.LeakyReLU",
    }
    return f"{PlainConvUNet.__module__}.PlainConvUNet", kwargs, ("conv_op", "norm_op", "dropout_op", "nonlin")


PATCHES = {3: (128, 128, 128), 2: (512, 512)}


def ratio(dim: int, **attributes) -> float:
    memory = type("Memory", (SemiSegMemory,), attributes)
    arguments = (PATCHES[dim], 1, 2, *architecture(dim))
    return memory.static_estimate_VRAM_usage(*arguments) / ExperimentPlanner.static_estimate_VRAM_usage(*arguments)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_estimate_counts_decoders_streams_and_the_teacher(dim):
    alone = partial(ratio, dim, num_mixed_streams=0, has_teacher=False)
    assert alone(num_streams=1, num_decoders=1) == 1
    assert alone(num_streams=1) == pytest.approx(1.61, rel=0.05)
    assert alone() == pytest.approx(3.21, rel=0.05)
    assert ratio(dim, has_teacher=False) == pytest.approx(5.21, rel=0.05)
    teacher = ratio(dim) - ratio(dim, has_teacher=False)
    assert 0.2 < teacher < 1  # a pass without gradients keeps less than one that is kept for backward


def test_the_teachers_share_is_what_is_alive_in_its_forward_pass():
    name, kwargs, to_import = architecture(2)
    kwargs |= {"n_stages": 3, "features_per_stage": [8, 16, 32], "strides": [[1, 1], [2, 2], [2, 2]]}
    kwargs |= {"kernel_sizes": [[3, 3]] * 3, "n_conv_per_stage": [2] * 3, "n_conv_per_stage_decoder": [2] * 2}
    kwargs |= {"nonlin_kwargs": {"inplace": True}}
    net = get_network_from_plans(name, kwargs, to_import, 1, 2)
    image = torch.rand(1, 1, 32, 32)
    alive = []

    def tensors() -> dict[int, int]:
        return {o.data_ptr(): o.numel() for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim == 4}

    gc.collect()
    before = tensors()  # the image, and what other tests have left

    def count(*_):
        alive.append(sum(size for pointer, size in tensors().items() if pointer not in before))

    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.InstanceNorm2d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(image)

    with_teacher, without = (
        type("Memory", (SemiSegMemory,), {"has_teacher": has}).static_estimate_VRAM_usage(
            (32, 32), 1, 2, name, kwargs, to_import
        )
        for has in (True, False)
    )
    # a counted voxel stands for two that are kept, before and after the normalisation
    assert with_teacher - without == max(alive) / 2


def fingerprinted(tiny_dataset, monkeypatch, shape=(200, 300, 300), **kwargs):
    """A dataset whose fingerprint, but not whose images, is of clinical size."""
    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner asks torch for that many threads
    dataset = tiny_dataset(**{"labeled": 1, "unlabeled": 1, "size": 6, "numTraining": 100} | kwargs)
    statistics = {
        "mean": 1,
        "median": 1,
        "std": 1,
        "min": 0,
        "max": 2,
        "percentile_99_5": 2,
        "percentile_00_5": 0,
    }
    fingerprint = {
        "spacings": [[1.0, 1.0, 1.0]],
        "shapes_after_crop": [shape],
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
    }
    dataset.preprocessed.mkdir(parents=True)
    (dataset.preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return dataset


def test_every_planner_is_tested():
    assert {c.__name__ for c in iter_classes("planners")} == set(PLANNERS)


@pytest.mark.parametrize("name", sorted(set(PLANNERS) - set(STOCK)))
def test_smaller_patches_keep_nnunets_rules_within_its_memory(tiny_dataset, name, monkeypatch):
    dataset = fingerprinted(tiny_dataset, monkeypatch)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    planner = find_planner(name)(dataset.id)
    plans = planner.plan_experiment()
    plans_name, gigabytes = PLANNERS[name]
    assert plans["plans_name"] == plans_name and planner.UNet_vram_target_GB == gigabytes
    assert plans["experiment_planner_used"] == name
    for configuration, reference in (
        ("2d", planner.UNet_reference_val_2d),
        ("3d_fullres", planner.UNet_reference_val_3d),
    ):
        plan = plans["configurations"][configuration]
        arch = plan["architecture"]
        used = planner.static_estimate_VRAM_usage(
            plan["patch_size"],
            1,
            3,
            arch["network_class_name"],
            arch["arch_kwargs"],
            arch["_kw_requires_import"],
        )
        per_batch = planner.UNet_reference_val_corresp_bs_2d if configuration == "2d" else 2
        assert used * plan["batch_size"] / per_batch <= 1.2 * reference  # the batch size is rounded
        assert plan["batch_size"] >= 2
        assert plan["preprocessor_name"] == "DefaultPreprocessor"
        features = arch["arch_kwargs"]["features_per_stage"]
        widths = (16, 128) if name.endswith("Small") else (32, 512 if configuration == "2d" else 320)
        assert (min(features), max(features)) == widths


def without_names(plans):
    """What plans say, without what the plans' and the planner's name make of it."""
    configurations = {
        name: {key: value for key, value in content.items() if key != "data_identifier"}
        for name, content in plans["configurations"].items()
    }
    names = ("plans_name", "experiment_planner_used", "dataset_name")
    return {k: v for k, v in plans.items() if k not in names} | {"configurations": configurations}


@pytest.mark.parametrize("name", STOCK)
def test_plans_are_stock_where_no_case_is_unlabelled(tiny_dataset, monkeypatch, name):
    dataset = fingerprinted(tiny_dataset, monkeypatch, (40, 96, 96), unlabeled=0, numTraining=6)
    ours, theirs = (find_planner(n)(dataset.id) for n in (name, STOCK[name]))
    plans = ours.plan_experiment()
    assert (plans["plans_name"], ours.UNet_vram_target_GB) == PLANNERS[name]
    assert plans["experiment_planner_used"] == name
    assert {"2d", "3d_fullres"} <= set(plans["configurations"])
    assert without_names(plans) == without_names(theirs.plan_experiment())


@pytest.mark.parametrize("name", STOCK)
def test_plans_are_those_of_the_same_images_with_all_labels(tiny_dataset, monkeypatch, name):
    few, all_labeled = (
        fingerprinted(
            tiny_dataset, monkeypatch, (32, 32, 32), labeled=n, unlabeled=100 - n, numTraining=n, dataset_id=i
        )
        for n, i in ((6, 901), (100, 902))
    )
    (few.raw / "imagesUn" / "._un_000_0000.nii.gz").touch()  # of a Mac
    (few.raw / "imagesUn" / "notes.txt").touch()
    ours, theirs = find_planner(name)(few.id).plan_experiment(), find_planner(STOCK[name])(all_labeled.id)
    assert without_names(ours) == without_names(theirs.plan_experiment())
    # the planner's own count goes nowhere
    assert json.loads((few.preprocessed / "dataset.json").read_text())["numTraining"] == 6


def test_the_batch_covers_5_percent_of_all_images(tiny_dataset, monkeypatch):
    dataset = fingerprinted(tiny_dataset, monkeypatch, (32, 32, 32), labeled=6, unlabeled=94, numTraining=6)

    def batches(planner):
        configurations = find_planner(planner)(dataset.id).plan_experiment()["configurations"]
        assert {tuple(c["patch_size"]) for c in configurations.values()} == {(32, 32), (32, 32, 32)}
        return configurations["2d"]["batch_size"], configurations["3d_fullres"]["batch_size"]

    # patches are whole slices and whole volumes; nnU-Net's smallest batch is 2
    assert batches("ExperimentPlanner") == (round(0.05 * 6 * 32), 2)
    assert batches("SemiSegPlanner") == (0.05 * 100 * 32, 0.05 * 100)


def test_a_fast_patch_is_smaller(tiny_dataset, monkeypatch):
    dataset = fingerprinted(tiny_dataset, monkeypatch, (128, 128, 128))
    ours, theirs = (
        find_planner(name)(dataset.id).plan_experiment()["configurations"]["3d_fullres"]["patch_size"]
        for name in ("SemiSegPlannerFast", "ExperimentPlanner")
    )
    assert np.prod(ours) < np.prod(theirs) / 3


def test_plans_with_another_spacing_never_share_data(tiny_dataset, monkeypatch):
    dataset = fingerprinted(tiny_dataset, monkeypatch)

    def identifiers(planner, **kwargs):
        planner = find_planner(planner)(dataset.id, **kwargs)
        return {planner.generate_data_identifier(c) for c in ("2d", "3d_fullres", "3d_lowres")}

    everyones = [identifiers(name) for name in (*PLANNERS, "ExperimentPlanner")]
    everyones.append(identifiers("SemiSegPlannerResEncM", plans_name="Coarse", overwrite_target_spacing=[3.0] * 3))
    assert len(set.union(*everyones)) == sum(map(len, everyones))


def test_the_default_are_nnunets_own_plans(tiny_dataset):
    dataset = tiny_dataset(labeled=2, unlabeled=2)
    with in_threads():
        how = {"num_processes": [1], "num_processes_fingerprint": 1, "settings": ["num_epochs=2"]}
        plan_and_preprocess(PlanningRequest(dataset_ids=[dataset.id], configurations=["3d_fullres"], **how))
    plans = dataset.plans("nnUNetPlans")
    assert plans.pop("semiseg") == {"num_epochs": 2}
    assert (dataset.preprocessed / "nnUNetPlans_3d_fullres__unlabeled.json").is_file()
    with in_threads():
        ExperimentPlanner(dataset.id).plan_experiment()
    assert dataset.plans("nnUNetPlans") == plans
    assert find_planner("nnUNetPlannerResEncM") is nnUNetPlannerResEncM


def test_nnunets_planner_without_a_thread_is_refused(tiny_dataset, monkeypatch):
    dataset = tiny_dataset(size=6)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with pytest.raises(UserError, match="^nnUNet_n_proc_DA=0: ExperimentPlanner needs 1 or more: set it to 1"):
        plan_and_preprocess(PlanningRequest(dataset_ids=[dataset.id]))
    assert not dataset.preprocessed.exists()


def test_plans_that_are_missing(tiny_dataset):
    dataset = tiny_dataset(size=6)

    def refusal(name, **kwargs):
        with pytest.raises(UserError) as refused:
            read_plans(dataset.preprocessed, name, **kwargs)
        file, _, rest = str(refused.value).partition(": ")
        assert file == f"{dataset.preprocessed / name}.json"
        return rest

    plan = "plan first with nnunet_semiseg plan_and_preprocess -d 901"
    assert refusal("nnUNetPlans") == f"no such plans: {plan}"
    dataset.preprocessed.mkdir(parents=True)
    (dataset.preprocessed / "dataset.json").write_text("{}")
    (dataset.preprocessed / "nnUNetPlans.json").write_text('{"plans_name": "nnUNetPlans"}')
    there = "no such plans; there is nnUNetPlans: choose with -p; or"
    assert refusal("nnUNetSemiSegFastPlans") == f"{there} {plan} -pl SemiSegPlannerFast"
    assert refusal("nnUNetResEncUNetLPlans") == f"{there} {plan} -pl nnUNetPlannerResEncL"
    for name in ("nnUNetPlans_seed0", "nnUNetPlans_4labeled", "nnUNetPlans_4labeled_seed0", "Mine", "nnUNetPlans_2mm"):
        (dataset.preprocessed / f"{name}.json").write_text(json.dumps({"plans_name": name}))
    there = "no such plans; there are Mine, nnUNetPlans, nnUNetPlans_2mm: choose with -plans_name; or"
    assert refusal("nnUNetFoo", option="-plans_name") == f"{there} {plan} -overwrite_plans_name nnUNetFoo"
    mine = {"plans_name": "Mine", "configurations": {}}
    (dataset.preprocessed / "Mine.json").write_text(json.dumps(mine))
    assert read_plans(dataset.preprocessed, "Mine") == mine


def test_regions_two_channels_and_other_names(tiny_dataset):
    dataset = tiny_dataset(regions=True, channels=2, labeled=2, unlabeled=2)
    plans = dataset.plan(overwrite_target_spacing=[2.0, 2.0, 2.0], overwrite_plans_name="Coarse")
    assert plans["plans_name"] == "Coarse" and plans["configurations"]["3d_fullres"]["spacing"] == [2.0] * 3
    assert plans["configurations"]["2d"]["spacing"] == [2.0] * 2  # made from that of 3d_fullres
    assert (dataset.preprocessed / "Coarse_3d_fullres__unlabeled" / "un_001.pkl").is_file()


def test_statistics_come_from_labelled_cases_only(tiny_dataset):
    dataset = tiny_dataset(labeled=2, unlabeled=2)
    plans = dataset.plan(preprocess=False)
    for case in ("un_000", "un_001"):
        write_image(torch.full((30, 30, 30), 1e4).numpy(), dataset.image(case), (3, 3, 3))
    assert dataset.plan(preprocess=False, clean=True) == plans


# --- settings


def test_settings_are_kept_in_the_plans(tiny_dataset, capsys):
    dataset = tiny_dataset(labeled=2, unlabeled=2)
    dataset.plan(preprocess=False, settings=["num_epochs=3", "unlabeled_batch_size=4"])
    assert "num_epochs (default) -> 3" in capsys.readouterr().out
    plans = dataset.plan(preprocess=False, settings=["num_epochs=5"])
    assert plans["semiseg"] == {"num_epochs": 5, "unlabeled_batch_size": 4}


# --- small splits


def splits(dataset):
    file = dataset.preprocessed / "splits_final.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_few_cases_get_leave_one_out_folds(tiny_dataset):
    dataset = tiny_dataset(labeled=3, unlabeled=1)
    dataset.plan(preprocess=False)
    assert splits(dataset) == [
        {"train": ["tr_001", "tr_002"], "val": ["tr_000"]},
        {"train": ["tr_000", "tr_002"], "val": ["tr_001"]},
        {"train": ["tr_000", "tr_001"], "val": ["tr_002"]},
    ]


def test_folds_that_lack_new_cases_are_pointed_at(tiny_dataset, capsys):
    dataset = tiny_dataset(labeled=3, unlabeled=1)
    dataset.plan(preprocess=False)
    for folder, name in (("imagesTr", "{}_0000.nii.gz"), ("labelsTr", "{}.nii.gz")):
        shutil.copy(dataset.raw / folder / name.format("tr_000"), dataset.raw / folder / name.format("tr_007"))
    dataset.update_dataset_json(numTraining=4)
    capsys.readouterr()
    dataset.plan(preprocess=False)
    assert "splits_final.json: no fold has tr_007: delete the file to have new folds" in capsys.readouterr().out


@pytest.mark.parametrize("labeled", [1, 5])
def test_other_numbers_of_cases_get_no_folds(tiny_dataset, labeled):
    dataset = tiny_dataset(labeled=labeled, unlabeled=1)
    dataset.plan(preprocess=False)
    assert splits(dataset) is None


def test_a_published_split_is_copied_and_never_contradicted(tiny_dataset):
    dataset = tiny_dataset(labeled=3, unlabeled=1)
    published = [{"train": ["tr_000"], "val": ["tr_001", "tr_002"]}]
    file = dataset.raw / "splits_final.json"
    file.write_text(json.dumps(published))
    dataset.plan(preprocess=False)
    assert splits(dataset) == published
    dataset.plan(preprocess=False)
    file.write_text(json.dumps([{"train": ["tr_001"], "val": ["tr_000", "tr_002"]}]))
    with pytest.raises(UserError, match=r"^\S*splits_final.json: has other folds than \S*splits_final.json: keep"):
        dataset.plan(preprocess=False)


# --- checks before any work


@pytest.mark.parametrize(
    "change, kwargs, message",
    [
        (None, {"settings": ["num_epoch=3"]}, "unknown setting num_epoch .*num_epochs"),
        (None, {"settings": ["num_epochs=many"]}, "num_epochs=.*whole number"),
        (
            None,
            {"planner": "SemiSegPlanerSmall"},
            "-pl SemiSegPlanerSmall: no such planner: use SemiSegPlannerSmall",
        ),
        (None, {"num_processes": [1, 2]}, "-np 1 2: give one number"),
        (lambda d: shutil.rmtree(d.raw / "imagesTr"), {}, "imagesTr: no labelled cases"),
        (lambda d: (d.raw / "dataset.json").write_text("{,"), {}, "dataset.json: not valid JSON"),
        (lambda d: (d.raw / "dataset.json").unlink(), {}, "dataset.json: no such file"),
        (lambda d: (d.raw / "dataset.json").write_bytes(b'{"a": "\xe9"}'), {}, "dataset.json: not valid JSON"),
        (lambda d: (d.raw / "dataset.json").write_text("[1]"), {}, "dataset.json: is not a JSON object"),
        (lambda d: (d.raw / "dataset.json").write_text('{"labels": {}}'), {}, 'dataset.json: has no "file_ending"'),
        (
            lambda d: d.update_dataset_json(labels={"background": 0, "a": "one"}),
            {},
            '"labels": "a" is .one., but must be a whole number',
        ),
        (lambda d: shutil.rmtree(d.raw / "imagesUn"), {}, "imagesUn: no such folder"),
        (lambda d: d.update_dataset_json(semiseg={"prompts": {"liver": ["the liver"]}}), {}, "liver"),
        (
            lambda d: d.image("un_000").write_bytes(b"no image"),
            {"verify_dataset_integrity": True},
            "un_000_0000.nii.gz: cannot be read",
        ),
    ],
)
def test_what_can_be_checked_quickly_stops_before_any_work(tiny_dataset, change, kwargs, message):
    dataset = tiny_dataset(size=6)
    if change:
        change(dataset)
    with pytest.raises(UserError, match=rf"^.*{message}.*$"):
        plan_and_preprocess(PlanningRequest(dataset_ids=[dataset.id], configurations=["3d_fullres"], **kwargs))
    assert not dataset.preprocessed.exists()


def test_a_dataset_without_unlabelled_cases(tiny_dataset):
    """For the upper bound: the plans of our planners, and nothing looked for in imagesUn."""
    dataset = tiny_dataset(unlabeled=0)
    plans = dataset.plan(labeled_only=True)
    assert plans["plans_name"] == "nnUNetSemiSegSmallPlans"
    assert sorted(f.stem for f in dataset.preprocessed.glob("*_3d_fullres/*.pkl")) == ["tr_000", "tr_001", "tr_002"]
    assert not list(dataset.preprocessed.glob("*__unlabeled*"))


# --- tiny images


def of_shape(dataset, shape):
    rng = np.random.default_rng(0)
    for file in dataset.raw.glob("*/*.nii.gz"):
        image = rng.normal(100, 9, shape).astype(np.float32)
        write_image((image > 100).astype(np.uint8) if "labels" in file.parent.name else image, file)
    return dataset


def test_a_network_of_two_stages_has_one_output_of_weight_1(tiny_dataset, monkeypatch):
    """nnU-Net gives the last of several outputs the weight 0; of one output that is 0 / 0."""
    dataset = of_shape(tiny_dataset(labeled=2, unlabeled=2, size=6), (12, 14, 16))
    plans = dataset.plan()
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"] == 2
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for trainer_class in (MeanTeacherTrainer, SupervisedTrainer, URPCTrainer):
        trainer = make_trainer(trainer_class, dataset)
        trainer.initialize()
        assert trainer.loss.weight_factors == (1.0,)
        logits, target = [torch.zeros(1, 3, 12, 14, 16)], [torch.zeros(1, 1, 12, 14, 16)]
        assert trainer.loss(logits, target).item() == pytest.approx(
            np.log(3) + trainer.loss.loss.dc(logits[0], target[0]).item()
        )


@pytest.mark.parametrize("planner", ["SemiSegPlannerSmall", "SemiSegPlanner"])
def test_images_too_small_for_a_u_net_are_refused(tiny_dataset, planner):
    dataset = of_shape(tiny_dataset(labeled=2, unlabeled=2, size=6), (6, 7, 6))
    with pytest.raises(
        UserError, match="^plans .*: 3d_fullres: the images are too small for a U-Net: .* 6 x 7 x 6|6 x 6"
    ):
        dataset.plan(planner)
    assert not list(dataset.preprocessed.glob("*_3d_fullres"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"numTraining": 100}, '"numTraining" is 100, but there are 2 labelled cases: write "numTraining": 2$'),
        (
            {"configurations": ["3d_fullres", "bogus"]},
            "^-c bogus: no such configuration: use 2d or 3d_fullres or 3d_lo",
        ),
        ({"gpu_memory_target": 1e-9}, "-gpu_memory_target 1e-09: give 0.5 GB or more"),
        ({"overwrite_target_spacing": (1e-4, 1, 1)}, "-overwrite_target_spacing 0.0001 1 1: .* spacing of 1.5 1 1 and"),
        ({"overwrite_target_spacing": (1e6, 1, 1)}, "would have 3.6e-05 24 24 voxels: give a spacing near"),
    ],
)
def test_numbers_out_of_all_reason_are_refused_before_any_work(options, message, tiny_dataset, monkeypatch):
    monkeypatch.setattr("nnunet_semiseg.planning.checks.total_memory", lambda: 10**6)
    numbers = {"numTraining": options.pop("numTraining")} if "numTraining" in options else {}
    dataset = tiny_dataset(labeled=2, unlabeled=1, **numbers)
    with pytest.raises(UserError, match=message):
        dataset.plan(**options)
    assert not dataset.preprocessed.exists()


def test_a_case_with_more_images_than_others_is_named_itself(tiny_dataset):
    dataset = tiny_dataset(labeled=2, unlabeled=1)
    images = {case: [f"imagesTr/{case}_0000.nii.gz"] for case in ("tr_000", "tr_001")}
    cases = {case: {"images": images[case], "label": f"labelsTr/{case}.nii.gz"} for case in images}
    cases["tr_001"]["images"] *= 2
    dataset.update_dataset_json(dataset=cases)
    with pytest.raises(UserError, match="imagesTr/tr_001_0000.nii.gz: tr_001 has 2 channels, but tr_000 has 1: add or"):
        dataset.plan()
    del cases["tr_000"]
    dataset.update_dataset_json(dataset=cases, numTraining=1)
    with pytest.raises(UserError, match='"channel_names" names 1 channels, but tr_001 has 2'):
        dataset.plan()


def test_a_second_planning_is_told_who_plans(tiny_dataset):
    dataset = tiny_dataset(labeled=2, unlabeled=1)
    lock = dataset.preprocessed.with_name(f".{dataset.name}.lock")
    with only_one(lock, "plans"), pytest.raises(BusyError, match=f"^{lock}: process .* plans this data set: wait"):
        dataset.plan()
    assert not dataset.preprocessed.exists() and not lock.exists()
