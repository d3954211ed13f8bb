"""Run a command in a separate process. This module imports little, because every job in a queue starts with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

SECONDS = 0.5
"""The number of seconds between two checks whether somebody still waits for the result."""


class Process:
    """A command that is running.

    Args:
        log: the output of the command is added to the end of this file.
        device: the value of CUDA_VISIBLE_DEVICES. '' means: do not change it.
    """

    def __init__(self, command: list[str], log: Path, device: str = ""):
        self.log = log
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}) | {"PYTHONUNBUFFERED": "1"}
        with open(log, "ab") as printed:  # worker.py ends when its stdin is closed, and so with this process
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=printed, stderr=printed, start_new_session=True
            )

    def result(self, timeout: float | None = None) -> str | None:
        """Wait for the end of the command. Returns what went wrong, or None.

        Raises:
            TimeoutExpired: the command is still running.
        """
        return say_what_failed(self.process.wait(timeout), self.log)

    def cancel(self) -> None:
        """End the command and all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Work:
    """A function that is put into a queue: it runs a command and returns what went wrong, or None.

    Args:
        command: the words of the command.
        log: the file for its output.
        device: see `Process`.
        asked_by: a process of this computer that waits for the result. When that process ends, the command ends, too.
            None: nobody needs to wait.
    """

    def __init__(self, command: list[str], log: Path, device: str = "", asked_by: int | None = None):
        self.command, self.log, self.device, self.asked_by = command, log, device, asked_by

    def __call__(self) -> str | None:
        process = Process(self.command, self.log, self.device)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.result(SECONDS if self.asked_by else None)
                if self.asked_by and not is_alive(self.asked_by):
                    return "nobody waits for it any more"
        finally:
            process.cancel()

    def checkpoint(self):
        """Put the same work into the queue again. submitit calls this if a job is interrupted or its time is over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def is_alive(process: int) -> bool:
    """Whether a process with this number exists on this computer."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True


def say_what_failed(status: int, log: Path) -> str | None:
    """The last line that a failed process printed. If the process was killed, the line says so instead.

    None if its exit status is 0.
    """
    if status == 0:
        return None
    if status < 0:
        why = f"was killed by {signal.Signals(-status).name}, by someone or because memory ran out"
        return f"{why}: run the same command again to continue (all output: {log})"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'failed'} (exit status {status}; all output: {log})"
