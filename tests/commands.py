"""Installed commands, each in a process of its own that need not import torch and nnU-Net: that takes 6 seconds.

A server has imported them, and is forked for each command. What a command would spawn is forked, too.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

LOGS = TemporaryDirectory()
"""what the commands print; removed when the tests end"""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "nnunetv2.run.run_training",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
    "nnunetv2.model_sharing.entry_points",
    "nnunetv2.training.nnUNetTrainer.primus.primus_trainers",  # the search for a trainer imports it, and with it timm
    "monai",
])


def command(name: str, *args, **options) -> str:
    """Run this command as `start` does: gives what it printed.

    Raises:
        AssertionError: it has failed.
    """
    process, log = start(name, *args, **options)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def start(name: str, *args, without: Sequence[str] = (), **env: str) -> tuple[BaseProcess, Path]:
    """Begin the command of this name: gives its process, and the file of what it prints.

    Args:
        args: what stands behind the name on the command line.
        without: packages that it cannot import.
        env: what differs from the environment of now.
    """
    with NamedTemporaryFile(dir=LOGS.name, suffix=".txt", delete=False) as log:
        arguments = [name, *map(str, args)], tuple(without), {**os.environ, **env}, log.name
    process = SERVER.Process(target=_do, args=arguments)
    process.start()
    return process, Path(log.name)


class Popen:
    """`subprocess.Popen` of a command as `start` begins it, for code that reads what it prints, and waits for it."""

    def __init__(self, words: list[str], env: dict[str, str], **pipes):
        self.process, self.log = start(Path(words[0]).name, *words[1:], **env)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *error) -> None:
        self.process.join()

    @property
    def stdout(self) -> list[str]:
        self.process.join()
        return self.log.read_text().splitlines(keepends=True)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


def _do(words: list[str], without: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    import torch

    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    assert not any(module.partition(".")[0] in without for module in sys.modules)
    sys.modules.update(dict.fromkeys(without))
    multiprocessing.set_start_method("fork", force=True)  # the server's is another
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    torch.set_num_threads = lambda number: None  # what is forked from a process with threads may wait for ever
    (script,) = entry_points(group="console_scripts", name=words[0])
    sys.argv = words
    sys.exit(script.load()())
