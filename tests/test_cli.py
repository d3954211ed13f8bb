import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser

import pytest
from test_schema import CONFIGURATION, PLANS

from nnunet_semiseg import cli
from nnunet_semiseg.commands.completion import planner_names
from nnunet_semiseg.commands.text import EMBED_OPTIONS
from nnunet_semiseg.discovery import iter_classes, module_names
from nnunet_semiseg.errors import UserError, report
from nnunet_semiseg.planning_request import PlanningRequest
from nnunet_semiseg.settings.plans import GIVEN, store_given, store_settings, with_given


def write_plans(dataset, name="nnUNetSemiSegPlans", **more) -> dict:
    """Plans as short as they may be, and the `dataset.json` beside them."""
    configurations = {"2d": CONFIGURATION, "3d_fullres": CONFIGURATION}
    plans = {**PLANS, "plans_name": name, "dataset_name": dataset.name, "configurations": configurations, **more}
    dataset.preprocessed.mkdir(parents=True, exist_ok=True)
    (dataset.preprocessed / f"{name}.json").write_text(json.dumps(plans))
    shutil.copy(dataset.raw / "dataset.json", dataset.preprocessed)
    return plans


def error_lines(capsys, *arguments):
    assert cli.main(arguments) == 1
    return capsys.readouterr().err.splitlines()


def test_help_names_every_command_and_imports_nothing_large():
    code = (
        "import sys; from nnunet_semiseg import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: assert not {'torch', 'nnunetv2', 'numpy'} & set(sys.modules), 'slow'"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path}\n{code}"],
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    assert all(f"\n  {command.name} " in run.stdout for command in cli.COMMANDS)
    assert max(map(len, run.stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_and_every_option_has_help_and_examples_that_are_understood(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([command.name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert " ".join(command.__doc__.split()[:4]) in " ".join(shown.split())
    prose = shown.partition("\nexamples:\n")[0]
    assert max(map(len, prose.splitlines())) <= 80
    own = ArgumentParser()
    command.add_arguments(own)
    assert all(action.help for action in own._actions)
    parser = cli.make_parser()
    for example in command.examples:
        *_, line = example.replace("\\\n", "").partition("nnunet_semiseg ")
        assert line.startswith(command.name) or "torchrun" in example
        if command.name not in ("convert", "env") and "torchrun" not in example:
            assert parser.parse_args(shlex.split(line)).run.__self__ is command


def test_the_help_of_every_converter_is_narrow(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for name in module_names("dataset_conversion"):
        with pytest.raises(SystemExit):
            cli.main(["convert", name, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80, max(lines, key=len)


@pytest.mark.parametrize(
    "command, variable",
    [
        ("plan_and_preprocess -d 901", "nnUNet_raw"),
        ("preprocess_unlabeled -d 901", "nnUNet_raw"),
        ("preprocess_unlabeled -d 901", "nnUNet_preprocessed"),
        ("train 901 3d_fullres 0", "nnUNet_preprocessed"),
        ("train 901 3d_fullres 0", "nnUNet_results"),
        ("embed_prompts -d 901 -o x", "nnUNet_raw"),
    ],
)
def test_a_variable_that_is_not_set_is_one_line(tiny_dataset, monkeypatch, capsys, command, variable):
    tiny_dataset(size=6)
    monkeypatch.delenv(variable)
    (line,) = error_lines(capsys, *command.split())
    assert line.startswith(f"error: {variable} is not set: export {variable}=")


def test_an_unknown_dataset_is_one_line(tiny_dataset, capsys):
    dataset = tiny_dataset(size=6)
    (line,) = error_lines(capsys, "preprocess_unlabeled", "-d", "902")
    assert line.startswith("error: dataset 902: no dataset has this number: choose one in nnUNet_raw=")
    (line,) = error_lines(capsys, "status", "-d", "Dataset901_Tinny")
    assert line == "error: dataset Dataset901_Tinny: no dataset has this name: did you mean Dataset901_Tiny?"
    (line,) = error_lines(capsys, "status", "-d", "Dataset777_Heart")
    assert line.startswith("error: dataset Dataset777_Heart: no dataset has this name: choose one in nnUNet_raw=")
    (dataset.raw.parent / "Dataset901_Twin").mkdir()
    (line,) = error_lines(capsys, "status", "-d", "901")
    assert line == (
        "error: dataset 901: several datasets have this number: give the name of one of them, or rename the others"
    )


def test_errors_are_lines_without_traceback(tiny_dataset, capsys):
    dataset = tiny_dataset(channels=2, size=6)
    dataset.image("un_000", 0).unlink()
    dataset.image("un_002", 1).unlink()
    lines = error_lines(capsys, "plan_and_preprocess", "-d", "901", "-c", "3d_fullres")
    assert len(lines) == 2
    assert "un_000_0000.nii.gz: no such file" in lines[0] and "un_002_0001.nii.gz: no such file" in lines[1]
    assert all(line.startswith("error: ") for line in lines)


READERS_OF_PLANS = (
    "train 901 3d_fullres 0",
    "train 901 3d_fullres 0 --as other",
    "preprocess_unlabeled -d 901",
    "compare -d 901 -c 3d_fullres --trainers SupervisedTrainer MeanTeacherTrainer",
    "text_effect -d 901 -c 3d_fullres",
    "pretrain_vlm -d 901",
)


@pytest.mark.parametrize("command", READERS_OF_PLANS)
def test_plans_that_are_missing_are_named(tiny_dataset, monkeypatch, capsys, command):
    dataset = tiny_dataset(size=6)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    option = "-plans_name" if command.startswith("preprocess") else "-p"
    (line,) = error_lines(capsys, *command.split())
    file = dataset.preprocessed / "nnUNetPlans.json"
    plan = "plan first with nnunet_semiseg plan_and_preprocess -d 901"
    assert line == f"error: {file}: no such plans: {plan}"

    dataset.preprocessed.mkdir(parents=True)
    for name in ("nnUNetSemiSegSmallPlans", "nnUNetPlans"):
        (dataset.preprocessed / f"{name}.json").write_text(json.dumps({"plans_name": name}))
    (line,) = error_lines(capsys, *command.split(), option, "nnUNetSemiSegPlans")
    there = f"there are nnUNetPlans, nnUNetSemiSegSmallPlans: choose with {option}"
    file = dataset.preprocessed / "nnUNetSemiSegPlans.json"
    assert line == f"error: {file}: no such plans; {there}; or {plan} -pl SemiSegPlanner"


@pytest.mark.parametrize(
    "command",
    [
        "distill -tr MeanTeacherTrainer",
        "export -tr MeanTeacherTrainer --onnx F",
        "text_masks -tr MeanTeacherTrainer -o F",
    ],
)
def test_models_with_other_plans_are_named(tiny_dataset, capsys, command):
    dataset = tiny_dataset(size=6)
    models = [dataset.results / f"MeanTeacherTrainer__{plans}__2d" for plans in ("nnUNetSemiSegSmallPlans", "Mine")]
    models[0].mkdir(parents=True)
    (dataset.results / "CPSTrainer__Another__2d").mkdir()
    missing = f"error: {dataset.results / 'MeanTeacherTrainer__nnUNetPlans__2d'}: no such model; there"
    words = [*command.split(), "-d", "901", "-c", "2d"]
    (line,) = error_lines(capsys, *words)
    assert line == f"{missing} is one with nnUNetSemiSegSmallPlans: choose with -p"
    models[1].mkdir()
    (line,) = error_lines(capsys, *words)
    assert line == f"{missing} are models with Mine, nnUNetSemiSegSmallPlans: choose with -p"


def test_every_default_of_plans_is_nnunets():
    defaults = {}
    for command in cli.COMMANDS:
        parser = ArgumentParser()
        command.add_arguments(parser)
        actions = parser._option_string_actions
        defaults |= {(command.name, n): actions[n].default for n in {"-p", "-plans_name"} & set(actions)}
    assert set(defaults.values()) == {"nnUNetPlans"} and len(defaults) == 10
    assert PlanningRequest(dataset_ids=[1]).planner == "ExperimentPlanner"


def test_plan_and_preprocess_hands_on_its_flags(monkeypatch):
    got = []
    monkeypatch.setattr("nnunet_semiseg.planning.plan_and_preprocess", got.append)
    command = "plan_and_preprocess -d 1 2 -c 2d 3d_fullres -np 3 4 -npfp 5 -pl P -gpu_memory_target 11"
    command += " -overwrite_target_spacing 3 2 1.5 -overwrite_plans_name N --verify_dataset_integrity"
    command += " --clean --no_pp --labeled_only"
    command += " --verbose --no_pbar --set a=1 b=2 --set c=3"
    assert cli.main(command.split()) == 0
    assert got == [
        PlanningRequest(
            dataset_ids=[1, 2],
            configurations=["2d", "3d_fullres"],
            planner="P",
            num_processes=[3, 4],
            num_processes_fingerprint=5,
            gpu_memory_target=11,
            overwrite_target_spacing=[3, 2, 1.5],
            overwrite_plans_name="N",
            verify_dataset_integrity=True,
            clean=True,
            preprocess=False,
            labeled_only=True,
            settings=["a=1", "b=2", "c=3"],
            show_progress_bar=False,
            verbose=True,
        )
    ]


def pretend_training(monkeypatch, plans_file) -> list[list[str]]:
    """nnU-Net's command begins to train and ends: the trainer puts the settings into the plans. Gives its words."""
    called = []

    def begin():
        called.append(sys.argv[1:])
        store_given(plans_file)

    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", begin)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    return called


def test_train_writes_settings_and_runs_nnunets_training(tiny_dataset, monkeypatch, capsys):
    dataset = tiny_dataset(size=6)
    write_plans(dataset, semiseg={"num_epochs": 9})
    plans_file = dataset.preprocessed / "nnUNetSemiSegPlans.json"
    called = pretend_training(monkeypatch, plans_file)
    command = "train -device cpu 901 3d_fullres all -p nnUNetSemiSegPlans -tr SupervisedTrainer --npz --c"
    assert cli.main([*command.split(), "--set", "num_epochs=3", "num_iterations_per_epoch=7"]) == 0
    assert json.loads(plans_file.read_text())["semiseg"] == {"num_epochs": 3, "num_iterations_per_epoch": 7}
    printed = capsys.readouterr().out
    assert "num_epochs 9 -> 3, for every trainer with these plans" in printed
    positional, options = called[0][:3], called[0][3:]
    assert positional == ["901", "3d_fullres", "all"]
    expected = "-tr SupervisedTrainer -p nnUNetSemiSegPlans -device cpu --npz --c"
    assert options == expected.split()

    (line,) = error_lines(capsys, *command.split(), "--set", "num_epoks=3")
    assert line.startswith("error: unknown setting num_epoks") and len(called) == 1
    before = plans_file.read_text()
    assert cli.main([*command.split(), "--set", "num_epochs=much"]) == 1
    assert "->" not in capsys.readouterr().out  # nothing is announced that is then refused
    (line,) = error_lines(capsys, *command.split(), "--set", "num_epochs=3", "ema_decay=0.9")
    assert line.startswith("error: --set ema_decay: SupervisedTrainer has no such setting: it has bfloat16_on_cpu, co")
    (line,) = error_lines(capsys, *command.replace("SupervisedTrainer", "nnUNetTrainer").split(), "--set", "seed=3")
    assert line.endswith("nnU-Net's own trainers have none: use SupervisedTrainer")
    assert plans_file.read_text() == before
    (line,) = error_lines(capsys, *command.replace("SupervisedTrainer", "SupervizedTrainer").split())
    assert line.startswith("error: SupervizedTrainer: no such trainer: use SupervisedTrainer")
    assert len(called) == 1


def test_train_with_a_copy_of_the_plans(tiny_dataset, monkeypatch, capsys):
    dataset = tiny_dataset(size=6)
    base = write_plans(dataset, "P")
    called = pretend_training(monkeypatch, dataset.preprocessed / "off.json")
    command = "train 901 2d all -p P -tr STLUNetTrainer -device cpu --as off --set".split()
    assert cli.main([*command, "mixing=off"]) == 0
    assert called[0][-4:] == ["-p", "off", "-device", "cpu"]
    assert dataset.plans("off") == base | {"plans_name": "off", "semiseg": {"STLUNetTrainer": {"mixing": "off"}}}
    assert dataset.plans("P") == base
    (line,) = error_lines(capsys, *command, "mixing=off")
    assert line.endswith("off.json: these plans exist already: continue with -p off, or choose another name")
    begun = dataset.results / "STLUNetTrainer__off__2d" / "fold_all" / "checkpoint_latest.pth"
    begun.parent.mkdir(parents=True)
    begun.touch()
    (line,) = error_lines(capsys, *command, "mixing=off")
    assert line.endswith("continue with -p off --c, or choose another name")
    (line,) = error_lines(
        capsys, *"train 901 2d all -p P -tr STLUNetTrainer -device cpu --as new --set mixin=off".split()
    )
    assert "unknown setting mixin" in line and not (dataset.preprocessed / "new.json").exists()
    # a copy by hand, in which the name was forgotten
    (dataset.preprocessed / "hand.json").write_text(json.dumps(base))
    (line,) = error_lines(capsys, *"train 901 2d all -p hand -tr STLUNetTrainer -device cpu".split())
    assert "its plans_name is P, so a training would overwrite the model of those plans" in line and len(called) == 1
    assert "set plans_name in this file to hand;" in line


def test_a_refused_training_leaves_the_plans_as_they_are(tiny_dataset, monkeypatch, capsys):
    dataset = tiny_dataset(size=6)
    plans_file = dataset.preprocessed / "nnUNetSemiSegPlans.json"
    write_plans(dataset, semiseg={"num_epochs": 9})

    def refuse():
        plans = json.loads(plans_file.read_text())
        assert plans["semiseg"] == {"num_epochs": 9}  # nothing is written before the training has begun
        assert with_given(plans)["semiseg"] == {"num_epochs": 3}  # what the trainer trains with
        store_settings(plans_file, {"seed": 3})  # of another command
        raise UserError("too few")

    monkeypatch.setattr("nnunetv2.run.run_training.run_training_entry", refuse)
    monkeypatch.setattr(sys, "argv", ["nnunet_semiseg"])
    command = "train 901 3d_fullres all -p nnUNetSemiSegPlans -tr MeanTeacherTrainer -device cpu --set num_epochs=3"
    assert error_lines(capsys, *command.split()) == ["error: too few"]
    assert json.loads(plans_file.read_text())["semiseg"] == {"num_epochs": 9, "seed": 3}
    assert GIVEN not in os.environ


def test_train_takes_every_option_of_nnunet(monkeypatch, capsys):
    from nnunetv2.run.run_training import run_training_entry

    def options(call):
        with pytest.raises(SystemExit):
            call()
        return set(re.findall(r"\[(-\S+?)[\] ]", capsys.readouterr().out))

    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "--help"])
    assert options(run_training_entry) <= options(lambda: cli.main(["train", "--help"]))


def test_embed_prompts_and_demo_hand_on_their_arguments(tiny_dataset, monkeypatch):
    dataset = tiny_dataset(size=6)
    called = []
    monkeypatch.setattr(
        "nnunet_semiseg.text.prompt_learner.embed_prompts",
        lambda *args: called.append((args[0]["labels"], *args[1:])),
    )
    assert cli.main("embed_prompts -d 901 -o F.safetensors -pretrained W.pt -cache_dir C".split()) == 0
    labels = {"background": 0, "kidney": 1, "tumour": 2}
    monkeypatch.setattr("nnunet_semiseg.demo.run_demo", lambda *args: called.append(args))
    assert cli.main("demo -o D".split()) == 0
    assert called == [
        (labels, "ViT-B-32", "W.pt", "C", "F.safetensors", str(dataset.raw / "dataset.json"), EMBED_OPTIONS),
        ("D", "cpu"),
    ]


@pytest.mark.parametrize(
    "line, said",
    [
        ("comapre -d 901", "comapre: no such command: did you mean compare?"),
        ("nothing", "nothing: no such command: nnunet_semiseg -h lists them"),
        ("compare -d 901 -c 2d --trainer A B", "--trainer: no such option: did you mean --trainers?"),
        ("convert folder -i X -d 901 --lables a", "--lables: no such option: did you mean --labels or --labeled?"),
        ("convert -i X -d 901 --dryrun", "--dryrun: no such option: did you mean --dry-run?"),
        (
            "train 901 2d 0 --num_epochs 3",
            "--num_epochs: this is a setting, not an option: write --set num_epochs=VALUE",
        ),
        ("share -d 901 -c 2d -device cpu", "-device: no such option (nnunet_semiseg share -h"),
        ("plan_and_preprocess -d 901 -device=cpu", "-device: no such option"),
        ("compare -d901 -c 2d -tr A", "-tr: no such option: did you mean --trainers? ("),
        ("predict -d 901", "predict: no such command: did you mean nnUNetv2_predict?"),
        ("share -d 901 -c 2d word", "word: this is one word too many: remove it (nnunet_semiseg share -h"),
        ("status", "the following arguments are required: -d (nnunet_semiseg status -h"),
    ],
)
def test_a_typo_ends_in_one_line_that_names_what_is_near(line, said, capsys):
    try:
        assert cli.main(line.split()) == 2
    except SystemExit as stop:
        assert stop.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {said}")


def test_a_long_option_may_have_one_dash_or_two():
    parse = cli.make_parser().parse_args
    args = parse("preprocess_unlabeled -d 901 --num_parts 3 --part_id=1".split())
    assert (args.num_parts, args.part_id) == (3, 1)
    args = parse("review -d901 -c 2d -num_parts 3 -part_id 1 --tr A".split())
    assert (args.dataset, args.parts, args.part, args.trainer) == ("901", 3, 1, "A")
    assert parse("embed_prompts -d 901 -o F --model M".split()).model == "M"
    assert parse("pretrain_vlm -d 901 -model M".split()).model == "M"
    assert parse("compare -d901 -c 2d -trainers A B".split()).trainers == ["A", "B"]


def test_no_word_at_all_shows_the_commands(capsys):
    assert cli.main([]) == 2
    assert "  plan_and_preprocess " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["folder", "la2018", "brats2019"])
def test_help_of_a_converter_fits_80_columns_and_has_an_example(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["convert", name, "-h"])
    prose, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert max(map(len, prose.splitlines())) <= 80
    assert f"nnunet_semiseg convert {name} -i" in examples


def test_env_prints_the_export_line(capsys):
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out.startswith("export nnUNet_extTrainer=")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("plan", {"plan_and_preprocess"}),
        ("convert fol", {"folder"}),
        ("convert folder -d 501 --lab", {"--labeled", "--labels", "--label-values"}),
        ("convert la2018 --lab", {"--labeled"}),
        ("settings pre", {"pretrain_vlm"}),
        ("settings UA", {"UAMTTrainer"}),
        ("compare -d ", {"901"}),
        ("compare --trainers UA", {"UAMTTrainer"}),
        ("train 901 ", {"2d", "3d_fullres", "3d_lowres"}),
        ("train 901 2d 0 -p ", {"nnUNetPlans", "nnUNetSemiSegPlans"}),
        ("preprocess_unlabeled -d 901 -plans_name nnUNetS", {"nnUNetSemiSegPlans"}),
        ("compare -d 902 -p ", set()),
        ("plan_and_preprocess -pl SemiSegPlannerS", {"SemiSegPlannerSmall"}),
        ("plan_and_preprocess -pl E", {"ExperimentPlanner"}),
    ],
)
def test_the_tab_key_completes_commands_options_and_names(line, expected, tiny_dataset, tmp_path, monkeypatch):
    pytest.importorskip("argcomplete")
    dataset = tiny_dataset(size=6)
    for plans in ("nnUNetPlans", "nnUNetSemiSegPlans"):
        write_plans(dataset, plans)
    line, answer = f"nnunet_semiseg {line}", tmp_path / "answer"
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("_ARGCOMPLETE_STDOUT_FILENAME", str(answer))
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    command = [sys.executable, "-X", "importtime", "-m", "nnunet_semiseg.cli"]
    imported = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stderr
    words = set(answer.read_text(encoding="utf-8").split())
    assert {word for word in words if not word.startswith("-") or "--" in line} == expected
    assert not re.search(r"\| +torch$", imported, re.MULTILINE)


def test_the_tab_key_knows_all_planners():
    assert set(planner_names()) == {"ExperimentPlanner", *(planner.__name__ for planner in iter_classes("planners"))}


@pytest.mark.slow
def test_the_command_with_real_processes(tiny_dataset):
    dataset = tiny_dataset(labeled=2, unlabeled=3)
    dataset.plan(preprocess=False)  # the fingerprint, in less time
    dataset.image("un_001").write_bytes(b"no image")
    command = "-m nnunet_semiseg.cli plan_and_preprocess -d 901 -c 3d_fullres -np 1 --no_pbar"
    command += " -pl SemiSegPlannerSmall"
    run = subprocess.run([sys.executable, *command.split()], capture_output=True, encoding="utf-8")
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ") and "un_001_0000.nii.gz: cannot be read" in line
    made = {file.name for file in dataset.preprocessed.glob("*_3d_fullres*/*.pkl")}
    assert made == {"tr_000.pkl", "tr_001.pkl", "un_000.pkl", "un_002.pkl"}
    assert not list(dataset.preprocessed.glob("*__unlabeled.*"))


def test_of_very_many_problems_the_first_and_the_last_are_shown(capsys):
    report(UserError("\n".join([*(f"case {i}: no spacing" for i in range(300)), "fix them and run it again"])))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 30 and lines[0] == "error: case 0: no spacing" and lines[27] == "error: case 27: no spacing"
    assert lines[28:] == ["error: ... and 272 more like these", "error: fix them and run it again"]
    report(UserError("\n".join(map(str, range(30)))))
    assert capsys.readouterr().err.splitlines() == [f"error: {i}" for i in range(30)]
