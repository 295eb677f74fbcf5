"""SkyPilot: one task file for TPUs and GPUs, run as a managed job that SkyPilot restarts elsewhere after preemption.

A process that exits with 143 or 134 is restarted too, and one that fails otherwise is not. SkyPilot runs the task's
last word, `exec visor run ...`, on every machine, and sends SIGTERM before it takes a machine down. The package
travels as a wheel, unless `--image` has it. Secrets are taken from the environment of `sky` by their names.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from visor_jax.errors import ABORTED, STOPPED, RequestError, RunError
from visor_jax.launching import wheel
from visor_jax.launching.description import MOUNTS, Launch, travels, visor_argv
from visor_jax.launching.environment import environment
from visor_jax.launching.steps import Command, Runner

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
TYPES = {"v5e": "v5litepod"}  # the others are called the same
CORES = {"v4": 2, "v5p": 2}  # a TPU's type counts cores
PORT = 8476
UV = "uv==0.13.9"  # SkyPilot installs uv; this is for images where it did not. Machines come with Python 3.10.
ENDED = ("SUCCEEDED", "CANCELLED", "FAILED")
POLL_SECONDS = 10.0
CONFIG = "config.json"


def check(launch: Launch) -> None:
    """Checks what SkyPilot can rent, and that the run's folder outlives the machines.

    Raises:
      RequestError: a chip, several slices or a capacity that SkyPilot does not offer, or a workdir on a disk.
    """
    if launch.rented is not None and launch.machines.chip.name == "tpu7x":
        raise RequestError(f"--topology={launch.machines.text}: SkyPilot has no tpu7x; use --target=gke")
    if launch.rented is not None and launch.machines.slices > 1:
        raise RequestError(f"--slices={launch.machines.slices}: SkyPilot joins no slices; use --target=tpu or gke")
    if launch.rented is not None and launch.machines.chip.name == "h200" and launch.machines.chips_per_host != 8:
        text = launch.machines.text
        raise RequestError(f"--topology={text}: Google's machines with H200 have 8 of them; expected h200x8")
    if launch.capacity not in ("on-demand", "spot"):
        raise RequestError(
            f"--capacity={launch.capacity}: a SkyPilot task is on-demand or spot; use --target=tpu or gke"
        )
    if launch.cluster or launch.queue:
        raise RequestError("--cluster, --queue: SkyPilot's managed jobs have neither; expected with gke and slurm")
    if launch.max_restarts != Launch.max_restarts:
        raise RequestError(f"--max-restarts={launch.max_restarts}: SkyPilot restarts after 143 and 134 without a limit")
    if launch.max_hours != Launch.max_hours:
        raise RequestError(f"--max-hours={launch.max_hours}: SkyPilot waits, and a run lasts, without a limit")
    if launch.service_account:
        raise RequestError(
            f"--service-account={launch.service_account}: SkyPilot takes it from gcp.remote_identity in"
            " ~/.sky/config.yaml, not from a task"
        )
    if launch.workdir and not launch.in_bucket:
        raise RequestError(f"--workdir={launch.workdir}: expected gs://BUCKET/PATH; the next machine has another disk")


def task(launch: Launch) -> str:
    """Returns the task file, as `sky jobs launch` reads it."""
    return yaml.dump(definition(launch), Dumper=_Dumper, sort_keys=False, width=10_000)


class _Dumper(yaml.SafeDumper):
    """Writes scripts as literal blocks, and everything else as `yaml.safe_dump` does."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def definition(launch: Launch) -> dict[str, Any]:
    """Returns the task as SkyPilot's schema has it."""
    machines = launch.machines
    content: dict[str, Any] = {
        "name": launch.name,
        "resources": _resources(launch),
        "num_nodes": machines.hosts if machines.kind == "gpu" else 1,  # the hosts of a slice are one node
        "envs": dict(environment(launch)),
    }
    if launch.secrets:
        content["secrets"] = dict.fromkeys(launch.secrets)
    if not launch.image or travels(launch):
        content["workdir"] = f"visor-launch/{launch.name}"
    if launch.buckets:
        content["file_mounts"] = {
            f"{MOUNTS}/{bucket}": {"source": f"gs://{bucket}", "mode": "MOUNT"} for bucket in launch.buckets
        }
    if not launch.image:
        content["setup"] = _setup(launch)
    content["run"] = _run(launch)
    content["config"] = {"hooks": [{"run": _SAVE, "timeout": launch.grace_seconds}]}
    return content


def _resources(launch: Launch) -> dict[str, Any]:
    machines, chip = launch.machines, launch.machines.chip
    region = launch.zone.rpartition("-")[0]
    resources: dict[str, Any] = {"infra": f"gcp/{region}/{launch.zone}" if launch.zone else "gcp"}
    if machines.kind == "tpu":
        count = machines.topology.chips * CORES.get(chip.name, 1)
        resources["accelerators"] = f"tpu-{TYPES.get(chip.name, chip.name)}-{count}"
        resources["accelerator_args"] = {"runtime_version": RUNTIMES[chip.name]}
    else:
        resources["accelerators"] = f"{chip.name.upper()}:{machines.chips_per_host}"
    resources["use_spot"] = launch.capacity == "spot"
    resources["job_recovery"] = {
        "strategy": "FAILOVER",
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [STOPPED, ABORTED],
    }
    if launch.image:
        resources["image_id"] = f"docker:{launch.image}"
    if launch.labels:
        resources["labels"] = dict(launch.labels)
    return resources


# Before SkyPilot takes a machine down: SIGTERM, and time to save. The brackets keep the pattern from its own shell.
_SAVE = """\
pkill -TERM -f 'bin/[v]isor run' || exit 0
while pgrep -f 'bin/[v]isor run' >/dev/null; do sleep 1; done
"""


def _setup(launch: Launch) -> str:
    """Returns the script that installs the wheel in the synchronized folder; it may run again."""
    extra = "tpu,gcs" if launch.machines.kind == "tpu" else "cuda,gcs"
    packages = shlex.join([f"./{wheel.FILE}[{extra}]", *wheel.pins()])
    return f"""\
set -eu
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --user --quiet {shlex.quote(UV)}
uv venv --allow-existing --quiet --python 3.12 "$HOME/visor"
uv pip install --quiet --python "$HOME/visor/bin/python" {packages}
"""


def _run(launch: Launch) -> str:
    """Returns the script of every machine; its last word is the run, so that SIGTERM reaches it.

    TPU machines find each other. For GPUs SkyPilot's variables say which machines there are: one process for each.
    """
    lines = ["set -eu"]
    if not launch.image:
        lines.append('export PATH="$HOME/visor/bin:$PATH"')
    if launch.machines.kind == "gpu" and launch.machines.hosts > 1:
        lines += [
            f'export JAX_COORDINATOR_ADDRESS="${{SKYPILOT_NODE_IPS%%[[:space:]]*}}:{PORT}"',  # of the first node
            'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
        ]
    lines.append(f"exec {shlex.join(visor_argv(launch, CONFIG))}")
    return "\n".join(lines) + "\n"


def _up(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Starts the managed job, unless one of this name is not over."""
    job = _find(launch, runner)
    if job and not _over(job):
        runner.say(f"{launch.name} is there already: {job['status']}")
        return _result(launch, job)
    if launch.project:
        runner.say(f"--project={launch.project}: SkyPilot takes the project that 'gcloud config get project' prints")
    if not launch.image:
        wheel.build(runner)
        runner.write(".skyignore", "build\nsetuptools.cfg\n*.egg-info\n")  # what building left in the folder
    if travels(launch):
        runner.write(CONFIG, launch.config_json)
    path = runner.write("task.yaml", task(launch))
    secrets = [option for secret in launch.secrets for option in ("--secret", secret)]
    argv = ("sky", "jobs", "launch", "--name", launch.name, *secrets, "--yes", "--detach-run", str(path))
    runner.run(Command(argv, f"start the managed job {launch.name}"))
    runner.say(f"{launch.name}: submitted; 'visor launch status' says when it runs")
    return {"name": launch.name, "target": "sky", "state": "submitted", "task": str(path)}


def _logs(launch: Launch, runner: Runner) -> dict[str, Any]:
    following = "--follow" if launch.follow else "--no-follow"
    runner.show(_jobs("logs", "--name", launch.name, following, purpose=f"show the logs of {launch.name}"))
    return {"name": launch.name, "target": "sky"}


def _status(launch: Launch, runner: Runner) -> dict[str, Any]:
    result = _result(launch, _find(launch, runner))
    runner.tell(
        f"{launch.name}: {result['state']}" + (f"; recoveries: {result['recoveries']}" if "job" in result else "")
    )
    return result


def _stop(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Cancels the job; its machines save and are taken down. Returns when SkyPilot says that it is over."""
    running = json.dumps([{"job_name": launch.name, "job_id": 1, "status": "RUNNING"}])
    job = _find(launch, runner, assumed=running)
    if not job or _over(job):
        runner.say(f"{launch.name}: nothing to stop")
        return _result(launch, job)
    runner.run(_jobs("cancel", "--name", launch.name, "--yes", purpose=f"cancel {launch.name}"), accept=_NOTHING)
    left = launch.grace_seconds + 300.0  # SkyPilot takes the machines down after they have saved
    while not runner.dry_run and not _over(job := _find(launch, runner)):
        if (left := left - POLL_SECONDS) < 0:
            raise RunError(f"--name={launch.name}: still {job['status']}; see 'sky jobs queue'")
        runner.sleep(POLL_SECONDS)
    runner.say(f"{launch.name}: stopped; SkyPilot takes its machines down")
    return {"name": launch.name, "target": "sky", "state": "stopped"}


def _delete(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Cancels the job. SkyPilot takes its machines down itself; the workdir stays."""
    _stop(launch, runner)
    runner.say(f"{launch.name}: deleted; the workdir stays")
    return {"name": launch.name, "target": "sky", "state": "deleted"}


_NOTHING = ("No managed job", "no managed jobs", "already in terminal")


def _find(launch: Launch, runner: Runner, assumed: str = "[]") -> dict[str, Any]:
    """Returns the newest job of this name as SkyPilot has it; empty if there is none."""
    command = _jobs(
        "queue", "--refresh", "--all", "--output", "json", purpose=f"look for {launch.name}", assumed=assumed
    )
    done = runner.run(command, accept=("No in-progress managed jobs", "no managed jobs"))
    text = done.out[done.out.find("[") :] if "[" in done.out else "[]"
    jobs = [job for job in json.loads(text) if job.get("job_name") == launch.name]
    return max(jobs, key=lambda job: job.get("job_id") or 0, default={})


def _over(job: Mapping[str, Any]) -> bool:
    return not job or str(job.get("status", "")).startswith(ENDED)


def _result(launch: Launch, job: Mapping[str, Any]) -> dict[str, Any]:
    result = {"name": launch.name, "target": "sky", "state": str(job.get("status", "absent")).lower()}
    if job:
        result |= {"job": job.get("job_id"), "recoveries": job.get("recovery_count") or 0}
    return result


def _jobs(*arguments: str, purpose: str, assumed: str = "") -> Command:
    return Command(("sky", "jobs", *arguments), purpose, assumed)


ACTIONS: Mapping[str, Callable[[Launch, Runner], dict[str, Any]]] = {
    "up": _up,
    "logs": _logs,
    "status": _status,
    "stop": _stop,
    "resume": _up,
    "delete": _delete,
}
