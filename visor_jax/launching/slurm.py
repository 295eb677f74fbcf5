"""Slurm: GPU nodes of a site's cluster, one process per GPU.

The job is one batch script, `templates/slurm.sbatch`. It puts itself back into the queue when its tasks were stopped
after saving (143) or lost a process (134, 137), and not when they failed or are complete. Jobs are found by their name,
which is the launch's; every action looks first at what is in the queue and may be repeated. Account, QOS, time limit
and reservation are sbatch's own variables (SBATCH_ACCOUNT, ...). Tested with Slurm 22.05.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from visor_jax.errors import RequestError, RunError
from visor_jax.launching.description import Launch, travels, visor_argv
from visor_jax.launching.environment import environment
from visor_jax.launching.steps import FOLDER, Command, Runner
from visor_jax.launching.template import render

POLL_SECONDS = 2.0
ABSENT = "NOT_FOUND"
SCRIPT = "visor.sbatch"
# Fields that only other targets have, and what a user of Slurm does instead.
FOREIGN = {
    "service_account": "Slurm runs a job as the user who submits it",
    "cluster": "run this on a login node of the cluster, or set SBATCH_CLUSTERS",
    "buckets": "Slurm mounts no buckets; use a path that all nodes share",
}
ENDING = ("COMPLETING", "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT")  # squeue shows these for some seconds


@dataclass(frozen=True)
class Job:
    """A job in the queue: its number, Slurm's state of it, such as RUNNING, and why it waits."""

    number: str
    state: str
    reason: str


def check(launch: Launch) -> None:
    """Checks what Slurm cannot do.

    Raises:
      RequestError: a topology of TPUs, a way of renting, or a field of another target.
    """
    if launch.rented is not None and launch.rented.kind != "gpu":
        raise RequestError(
            f"--topology={launch.rented.text}: target slurm has no TPUs; expected GPUs, such as h100x8 or h100x8:2"
            " (two nodes), or --target=tpu or gke"
        )
    if launch.capacity != "on-demand":
        raise RequestError(
            f"--capacity={launch.capacity}: a Slurm cluster rents nothing; choose a partition (--queue) or set"
            " SBATCH_QOS or SBATCH_RESERVATION"
        )
    if launch.max_hours != Launch.max_hours:
        raise RequestError(f"--max-hours={launch.max_hours}: a Slurm job waits without a limit; set SBATCH_TIMELIMIT")
    for name, instead in FOREIGN.items():
        if value := getattr(launch, name):
            text = value if isinstance(value, str) else ",".join(value)
            raise RequestError(f"--{name.removesuffix('s').replace('_', '-')}={text}: not for target slurm; {instead}")
    if launch.image and not launch.in_bucket and "," in launch.workdir:
        raise RequestError(f"--workdir={launch.workdir}: expected no comma, because the container mounts this folder")


# --- the script -------------------------------------------------------------------------------------------------------


def logs_folder(launch: Launch) -> str:
    """Returns the folder of the logs: in the workdir, or if that is a bucket, next to the script."""
    return f"{FOLDER / launch.name}/logs" if launch.in_bucket or not launch.workdir else f"{launch.workdir}/logs"


def log_file(launch: Launch, task: int | None = None) -> str:
    """Returns the log of the job, or of one task; a restarted or resumed job appends to it."""
    return f"{logs_folder(launch)}/{launch.name}{'' if task is None else f'-{task}'}.log"


def script(launch: Launch) -> str:
    """Returns the batch script."""
    machines = launch.machines
    return render(
        "slurm.sbatch",
        launch=launch,
        nodes=machines.hosts,
        per_node=machines.chips_per_host,
        whole_nodes=machines.chips_per_host == machines.chip.chips_per_host,
        logs=logs_folder(launch),
        comment=",".join(f"{key}={value}" for key, value in launch.labels),
        container=_pyxis_image(launch.image),
        mounts="" if launch.in_bucket else f",{launch.workdir}:{launch.workdir}",
        environment=list(environment(launch).items()),
        command=visor_argv(launch, f"{FOLDER / launch.name}/config.json"),
    )


def _pyxis_image(image: str) -> str:
    """Returns an image's name as pyxis writes it: a `#` after the registry's host."""
    host, slash, path = image.partition("/")
    return f"{host}#{path}" if slash and ("." in host or ":" in host) else image


# --- actions ----------------------------------------------------------------------------------------------------------


def jobs(launch: Launch, runner: Runner, assumed: str) -> list[Job]:
    """Returns the user's jobs of this name that wait or run; a dry run goes on as if squeue printed `assumed`."""
    argv = ("squeue", "--me", f"--name={launch.name}", "--noheader", "--format=%i|%T|%r")
    lines = runner.run(Command(argv, "look for jobs of this name", assumed, premise=assumed or "none")).out.splitlines()
    found = [Job(*line.strip().split("|", 2)) for line in lines if line.count("|") >= 2]
    return [job for job in found if job.state not in ENDING]


def up(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Submits the job, unless one of this name waits or runs; one that Slurm holds is released."""
    for job in jobs(launch, runner, ""):
        if "Held" in job.reason or "held" in job.reason:
            runner.run(Command(("scontrol", "release", job.number), "release the held job"))
        runner.say(f"{launch.name}: job {job.number} is {job.state} ({job.reason}); nothing submitted")
        return {"state": job.state, "job": job.number, "workdir": launch.workdir}
    if travels(launch):
        runner.write("config.json", launch.config_json)
    file = runner.write(SCRIPT, script(launch))
    runner.run(Command(("mkdir", "-p", logs_folder(launch)), "make the folder of the logs"))
    submitted = runner.run(Command(("sbatch", "--parsable", str(file)), "submit the job", "1"))
    number = submitted.out.strip().partition(";")[0]
    runner.say(f"{launch.name}: submitted as job {number}; logs: {log_file(launch)}, {log_file(launch, 0)}")
    return {"state": "PENDING", "job": number, "workdir": launch.workdir}


def logs(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Shows the end of the logs of the job and of task 0."""
    if not launch.workdir:
        raise RequestError("--workdir is missing; expected the one of the launch, in which the logs are")
    follow = ("-F",) if launch.follow else ()
    argv = ("tail", "-n", "200", *follow, log_file(launch), log_file(launch, 0))
    runner.show(Command(argv, "show the logs of the job and of task 0"))
    return {"state": "shown"}


def status(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Reports the job's state: from the queue, or if it has ended, from the accounting of the site."""
    found = jobs(launch, runner, "1|RUNNING|None")
    for job in found:
        runner.tell(f"{launch.name}: job {job.number} {job.state} ({job.reason})")
    if found:
        return {"state": found[0].state, "job": found[0].number}
    form = "--format=JobID,State,ExitCode,End"
    argv = ("sacct", "-X", f"--name={launch.name}", "--noheader", "--parsable2", "--starttime=now-30days", form)
    ended = runner.run(Command(argv, "look for an ended job"), accept=("accounting storage", "slurmdbd"))
    lines = ended.out.splitlines() if ended.status == 0 else []
    if not lines:
        where = "" if ended.status == 0 else ", and this site keeps no accounting: see the log"
        runner.tell(f"{launch.name}: not in the queue{where}")
        return {"state": ABSENT}
    number, state, code, end = (lines[-1].split("|") + [""] * 4)[:4]
    runner.tell(f"{launch.name}: job {number} {state}, exit status {code.partition(':')[0]}, at {end}")
    return {"state": state.partition(" ")[0], "job": number, "exit": code}


def stop(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Sends SIGTERM to the tasks, waits until they have saved, and lets Slurm not put the job back into the queue.

    Raises:
      RunError: it still runs after the time to save and a minute more.
    """
    assumed, signaled = "1|RUNNING|None", set[str]()
    for _ in range(int((launch.grace_seconds + 60) / POLL_SECONDS)):
        found = jobs(launch, runner, assumed)
        if not found:
            break
        for job in found:
            if job.state != "RUNNING":  # also one that was just put back
                _run(runner, ("scancel", job.number), "cancel the waiting job")
            elif job.number not in signaled:
                _run(runner, ("scontrol", "update", f"JobId={job.number}", "Requeue=0"), "let the job not return")
                _run(runner, ("scancel", "--signal=TERM", job.number), "send SIGTERM to the tasks")
            signaled.add(job.number)
        assumed = ""
        runner.sleep(POLL_SECONDS)
    else:
        raise RunError(f"{launch.name}: still runs; 'visor launch delete' ends it without waiting")
    runner.say(f"{launch.name}: {'stopped' if signaled else 'not in the queue; nothing runs'}")
    return {"state": "stopped"}


def delete(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Cancels the job; workdir and logs stay."""
    found = jobs(launch, runner, "1|RUNNING|None")
    for job in found:
        _run(runner, ("scancel", job.number), "cancel the job")
    runner.say(f"{launch.name}: {'deleted' if found else 'does not exist'}; workdir and logs stay")
    return {"state": ABSENT}


def _run(runner: Runner, argv: tuple[str, ...], purpose: str) -> None:
    """Runs a command for one job; it may have ended since we looked."""
    runner.run(Command(argv, purpose), accept=("Invalid job id", "already completing or completed"))


ACTIONS: Mapping[str, Callable[[Launch, Runner], dict[str, Any]]] = {
    "up": up,
    "logs": logs,
    "status": status,
    "stop": stop,
    "resume": up,
    "delete": delete,
}
