import json
import math
import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.settings.base import ConsistencySettings, SemiSupervisedSettings, TeacherSettings, TrainingSettings
from nnunet_semiseg.settings.plans import (
    changed_settings,
    given_settings,
    known_settings,
    parse_assignments,
    read_settings,
    refuse_foreign,
    store_given,
    store_settings,
    update_settings,
    with_given,
)
from nnunet_semiseg.trainers.semi_cml import SemiCMLTrainer
from nnunet_semiseg.trainers.supervised import SupervisedTrainer
from nnunet_semiseg.trainers.text_semiseg import TextSemiSegSettings, TextSemiSegTrainer
from nnunet_semiseg.trainers.ua_mt import UAMTTrainer


def read(settings_class, **given):
    return read_settings(settings_class, {"semiseg": given})


def test_defaults_are_nnunets():
    settings = read_settings(TrainingSettings, {})
    assert (settings.num_epochs, settings.num_iterations_per_epoch, settings.num_val_iterations_per_epoch) == (
        1000,
        250,
        50,
    )


def test_values_are_typed():
    settings = read(TextSemiSegSettings, tmr="copy", csa=False, dca_start=1, unlabeled_batch_size=3)
    assert (settings.tmr, settings.csa, settings.unlabeled_batch_size) == ("copy", False, 3)
    assert isinstance(settings.dca_start, float)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"num_epoch": 3}, ["num_epoch", "num_epochs"]),
        ({"num_epochs": "many"}, ["num_epochs", "whole number"]),
        ({"num_epochs": 1.5}, ["whole number"]),
        ({"num_epochs": True}, ["whole number"]),
        ({"num_epochs": 0}, ["num_epochs=0", "1 or more"]),
        ({"tmr": "planes"}, ["multiplanar or copy or off"]),
        ({"csa": 1}, ["true or false"]),
        ({"dca_start": 1.5}, ["from 0 to 1"]),
        ({"dca_weight": float("inf")}, ["a number"]),
        ({"seed": -1}, ["from 0 to"]),
        ({"unlabeled_batch_size": 0}, ["1 or more"]),
        ({"memory": "most"}, ["memory", "stock or fast or small"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given, words):
    with pytest.raises(UserError) as error:
        read(TextSemiSegSettings, **given)
    assert all(w in str(error.value) for w in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, wrong, value",
    [("perturbations", "noise", "noise"), ("contrast_gammas", "2", "2"), ("modalities", "[0]", "0")],
)
def test_how_a_list_is_typed_is_shown_and_works(key, wrong, value):
    with pytest.raises(UserError, match=f"{key}=.*: must be a list of .*; fix it with --set {key}=") as error:
        update_settings({}, parse_assignments([f"{key}={wrong}"]))
    shown = str(error.value).partition("--set ")[2]
    for i in "01":  # a list of lists names channels, which must differ
        shown = shown.replace("VALUE, VALUE", f"{i}, {int(i) + 2}", 1) if key == "modalities" else shown
    (typed,) = shlex.split(shown.replace("VALUE", value))
    (section,) = update_settings({}, parse_assignments([typed]))["semiseg"].values()
    assert section[key]


def test_a_trainer_passes_over_settings_of_others_and_refuses_those_of_none():
    assert read(TrainingSettings, tmr="copy", ema_decay=0.9).num_epochs == 1000
    with pytest.raises(UserError, match="ema_decay"):
        read(TrainingSettings, ema_decai=0.9)


def test_assignments():
    assert parse_assignments(["num_epochs=10", "tmr=copy", "csa=false", "seed=null", "a=[1, 2]", "b=x=y"]) == {
        "num_epochs": 10,
        "tmr": "copy",
        "csa": False,
        "seed": None,
        "a": [1, 2],
        "b": "x=y",
    }
    with pytest.raises(UserError, match="^--set seed=2: seed is given twice: give it once$"):
        parse_assignments(["seed=1", "num_epochs=3", "seed=2"])
    for wrong in ("num_epochs", "=3"):
        with pytest.raises(UserError, match="KEY=VALUE"):
            parse_assignments([wrong])


def test_update_checks_and_leaves_the_plans_alone():
    plans = {"semiseg": {"num_epochs": 5}, "other": 1}
    assert update_settings(plans, {"seed": 3})["semiseg"] == {"num_epochs": 5, "seed": 3}
    assert plans["semiseg"] == {"num_epochs": 5}
    with pytest.raises(UserError, match="whole number"):
        update_settings(plans, {"num_epochs": "x"})
    with pytest.raises(UserError, match="did you mean"):
        update_settings(plans, {"ema_decays": 0.5})


def test_every_trainers_settings_are_known():
    known = known_settings()
    assert {"num_epochs", "unlabeled_batch_size", "ema_decay", "deploy", "tmr", "consistency_weight"} <= set(known)
    assert issubclass(TeacherSettings, SemiSupervisedSettings)


def test_what_a_trainer_declares_itself_is_kept_for_it_alone():
    """`mc_passes` is another thing to UAMTTrainer (8) and to SemiCMLTrainer (4)."""
    changed = {"mc_passes": 3, "num_epochs": 5}
    plans = update_settings({"semiseg": {"mc_passes": 6, "seed": 1}}, changed, UAMTTrainer)
    assert plans["semiseg"] == {"mc_passes": 6, "seed": 1, "num_epochs": 5, "UAMTTrainer": {"mc_passes": 3}}

    def passes(trainer):
        return read_settings(trainer.settings_class, plans, trainer).mc_passes

    class Heir(UAMTTrainer):
        pass

    assert (passes(UAMTTrainer), passes(Heir), passes(SemiCMLTrainer)) == (3, 3, 6)  # 6: plans of before
    assert read_settings(SemiCMLTrainer.settings_class, {"semiseg": {"UAMTTrainer": {"mc_passes": 3}}}).mc_passes == 4
    with pytest.raises(UserError, match="^unknown setting mc_pases"):
        read_settings(UAMTTrainer.settings_class, {"semiseg": {"UAMTTrainer": {"mc_pases": 3}}}, UAMTTrainer)
    # of no trainer in particular, as plan_and_preprocess has it
    for key in ("SemiCMLTrainer.mc_passes", "perturbations", "tmr"):
        value = {"perturbations": ["noise"], "tmr": "copy"}.get(key, 2)
        plans = update_settings(plans, {key: value})
    assert (passes(UAMTTrainer), passes(SemiCMLTrainer)) == (3, 2)
    assert plans["semiseg"]["CCTTrainer"] == {"perturbations": ["noise"]} and plans["semiseg"]["tmr"] == "copy"
    for key, message in {
        "mc_passes": "it means another thing to each trainer that has it: write SemiCMLTrainer.mc_passes=VALUE or UAMT",
        "CPSTrainer.mc_passes": "CPSTrainer has no such setting: write SemiCMLTrainer.mc_passes=VALUE or",
    }.items():
        with pytest.raises(UserError, match=f"^--set {key}: {message}"):
            update_settings({}, {key: 2})
    with pytest.raises(UserError, match="^--set SemiCMLTrainer.mc_passes: UAMTTrainer has no such setting"):
        refuse_foreign(UAMTTrainer, ["mc_passes", "UAMTTrainer.mc_passes", "SemiCMLTrainer.mc_passes"])


def write_plans(folder, **settings):
    file = folder / "P.json"
    file.write_text(json.dumps({"plans_name": "P", "configurations": {}, "semiseg": settings}), encoding="utf-8")
    return file


def settings_in(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))["semiseg"]


def test_of_two_commands_at_once_neither_loses_a_setting(tmp_path):
    """As many commands as there are weights, each with a setting of its own and one that all have."""
    file = write_plans(tmp_path, num_epochs=9)
    names = sorted(name for name, have in known_settings().items() if name.endswith("_weight") and len(have) == 1)
    assert len(names) > 8
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: store_settings(file, {name: 0.75, "seed": 3}), names))
    settings = settings_in(file)
    own = [settings.pop(key) for key in list(settings) if key.endswith("Trainer")]
    found = settings | {name: value for section in own for name, value in section.items()}
    assert found == {"num_epochs": 9, "seed": 3, **dict.fromkeys(names, 0.75)}
    assert [f.name for f in tmp_path.iterdir()] == ["P.json"]


def test_a_refused_setting_writes_nothing_not_even_the_others_of_its_command(tmp_path):
    file = write_plans(tmp_path, num_epochs=9)
    before = file.stat().st_mtime_ns
    with pytest.raises(UserError, match="ema_decay=2: must be"):
        store_settings(file, {"num_epochs": 5, "ema_decay": 2})
    assert settings_in(file) == {"num_epochs": 9} and file.stat().st_mtime_ns == before


def test_given_settings_reach_the_trainer_before_they_reach_the_plans(tmp_path, capsys):
    file = write_plans(tmp_path, num_epochs=9)
    with given_settings({"num_epochs": 5}):
        assert with_given({"semiseg": {"num_epochs": 9, "seed": 1}})["semiseg"] == {"num_epochs": 5, "seed": 1}
        store_settings(file, {"seed": 2})  # another command, meanwhile
        capsys.readouterr()
        store_given(file)
    assert settings_in(file) == {"num_epochs": 5, "seed": 2}
    assert capsys.readouterr().out == f"{file}: num_epochs 9 -> 5, for every trainer with these plans\n"
    assert with_given({}) == {}
    store_given(file)
    assert settings_in(file) == {"num_epochs": 5, "seed": 2}


def test_changed_settings_are_a_trainers_own_and_defaults_count():
    old = {"semiseg": {"num_epochs": 5, "perturbations": ["noise"], "seed": 1}}
    new = {"semiseg": {"num_epochs": 1000, "seed": 1, "tmr": "copy"}}
    assert changed_settings(SupervisedTrainer, old, new) == {"num_epochs": (5, 1000)}
    assert changed_settings(SupervisedTrainer, {}, new) == {"seed": (None, 1)}  # 1000 epochs are the default
    assert changed_settings(TextSemiSegTrainer, old, new)["tmr"] == ("multiplanar", "copy")
    own = {"semiseg": {"UAMTTrainer": {"mc_passes": 3}, "SemiCMLTrainer": {"mc_passes": 2}}}
    assert changed_settings(UAMTTrainer, {"semiseg": {"mc_passes": 5}}, own) == {"mc_passes": (5, 3)}
    other_default = {"num_epochs": 250, "seed": 1, "setting_of_an_older_version": 1}
    assert changed_settings(SupervisedTrainer, {"semiseg": {"seed": 1}}, new, other_default) == {
        "num_epochs": (250, 1000)
    }


@pytest.mark.parametrize(
    "epochs, iterations, decay",
    [(8, 250, 0.99), (1, 10, 0.9), (2, 250, 0.96), (200, 250, 0.999), (1000, 250, 0.999), (40, 250, 1 - 10**-2.5)],
)
def test_the_decay_of_the_teacher_grows_with_the_length(epochs, iterations, decay):
    """10,000 iterations are 5 times 2,000 and a fifth of 50,000: the geometric mean of 0.01 and 0.001."""
    settings = TeacherSettings(num_epochs=epochs, num_iterations_per_epoch=iterations)
    assert settings.decay == pytest.approx(decay)
    assert TeacherSettings(num_epochs=epochs, ema_decay=0.5).decay == 0.5


def test_the_paper_is_one_setting_away():
    ours, papers = ConsistencySettings(), ConsistencySettings(consistency="paper")
    assert (ours.weight(0.4), papers.weight(1.0)) == (1, 0.1)
    assert ours.weight(0.2) == pytest.approx(math.exp(-5 * 0.25))  # half of the ramp
    assert papers.weight(0.5) == pytest.approx(0.1 * math.exp(-5 * 0.25))
    other = ConsistencySettings(consistency_weight=2, ramp_length=0.1)
    assert other.weight(0.1) == 2
