"""What is wrong with a JSON file is said in one line, with the file's path, before nnU-Net meets it."""

import json
import math

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg import cli
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import base_folder, dataset_folder, read_json
from nnunet_semiseg.json_types import matches
from nnunet_semiseg.schema import check_configuration, check_name, load_plans, read_dataset_json, read_splits
from nnunet_semiseg.trainers.supervised import SupervisedTrainer

DATASET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "numTraining": 2, "file_ending": ".png"}
REGIONS = {"labels": {"background": 0, "both": [1, 2], "b": [2]}, "regions_class_order": [1, 2]}
KWARGS = {
    "n_stages": 2, "features_per_stage": [4, 8], "kernel_sizes": [3, [3, 3]], "strides": [1, [2, 2]],
    "n_conv_per_stage": 2, "n_conv_per_stage_decoder": [2], "conv_op": "torch.nn.modules.conv.Conv2d", "nonlin": None,
}  # fmt: skip
NETWORK = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": KWARGS, "_kw_requires_import": ["conv_op", "nonlin"],
}  # fmt: skip
CONFIGURATION = {
    "data_identifier": "P", "batch_size": 2, "patch_size": [8, 8], "spacing": [1.0, 1], "architecture": NETWORK,
    "normalization_schemes": ["ZScoreNormalization"], "preprocessor_name": "DefaultPreprocessor",
    "use_mask_for_norm": [False], "resampling_fn_data": "f", "resampling_fn_data_kwargs": {},
    "resampling_fn_seg": "f", "resampling_fn_seg_kwargs": {},
}  # fmt: skip
USED = {
    "dataset_name": "Dataset901_Tiny", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
    "image_reader_writer": "SimpleITKIO",
}  # fmt: skip
PLANS = {"plans_name": "P", "configurations": {"2d": CONFIGURATION}, **USED}


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (b'\xef\xbb\xbf{"a": 1}', "it begins with a byte order mark: save it as UTF-8 without BOM"),
        ('{"a": 1}'.encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        (b"[" * 100_000, "too many brackets within each other"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', '"c" is there twice'),
        (b"\xff", "'utf-8' codec"),
        (b"[1]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
    ],
)
def test_json_that_is_none(content, words, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    message = refusal(read_json, file, "fix it")
    assert message.startswith(f"{file}: ") and words in message and message.endswith(": fix it")


@pytest.mark.parametrize(
    "value, hint, right",
    [
        (1, int, True), (True, int, False), (1.5, int, False), (1, float, True), (math.nan, float, False),
        ([1, 2], list[int], True), ([1, "2"], list[int], False), ({"a": [1]}, dict[str, int | list[int]], True),
        ({"a": None}, dict[str, int], False), (None, int | None, True), ("a", dict, False),
    ],
)  # fmt: skip
def test_types_of_values(value, hint, right):
    assert matches(value, hint) is right


@pytest.mark.parametrize("content", [DATASET, DATASET | REGIONS])
def test_what_is_right_is_taken(content, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert read_dataset_json(tmp_path) == content


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": []}, '"labels" is [], but must be an object'),
        ({"labels": None}, '"labels" is None'),
        ({"labels": {"background": 0, "a": True}}, '"labels": "a" is True, but must be a whole number'),
        ({"labels": {"background": 0, "a": -1}}, 'label "a" is -1'),
        ({"labels": {"background": 0, "a": 2}}, '"labels" has the values 0, 2, but must have 0 to 1'),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, '"labels" has the values 0, 1, but must have 0 to 2'),
        ({"labels": {"background": 0, "ignore": 1}}, "has only background and ignore: add a class"),
        ({"labels": {"a": 1}}, 'must have "background": 0'),
        ({"labels": {"background": 0, "": 1}}, "\"labels\" has a class called '': give it a name"),
        ({"labels": {"background": 0, "a\nb": 1}}, "\"labels\" has a class called 'a\\nb': give it a name"),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, '"labels" has the values 0, 2'),
        ({"labels": {"background": 0, "a": 1, "ignore": 3}}, 'label "ignore" is 3, but must be the last one: 2'),
        ({"labels": {"background": 0, "a": 1, "ignore": [2]}}, 'label "ignore" is a list'),
        ({"dataset": {"../a": {"images": ["a"], "label": "b"}}}, '"dataset" has a case called "../a"'),
        ({"channel_names": ["MRI"]}, "\"channel_names\" is ['MRI'], but must be an object"),
        ({"channel_names": {}}, '"channel_names" is empty'),
        ({"channel_names": {"1": "T2", "0": "T1"}}, "\"channel_names\" has the keys '1', '0', but must have '0', '1'"),
        ({"channel_names": {"1": "MRI"}}, "has the keys '1', but must have '0', in this order"),
        ({"channel_names": {}, "modality": {"1": "MRI"}}, "\"modality\" has the keys '1', but must have '0'"),
        ({"channel_names": {}, "modality": {}}, '"modality" is empty'),
        ({"modality": {"0": "CT", "1": "PET"}}, 'have different lengths: remove "modality"'),
        ({"channel_names": {"0": 5}}, '"channel_names": "0" is 5, but must be a text'),
        ({"file_ending": 5}, '"file_ending" is 5'),
        ({"file_ending": "png"}, "must begin with a dot"),
        ({"numTraining": None}, '"numTraining" is None'),
        ({"numTraining": math.nan}, '"numTraining" is nan, but must be a whole number'),
        ({"overwrite_image_reader_writer": "MyIO"}, 'is "MyIO": use NaturalImage2DIO or SimpleITKIO'),
        ({"semiseg": {"labeled_order": 5}}, '"semiseg" "labeled_order" is 5, but must be a list of a text'),
        ({"dataset": {"c": {"images": "c.png"}}}, '"dataset" c "images" is'),
        (REGIONS | {"labels": {"background": 0, "a": [0, 1]}}, 'label "a" is [0, 1], but must not have the background'),
        (REGIONS | {"labels": {"background": 0, "a": [1, 1]}}, 'label "a" is [1, 1], but must not have a value twice'),
        (REGIONS | {"regions_class_order": None}, '"regions_class_order" is missing, but label "both" is a region'),
        (REGIONS | {"regions_class_order": [1]}, '"regions_class_order" has 1 values'),
        (REGIONS | {"regions_class_order": [1, 3]}, '"regions_class_order" has 3, which is not a value'),
        (REGIONS | {"regions_class_order": [1, 1]}, '"regions_class_order" has a value twice'),
    ],
)
def test_dataset_json_that_nnunet_would_fail_on(change, words, tmp_path):
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(DATASET | change))
    message = refusal(read_dataset_json, tmp_path)
    assert message.startswith(f"{file}: ") and words in message


def test_a_key_that_is_missing(tmp_path):
    for key in DATASET:
        (tmp_path / "dataset.json").write_text(json.dumps({k: v for k, v in DATASET.items() if k != key}))
        assert key in refusal(read_dataset_json, tmp_path)


@pytest.mark.parametrize(
    "plans, words",
    [
        ([], "is not a JSON object"),
        ({}, 'has no "plans_name"'),
        (None, "is not a JSON object"),
        ({"plans_name": "P"}, 'has no "configurations"'),
        ({"configurations": {}}, 'has no "plans_name"'),
        (PLANS | {"semiseg": []}, '"semiseg" is [], but must be an object'),
        (PLANS | {"semiseg": None}, '"semiseg" is None'),
        (PLANS | {"configurations": {"2d": 1}}, '"configurations": "2d" is 1'),
    ],
)
def test_plans_that_are_none(plans, words, tmp_path):
    (tmp_path / "P.json").write_text(json.dumps(plans))
    assert words in refusal(load_plans, tmp_path / "P.json", "plan")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spacing": [math.nan, 1]}, '"spacing" is [nan, 1], but must be a list of a number'),
        ({"spacing": [0, 1]}, "must be above 0"),
        ({"batch_size": "2"}, "\"batch_size\" is '2'"),
        ({"inherits_from": "3d"}, "cannot be read"),
        ({"patch_size": [8, 0]}, '"patch_size" is [8, 0], but must be 1 or more'),
        ({"patch_size": [8]}, '"patch_size" is [8], but must have 2 values'),
        ({"batch_size": 0}, '"batch_size" is 0, but must be 1 or more'),
        ({"data_identifier": ""}, '"data_identifier" is empty'),
        ({"architecture": None}, '"architecture" is None'),
        ({"architecture": {}}, 'architecture has no "network_class_name"'),
        ({"patch_size": [8, 7]}, '"patch_size" is [8, 7], but with these "strides" it must be divisible by [2, 2]'),
    ],
)
def test_a_configuration_that_is_none(change, words):
    plans = PLANS | {"configurations": {"2d": CONFIGURATION | change}}
    assert words in refusal(check_configuration, plans, "2d", "P.json", "plan")


def network(kwargs=None, **change) -> dict:
    kwargs = KWARGS | (kwargs or {})
    return {"2d": CONFIGURATION | {"architecture": NETWORK | {"arch_kwargs": kwargs} | change}}


@pytest.mark.parametrize(
    "configurations, words",
    [
        (network({"n_stages": 1}), '"features_per_stage" has 2 values, but must have 1'),
        (network({"features_per_stage": "big"}), "\"features_per_stage\" is 'big'"),
        (network({"strides": [1]}), '"strides" has 1 values, but must have 2'),
        (network({"strides": [1, [2]]}), '"strides" has [2], but must have 2 numbers'),
        (network({"strides": [1, 0]}), '"strides" has [0, 0], but must have 2 numbers of 1 or more'),
        (network({"n_conv_per_stage_decoder": [2, 2]}), '"n_conv_per_stage_decoder" has 2 values, but must have 1'),
        (network({"conv_op": "torch.nn.Conv3d"}), '"conv_op" has 3 axes, but "patch_size" has 2'),
        (network({"conv_op": 3}), '"conv_op" is 3, which is unknown code'),
    ],
)
def test_a_network_that_cannot_be_built(configurations, words):
    assert words in refusal(check_configuration, PLANS | {"configurations": configurations}, "2d", "P.json", "plan")


@pytest.mark.parametrize("name", ["os.system", "nope.Net", "nnunetv2", "torch.nn.Linear", "nnunetv2.paths.os.system"])
def test_a_network_of_unknown_origin_is_refused_before_it_is_imported(name, monkeypatch):
    monkeypatch.setattr("pydoc.locate", lambda *_: pytest.fail("imported"))
    plans = PLANS | {"configurations": network(network_class_name=name)}
    message = refusal(check_configuration, plans, "2d", "P.json", "plan")
    assert message.startswith(
        f"P.json: configuration 2d architecture \"network_class_name\" is '{name}', which is unknown code"
    )
    assert message.endswith("export nnUNet_semiseg_trust=1")
    with pytest.raises(UserError, match=name):  # as nnU-Net's predictor calls it
        manager = PlansManager(plans)
        SupervisedTrainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 2)
    part = PLANS | {"configurations": network({"nonlin": name})}
    if name != "torch.nn.Linear":
        assert '"nonlin" is' in refusal(check_configuration, part, "2d", "P.json", "plan")
    monkeypatch.setenv("nnUNet_semiseg_trust", "1")
    check_configuration(plans, "2d", "P.json", "plan")


@pytest.mark.parametrize("key", USED)
def test_plans_that_cannot_be_trained_with(key):
    plans = {k: v for k, v in PLANS.items() if k != key}
    assert refusal(check_configuration, plans, "2d", "P.json", "plan") == f'P.json: has no "{key}": plan'


def test_a_configuration_that_is_not_there():
    check_configuration(PLANS, "2d", "P.json", "plan")
    assert refusal(check_configuration, PLANS, "3d", "P.json", "plan") == "P.json: no configuration 3d: use 2d"


@pytest.mark.parametrize(
    "folds, words", [({}, "is not a JSON list"), ([1], "fold 0 is no"), ([{"train": []}], '"val"')]
)
def test_splits_that_are_none(folds, words, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(folds))
    assert words in refusal(read_splits, tmp_path / "s.json", "fix it")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a" * 101, "a__b", "dataset", "splits_final"])
def test_names_that_are_no_part_of_a_folders(name):
    check_name("--as", "nnUNetPlans_0.5")
    assert refusal(check_name, "--as", name).startswith(f"--as {name[:50]}")


@pytest.mark.parametrize("value", ["~/raw", '"/raw"', "'/raw", "$HOME/raw"])
def test_variables_that_no_shell_has_read(value, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", value)
    assert f"nnUNet_raw={value}: the shell has not" in refusal(base_folder, "nnUNet_raw")


def test_numbers_that_nnunet_cannot_tell_apart(tiny_dataset, tmp_path):
    tiny_dataset(size=6)
    (tmp_path / "nnUNet_raw" / "Dataset1500_X").mkdir()
    assert "with three digits: rename its folder" in refusal(dataset_folder, "nnUNet_raw", 1500)
    assert dataset_folder("nnUNet_raw", 901).name == "Dataset901_Tiny"


@pytest.mark.parametrize("manifest", [[], {}, {"plans_hash": "a", "cases": []}, {"plans_hash": "a", "cases": {"c": 1}}])
def test_a_manifest_that_is_none(manifest, ready):
    from training import PLANS as SMALL

    from nnunet_semiseg.data.unlabeled_manifest import load_manifest

    dataset = ready(labeled=2, unlabeled=2)
    file = dataset.preprocessed / f"{SMALL}_3d_fullres__unlabeled.json"
    file.write_text(json.dumps(manifest))
    message = refusal(load_manifest, dataset.preprocessed, dataset.plans(SMALL), "3d_fullres", dataset.name)
    assert message.startswith(f"{file}: ") and "run nnunet_semiseg preprocess_unlabeled" in message


def test_channels_that_no_file_has(tiny_dataset):
    dataset = tiny_dataset(size=6, labeled=2, unlabeled=1)
    dataset.update_dataset_json(channel_names={"0": "a", "1": "b"})
    assert '"channel_names" names 2 channels, but tr_000 has 1' in refusal(dataset.plan)


@pytest.mark.parametrize(
    "words",
    ["-gpu_memory_target 0", "-gpu_memory_target nan", "-overwrite_target_spacing 1 inf 1", "-npfp 0", "-d 1000"],
)
def test_numbers_of_the_planning_that_make_no_sense(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan_and_preprocess", "-d", "901", *words.split()])
    assert "give a " in capsys.readouterr().err


def test_a_name_of_plans_that_leads_elsewhere(tiny_dataset):
    dataset = tiny_dataset(size=6, labeled=2, unlabeled=1)
    assert "-overwrite_plans_name ../x: " in refusal(lambda: dataset.plan(overwrite_plans_name="../x"))
    assert not dataset.preprocessed.exists()
