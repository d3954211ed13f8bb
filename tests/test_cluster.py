"""Jobs in a cluster's queue: a stand-in for SLURM runs them here."""

import os
import stat
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation import cluster
from nnunet_semiseg.evaluation.cluster import (
    do_all_in_queue,
    first_in_queue,
    known_job,
    parameters_of,
    slurm_executor,
    starter,
    submit,
)
from nnunet_semiseg.evaluation.jobs import Job, command_of, do_all
from nnunet_semiseg.evaluation.work import Work

submitit = pytest.importorskip("submitit")

# What submitit calls. A job's number is that of the process; it is over when that is gone.
STAND_INS = {
    "sbatch": """
        script="${@: -1}"; cp "$script" "$QUEUE/last.sh"
        echo x >> "$QUEUE/submitted"
        setsid bash -c 'export SLURM_JOB_ID=$$ SLURM_NTASKS=1 SLURM_PROCID=0; . "$0"' "$script" > /dev/null 2>&1 &
        echo "Submitted batch job $!"
    """,
    "srun": """
        while [ "${1:0:2}" = "--" ]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
        exec "$@"
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        for word in "$@"; do case "$word" in [0-9]*) kill -0 $word 2> /dev/null && state=RUNNING || state=COMPLETED
            echo "$word|$state|here";; esac; done
    """,
    "scontrol": """[ "$1" = requeue ] && echo "$2" >> "$QUEUE/requeued" """,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of a queue; the commands are on the path."""
    folder = tmp_path / "queue"
    folder.mkdir()
    for name, body in STAND_INS.items():
        file = folder / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(folder))
    return folder


def job_that(monkeypatch, code: str, name: str = "a_job") -> Job:
    """A job that runs this code instead of a training."""
    monkeypatch.setattr(cluster, "command_of", lambda job, logs: [sys.executable, "-c", job.content["code"]])
    return Job(name, f"title of {name}", {"code": code})


def test_jobs_are_done_in_the_queue_and_failures_are_told(slurm, tmp_path, monkeypatch):
    done = tmp_path / "done"
    good = job_that(monkeypatch, f"open({str(done)!r}, 'w')")
    bad = job_that(monkeypatch, "import sys; sys.exit('no such thing')", "another")
    executor = slurm_executor(tmp_path, parameters_of(["partition=fast", "hours=2", "gpus=3"], "cuda"))
    with pytest.raises(UserError) as error:
        do_all_in_queue([good, bad], executor, tmp_path)
    assert str(error.value).startswith("title of another: no such thing (exit status 1; all output: ")
    assert done.exists() and not list(tmp_path.glob("*.job"))
    script = (slurm / "last.sh").read_text()
    assert all(f"#SBATCH --{x}\n" in script for x in ("partition=fast", "time=120", "gpus-per-node=3")), script


def test_what_is_in_the_queue_is_waited_for_and_not_put_there_again(slurm, tmp_path, monkeypatch, capsys):
    go = tmp_path / "go"
    job = job_that(monkeypatch, f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.1)")
    first = submit(job, slurm_executor(tmp_path, parameters_of([], "cpu")), tmp_path)
    executor = slurm_executor(tmp_path, parameters_of([], "cpu"))  # of a comparison that is started again
    assert known_job(job, executor, tmp_path).job_id == first.job_id
    go.touch()
    do_all_in_queue([job], executor, tmp_path)
    assert (slurm / "submitted").read_text() == "x\n"
    assert f"title of a_job: job {first.job_id} is in the queue already" in capsys.readouterr().out
    assert known_job(job, executor, tmp_path) is None


def test_a_job_that_is_preempted_is_put_into_the_queue_again_and_its_process_ends(slurm, tmp_path, monkeypatch):
    started = tmp_path / "started"
    watch = "import os, signal, threading; threading.Thread(target=lambda: (os.read(0, 1), os.killpg(0, 9))).start()"
    job = job_that(monkeypatch, f"{watch}\nopen({str(started)!r}, 'w').write(str(os.getpid()))\nsignal.pause()")
    in_queue = submit(job, slurm_executor(tmp_path, parameters_of([], "cpu")), tmp_path)
    pid = wait_for(lambda: started.exists() and started.read_text())
    children = subprocess.run(["pgrep", "-f", "submitit.core._submit"], capture_output=True, text=True).stdout.split()
    parent = next(p for p in children if p == ppid_of(pid))
    os.kill(int(parent), submitit.core.job_environment.JobEnvironment._usr_sig())
    wait_for(lambda: (slurm / "requeued").exists())
    assert (slurm / "requeued").read_text() == f"{in_queue.job_id}\n"
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_on_this_computer_as_many_are_done_at_a_time_as_there_are_devices(tmp_path, monkeypatch):
    """Each of two jobs waits for the other one."""
    code = f"""
import os, pathlib, sys, time
own, other, failure = pathlib.Path({str(tmp_path / "0")!r}), pathlib.Path({str(tmp_path / "1")!r}), 0
if NUMBER: own, other, failure = other, own, "oh dear"
own.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while not other.exists(): time.sleep(0.05)
sys.exit(failure)"""
    todo = [job_that(monkeypatch, f"NUMBER = {number}{code}", f"job{number}") for number in range(2)]
    with pytest.raises(UserError, match=r"title of job1: oh dear \(exit status 1; all output: .*job1.txt\)$"):
        do_all(todo, ["3", "5"], tmp_path, starter(tmp_path))
    assert {(tmp_path / name).read_text() for name in "01"} == {"3", "5"}


def test_other_commands_are_shared_among_jobs(slurm, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(cluster, "do_all_in_queue", lambda todo, *_, **__: jobs.extend(todo))
    words = ["review", "-d", "1", "--executor", "slurm", "--num_parts", "2"]
    args = Namespace(words=words, executor="slurm", slurm=["hours=1"], device="cuda")
    first_in_queue(args, tmp_path / "logs", 2)
    assert [job.name for job in jobs] == ["review_1_of_2", "review_2_of_2"]
    command = [sys.executable, "-m", "nnunet_semiseg.cli", *words, "--executor", "local"]
    assert command_of(jobs[1], tmp_path) == [*command, "--num_parts", "2", "--part_id", "1"]
    first_in_queue(args, tmp_path / "logs")
    assert command_of(jobs[2], tmp_path) == command
    args.executor = "local"
    first_in_queue(args, tmp_path / "none")
    assert len(jobs) == 3 and not (tmp_path / "none").exists()


def test_options_of_slurm_without_slurm_are_refused(tmp_path):
    words = ["review", "-d", "1", "--slurm", "hours=1"]
    args = Namespace(words=words, executor="local", slurm=["hours=1"], device="cpu")
    with pytest.raises(UserError, match="^--slurm: only with --executor slurm: add it, or leave out --slurm$"):
        first_in_queue(args, tmp_path)
    args.words = [*words, "--executor", "slurm", "--executor", "local"]  # as in a job of the queue
    first_in_queue(args, tmp_path)


def test_there_is_a_way_without_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert starter(tmp_path) is cluster.start_process


def test_what_nobody_waits_for_any_more_is_ended(tmp_path):
    (asked := subprocess.Popen(["true"])).wait()
    pid = tmp_path / "pid"
    command = ["bash", "-c", f"echo $$ > {pid}; sleep 100"]
    assert Work(command, tmp_path / "log", asked_by=asked.pid)() == "nobody waits for it any more"
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def ppid_of(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]


def wait_for(condition):
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("given", ["partition", "=x", "hours=many", "hours=nan", "hours=inf", "gpus=some"])
def test_what_makes_no_sense_is_refused(given):
    with pytest.raises(UserError, match="--slurm"):
        parameters_of([given], "cpu")


def test_where_there_is_no_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="this computer has no command srun"):
        slurm_executor(tmp_path, parameters_of([], "cpu"))
