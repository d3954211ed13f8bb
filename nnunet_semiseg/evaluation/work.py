"""A command in a process of its own. It imports little, because every job in a queue starts with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

SECONDS = 0.5
"""seconds between two checks whether somebody still waits for the result"""


class Process:
    """A command that is running.

    Args:
        log: its output is added to the end of this file.
        device: CUDA_VISIBLE_DEVICES; '' leaves it as it is.
    """

    def __init__(self, command: list[str], log: Path, device: str = ""):
        self.log = log
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}) | {"PYTHONUNBUFFERED": "1"}
        with open(log, "ab") as printed:  # the command ends when its stdin is closed, and so with this process
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=printed, stderr=printed, start_new_session=True
            )

    def result(self, timeout: float | None = None) -> str | None:
        """Wait for the end of the command. Returns what went wrong, or None.

        Raises:
            TimeoutExpired: it is still running.
        """
        return say_what_failed(self.process.wait(timeout), self.log)

    def cancel(self) -> None:
        """End it, with all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Work:
    """What is put into a queue: a command and the file for its output. It returns what went wrong, or None.

    Args:
        device: see `Process`.
        asked_by: a process of this computer that waits for the result. When that process ends, so does the command.
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
        """submitit calls this when a job is interrupted. It puts the same work into the queue again."""
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
    """The last line that a failed process printed. If it was killed, that is said instead."""
    if status == 0:
        return None
    if status < 0:
        why = f"was killed by {signal.Signals(-status).name}, by someone or because memory ran out"
        return f"{why}: run the same command again to continue (all output: {log})"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'failed'} (exit status {status}; all output: {log})"
