"""Run jobs with submitit: in the queue of a cluster, or on this computer.

A job in a queue continues when the comparison ends. If it is interrupted, or its time is over, it is put into the queue
again. A training then continues from its checkpoint. A comparison that is started again waits for the jobs that are in
the queue. On this computer the jobs end with the comparison. The work itself is that of `jobs.py`: a job starts a
process, and ends it when the job must stop.
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
from nnunet_semiseg.evaluation.request import Request
from nnunet_semiseg.evaluation.work import Work
from nnunet_semiseg.files import make_folder, read_json, write_json

HOURS = 24.0
"""The time limit of a job in a queue, if the user gives none."""
TIMES = 100
"""How often a job may continue after its time is over."""
EVER = 60 * 24 * 365
"""The time limit of a job on this computer, in minutes. It is a year, so practically there is none."""


def parameters_of(assignments: Sequence[str], device: str) -> dict[str, Any]:
    """Turn options `KEY=VALUE` into submitit's parameters.

    A key is `hours`, `gpus` (for each node), or any option of sbatch, as in `partition=gpu`. By default a job has
    `HOURS` hours, and one GPU if the device is `cuda`.

    Raises:
        UserError: an option has another form; hours or GPUs are not numbers.
    """
    given = {"hours": str(HOURS), "gpus": "1" if device == "cuda" else "0"}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals and value):
            raise UserError(f"--slurm {assignment}: write KEY=VALUE, for example --slurm partition=gpu hours=12 gpus=1")
        given[key.lstrip("-")] = value
    try:
        minutes, gpus = round(60 * float(given.pop("hours"))), int(given.pop("gpus"))
    except (ValueError, OverflowError) as error:
        raise UserError(f"--slurm: hours and gpus must be numbers ({error}): write hours=12 gpus=1") from None
    parameters: dict[str, Any] = {"time": max(1, minutes), "additional_parameters": given}
    return parameters | ({"gpus_per_node": gpus} if gpus else {})


def refuse_unused(options: Request | Namespace) -> None:
    """Raises UserError if there are options for SLURM's jobs, but this computer does the work."""
    if options.executor == "local" and options.slurm:
        raise UserError("--slurm: only with --executor slurm: add it, or leave out --slurm")


def slurm_executor(logs: Path, parameters: dict[str, Any]):
    """Make submitit's executor for SLURM.

    Raises:
        UserError: submitit is not installed, or this computer has no SLURM.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--executor slurm: needs the package submitit: install it with pip install 'nnunet-semiseg[cluster]'"
        ) from None
    try:
        executor = submitit.SlurmExecutor(logs / "submitit", max_num_timeout=TIMES)
    except RuntimeError:
        raise UserError(
            "--executor slurm: this computer has no command srun: run this on a computer of the cluster"
        ) from None
    executor.update_parameters(**parameters)
    return executor


class Here:
    """Starts jobs on this computer with submitit, in the same way as in a queue; see `do_all`.

    Args:
        logs: the folder for the output of jobs.
    """

    def __init__(self, logs: Path):
        import submitit

        self.executor = submitit.LocalExecutor(logs / "submitit")
        self.executor.update_parameters(timeout_min=EVER)

    def __call__(self, job: Job, device: str, logs: Path) -> InQueue:
        every = ",".join(map(str, range(torch.cuda.device_count())))  # submitit would hide all GPUs
        device = device or os.environ.get("CUDA_VISIBLE_DEVICES", every)
        work = Work(command_of(job, logs), logs / f"{job.name}.txt", device, asked_by=os.getpid())
        return InQueue(self.executor.submit(work))


def starter(logs: Path):
    """The function that starts jobs on this computer. It uses submitit if that is installed, else `start_process`."""
    try:
        return Here(logs)
    except ImportError:
        return start_process


class InQueue:
    """A job that was given to submitit."""

    def __init__(self, job):
        self.job = job

    def result(self) -> str | None:
        """Wait for the end of the job. Returns in one line what went wrong, or None."""
        try:
            return self.job.result()
        except Exception as error:  # from submitit: the job was cancelled, or its time ran out too often
            why = " ".join(str(error).split())[:200]
            return f"job {self.job.job_id} ended without a result ({why}): run the same command again"

    def cancel(self) -> None:
        """End the job."""
        self.job.cancel()


def do_all_in_queue(jobs: list[Job], executor, logs: Path) -> None:
    """Put each job into the queue, unless it is already there, and wait for all jobs.

    Raises:
        UserError: jobs failed, one line each. It is raised when all other jobs are done.
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
    """Put a job into the queue, and store its number in a file."""
    in_queue = executor.submit(Work(command_of(job, logs), logs / f"{job.name}.txt"))
    write_json({"id": in_queue.job_id}, logs / f"{job.name}.job")
    print(f"{job.title}: job {in_queue.job_id}", flush=True)
    return in_queue


def known_job(job: Job, executor, logs: Path):
    """Find this job in the queue, where an earlier command left it. None if it has ended or was never there."""
    file = logs / f"{job.name}.job"
    if not file.is_file():
        return None
    with contextlib.suppress(UserError, KeyError):
        in_queue = executor.job_class(executor.folder, read_json(file, "remove it")["id"])
        if not in_queue.done(force_check=True):
            print(f"{job.title}: job {in_queue.job_id} is in the queue already", flush=True)
            return in_queue
    return None


# ------------------------------------------------------------------------------------------------------ other commands


def first_in_queue(args: Namespace, logs: Path, parts: int = 1) -> None:
    """Do the work of this command in SLURM's queue first, if the user asks for SLURM, and wait for it.

    The jobs run the same command. After that the caller finds that all work is done.

    Args:
        args: the arguments, and `words`, the command line as it was written.
        logs: the folder for the output of jobs.
        parts: the number of jobs that share the work by `--num_parts`.

    Raises:
        UserError: jobs failed, one line each; see also `refuse_unused`, `parameters_of` and `slurm_executor`.
    """
    if args.executor == "local":
        if "--executor" not in args.words:  # else it may be a job of the queue; see below
            refuse_unused(args)
        return
    make_folder(logs)
    executor = slurm_executor(logs, parameters_of(args.slurm, args.device))
    jobs = []
    for part in range(parts):
        share = ["--num_parts", str(parts), "--part_id", str(part)] if parts > 1 else []
        name = f"{args.words[0]}{f' {part + 1} of {parts}' if parts > 1 else ''}"
        job = {"command": [*args.words, "--executor", "local", *share]}  # if an option appears twice, the last counts
        jobs.append(Job(name.replace(" ", "_"), name, job))
    do_all_in_queue(jobs, executor, logs)
