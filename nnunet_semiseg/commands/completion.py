"""The values that the shell's tab key proposes, if argcomplete is installed."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser
from pathlib import Path

from nnunet_semiseg.planning_request import CONFIGURATIONS


def trainer_names(**_) -> list[str]:
    """All trainers of this package."""
    from nnunet_semiseg.settings.described import trainers

    return list(trainers())


def dataset_numbers(**_) -> list[str]:
    """The numbers of all raw datasets. There are none if `nnUNet_raw` is not set."""
    folders = Path(os.environ.get("nnUNet_raw") or os.devnull).glob("Dataset*")
    return sorted(str(int(match[1])) for folder in folders if (match := re.match(r"Dataset(\d{3})_", folder.name)))


def configurations(**_) -> list[str]:
    """nnU-Net's configurations."""
    return list(CONFIGURATIONS)


COMPLETERS = {"TRAINER": trainer_names, "ID": dataset_numbers, "CONFIG": configurations}
"""for each metavar of an argument, the function that lists its values"""


class CompletingParser(ArgumentParser):
    """A parser whose arguments know the values that can be typed for them."""

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        if isinstance(action.metavar, str) and action.metavar in COMPLETERS:
            setattr(action, "completer", COMPLETERS[action.metavar])  # noqa: B010, argcomplete's name
        return action
