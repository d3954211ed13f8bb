"""The jobs of a comparison by submitit: in a cluster's queue, or on this computer.

A job in a queue goes on when the comparison ends. One that is preempted, or at the end of its hours, is put into the
queue again and goes on from its checkpoint. A comparison that is started again waits for what is there already. On
this computer the jobs end with the comparison. The processes are those of `jobs.py`: a job starts one, and ends it
when it has to go.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.jobs import Job, command_of, start_process
from nnunet_semiseg.evaluation.work import Work
from nnunet_semiseg.files import make_folder, read_json, write_json

EXECUTORS = ("local", "slurm")
HOURS = 24.0
TIMES = 100
"""how often a job may come to the end of its hours"""
EVER = 60 * 24 * 365
"""minutes: on this computer nobody ends a job"""


def parameters_of(assignments: Sequence[str], device: str) -> dict[str, Any]:
    """`KEY=VALUE` to submitit's parameters: `hours`, `gpus` of a node, and any other option of sbatch, `partition=gpu`.

    Raises:
        UserError: no `KEY=VALUE`; hours or GPUs that are no numbers.
    """
    given = {"hours": str(HOURS), "gpus": "1" if device == "cuda" else "0"}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals and value):
            raise UserError(f"--slurm {assignment}: write KEY=VALUE, for example --slurm partition=gpu hours=12 gpus=1")
        given[key.lstrip("-")] = value
    try:
        hours, gpus = float(given.pop("hours")), int(given.pop("gpus"))
    except ValueError as error:
        raise UserError(f"--slurm hours=H gpus=N: {error}: give numbers") from None
    parameters: dict[str, Any] = {"time": max(1, round(60 * hours)), "additional_parameters": given}
    return parameters | ({"gpus_per_node": gpus} if gpus else {})


def slurm_executor(logs: Path, parameters: dict[str, Any]):
    """submitit's executor for SLURM.

    Raises:
        UserError: submitit is not installed; this computer does not know SLURM.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--executor slurm: needs submitit: pip install 'nnunet-semiseg[cluster]'") from None
    try:
        executor = submitit.SlurmExecutor(logs / "submitit", max_num_timeout=TIMES)
    except RuntimeError:
        raise UserError("--executor slurm: no srun here: run this on a computer that knows the queue") from None
    executor.update_parameters(**parameters)
    return executor


class Here:
    """Begins jobs by submitit's executor for this computer, with what a queue has, too; see `do_all`.

    Args:
        logs: the folder for what jobs print.
    """

    def __init__(self, logs: Path):
        import submitit

        self.executor = submitit.LocalExecutor(logs / "submitit")
        self.executor.update_parameters(timeout_min=EVER)

    def __call__(self, job: Job, device: str, logs: Path) -> InQueue:
        every = ",".join(map(str, range(torch.cuda.device_count())))  # submitit would hide them all
        device = device or os.environ.get("CUDA_VISIBLE_DEVICES", every)
        work = Work(command_of(job, logs), logs / f"{job.name}.txt", device, asked_by=os.getpid())
        return InQueue(self.executor.submit(work))


def starter(logs: Path):
    """What begins jobs on this computer: submitit where it is installed, else `start_process`."""
    try:
        return Here(logs)
    except ImportError:
        return start_process


class InQueue:
    """A job of submitit's, which says in one line what went wrong."""

    def __init__(self, job):
        self.job = job

    def result(self) -> str | None:
        """Wait for its end."""
        try:
            return self.job.result()
        except Exception as error:  # what submitit says of a job that was cancelled or has come to its end too often
            return f"job {self.job.job_id} ended without a result ({' '.join(str(error).split())[:200]})"

    def cancel(self) -> None:
        """End it."""
        self.job.cancel()


def do_all_in_queue(jobs: list[Job], executor, logs: Path) -> None:
    """Put each job into the queue, if it is not there yet, and wait for all.

    Raises:
        UserError: jobs that failed, one line each, when all the others are done.
    """
    submitted = [(job, known_job(job, executor, logs) or submit(job, executor, logs)) for job in jobs]
    problems = []
    for job, in_queue in submitted:
        line = InQueue(in_queue).result()
        (logs / f"{job.name}.job").unlink(missing_ok=True)
        problems += [f"{job.title}: {line}"] if line else []
    if problems:
        raise UserError("\n".join(problems))


def submit(job: Job, executor, logs: Path):
    """Put a job into the queue, and keep its number."""
    in_queue = executor.submit(Work(command_of(job, logs), logs / f"{job.name}.txt"))
    write_json({"id": in_queue.job_id}, logs / f"{job.name}.job")
    print(f"{job.title}: job {in_queue.job_id}", flush=True)
    return in_queue


def known_job(job: Job, executor, logs: Path):
    """The job as a comparison before this one left it in the queue; None where it is not, or has ended."""
    file = logs / f"{job.name}.job"
    if not file.is_file():
        return None
    with contextlib.suppress(UserError, KeyError):
        in_queue = executor.job_class(executor.folder, read_json(file, "remove it")["id"])
        if not in_queue.done(force_check=True):
            print(f"{job.title}: job {in_queue.job_id} is there already", flush=True)
            return in_queue
    return None


# ------------------------------------------------------------------------------------------------------ other commands


def first_in_queue(args: Namespace, logs: Path, parts: int = 1) -> None:
    """Where SLURM is asked for, let its jobs do this command, and wait: who calls this goes on and finds all done.

    Args:
        args: what is given, and `words`, all of it as it was written.
        logs: the folder for what the jobs print.
        parts: jobs that share the work by `--num_parts`.

    Raises:
        UserError: jobs that failed, one line each; see `slurm_executor`.
    """
    if args.executor == "local":
        return
    make_folder(logs)
    executor = slurm_executor(logs, parameters_of(args.slurm, args.device))
    jobs = []
    for part in range(parts):
        share = ["--num_parts", str(parts), "--part_id", str(part)] if parts > 1 else []
        name = f"{args.words[0]}{f' {part + 1} of {parts}' if parts > 1 else ''}"
        job = {"command": [*args.words, "--executor", "local", *share]}  # the last one of an option counts
        jobs.append(Job(name.replace(" ", "_"), name, job))
    do_all_in_queue(jobs, executor, logs)
