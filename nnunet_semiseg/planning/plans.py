"""Files of plans: reading and copying them, and the command that makes them."""

from __future__ import annotations

from pathlib import Path

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunet_semiseg.discovery import iter_classes
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import write_json
from nnunet_semiseg.planning.planners import default_plans_name
from nnunet_semiseg.schema import load_plans, names_of_plans
from nnunet_semiseg.settings.plans import locked


def read_plans(preprocessed: Path, name: str, option: str = "-p") -> dict:
    """Read the plans with this name from a dataset's preprocessed data.

    Args:
        option: the option of the command that names the plans, for the message.

    Raises:
        UserError: there are no such plans (the message lists the plans that exist), or the file is damaged.
    """
    file = preprocessed / f"{name}.json"
    plan_first = f"plan first with {planning_command(preprocessed.name, name)}"
    if file.is_file():
        return load_plans(file, plan_first)
    if there := names_of_plans(preprocessed):
        names = f"there {'are' if len(there) > 1 else 'is'} {', '.join(there)}: choose with {option}"
        raise UserError(f"{file}: no such plans; {names}; or {plan_first}")
    raise UserError(f"{file}: no such plans: {plan_first}")


def planning_command(dataset: str, plans_name: str) -> str:
    """The command that makes plans with this name."""
    command = f"nnunet_semiseg plan_and_preprocess -d {convert_dataset_name_to_id(dataset)}"
    if plans_name == default_plans_name(ExperimentPlanner):
        return command
    for ours in iter_classes("planners"):
        for planner in ours.__mro__:  # nnU-Net's presets are base classes of ours
            if issubclass(planner, ExperimentPlanner) and default_plans_name(planner) == plans_name:
                return f"{command} -pl {planner.__name__}"
    return f"{command} -overwrite_plans_name {plans_name}"


def check_plans_name(plans_file: Path) -> None:
    """Raise UserError if there are no such plans, or if the name inside the file is another one."""
    plans = read_plans(plans_file.parent, plans_file.stem)
    if plans["plans_name"] != plans_file.stem:  # nnU-Net names the model after plans_name
        raise UserError(
            f"{plans_file}: its plans_name is {plans['plans_name']}, so a training would overwrite the model of those"
            f" plans: set plans_name in this file to {plans_file.stem}; to copy plans, run nnunet_semiseg train ..."
            " --as NAME"
        )


def copy_plans(plans_file: Path, name: str, keep: bool = False, begun: bool = False) -> Path:
    """Copy plans under another name, for the same preprocessed data.

    Args:
        keep: whether plans with the new name that exist already are kept as they are.
        begun: whether a training with the new name has a checkpoint, so that `--c` continues it.

    Raises:
        UserError: there are no such plans; or plans with the new name exist already, and `keep` is False.
    """
    plans = read_plans(plans_file.parent, plans_file.stem)
    copy = plans_file.with_name(f"{name}.json")
    with locked(copy):
        if copy.exists() and keep:
            return copy
        if copy.exists():
            how = f"-p {name} --c" if begun else f"-p {name}"
            raise UserError(f"{copy}: these plans exist already: continue with {how}, or choose another name")
        write_json({**plans, "plans_name": name}, copy)
    return copy
