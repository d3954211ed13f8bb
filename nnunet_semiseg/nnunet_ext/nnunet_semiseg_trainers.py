"""The only module that nnU-Net imports from the folders in ``nnUNet_extTrainer``. nnU-Net forgets it afterwards.

nnU-Net asks for a trainer with ``hasattr``. The trainers come from ``nnunet_semiseg.trainers`` by absolute import, so
that each class exists once and can be pickled. An ImportError is passed on; it does not mean "no such trainer".
"""

from nnunet_semiseg.discovery import find_class
from nnunet_semiseg.quiet import hide_foreign_warnings
from nnunet_semiseg.training_command import check_running_command, check_spelling


def __getattr__(name: str) -> type:
    trainer = find_class("trainers", name)
    if trainer is None:
        check_spelling(name)
        raise AttributeError(f"nnunet_semiseg has no trainer {name}")
    hide_foreign_warnings()
    check_running_command()
    return trainer
