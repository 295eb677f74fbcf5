"""Cloud TPU VMs by queued resources: v4, v5e, v5p and v6e, one slice or several.

Every action looks first at what exists and may be repeated. A run is a transient systemd unit on each worker, so it
survives the ssh session that started it. Its log is a file on the worker, copied to `logs/` of a workdir in a bucket
once a minute. tpu7x is not offered by this API. Commands and states are those of gcloud 528 and of the TPU API v2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from visor_jax.errors import RequestError, RunError
from visor_jax.launching import wheel
from visor_jax.launching.description import MOUNTS, Launch, visor_argv
from visor_jax.launching.environment import environment
from visor_jax.launching.machines import COUNTED_IN_CORES
from visor_jax.launching.steps import Command, Done, Runner
from visor_jax.launching.template import render

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
TYPES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
POLL_SECONDS, REPORT_POLLS = 20.0, 30  # a state that does not change is reported every 10 minutes
COMING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
GOING = ("SUSPENDING", "DELETING")
ABSENT = "NOT_FOUND"  # our word for a queued resource that does not exist
NOT_FOUND, EXISTS = ("NOT_FOUND",), ("ALREADY_EXISTS", "already exists")  # in what gcloud prints
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")


def check(launch: Launch) -> None:
    """Checks what only this API asks for: TPUs that it offers, and a zone.

    Raises:
      RequestError: GPUs, tpu7x, no zone, or an image.
    """
    chip = "" if launch.rented is None else launch.rented.chip.name
    if chip == "tpu7x":
        raise RequestError("--topology: the Cloud TPU API does not offer tpu7x; use --target=gke")
    if chip and chip not in RUNTIMES:
        raise RequestError(f"--topology={launch.machines.text}: target tpu has no GPUs; use --target=gke, slurm or sky")
    if not launch.zone:
        raise RequestError("--zone is missing; expected a zone with these TPUs, such as --zone=us-east5-b")
    if launch.image:
        raise RequestError(f"--image={launch.image}: TPU VMs run no image; leave it out, or use --target=gke")
    for flag, value in (("--cluster", launch.cluster), ("--queue", launch.queue)):
        if value:
            raise RequestError(f"{flag}={value}: not for target tpu; expected with --target=gke or slurm")


def accelerator_type(launch: Launch) -> str:
    """Returns the API's name of one slice, such as v5litepod-16 or v5p-32."""
    machines = launch.machines
    return f"{TYPES[machines.chip.name]}-{machines.slice_chips * (2 if machines.chip.name in COUNTED_IN_CORES else 1)}"


def nodes(launch: Launch) -> list[str]:
    """Returns the names of the slices' nodes."""
    count = launch.machines.slices
    return [launch.name] if count == 1 else [f"{launch.name}-{index}" for index in range(count)]


# --- commands ---------------------------------------------------------------------------------------------------------


def place(launch: Launch) -> tuple[str, ...]:
    """Returns the flags that every command has."""
    project = (f"--project={launch.project}",) if launch.project else ()
    return (f"--zone={launch.zone}", *project, "--quiet")


def create_command(launch: Launch) -> Command:
    """Returns the request for the machines."""
    chip, slices = launch.machines.chip.name, launch.machines.slices
    flex = launch.capacity == "flex-start"  # only the alpha client knows it
    which = (f"--node-id={launch.name}",)
    if slices > 1:
        which = (f"--node-count={slices}", f"--node-prefix={launch.name}")
    capacity = {
        "on-demand": (),
        "spot": ("--spot",),
        "reserved": ("--reserved",),
        "flex-start": ("--provisioning-model=flex-start", f"--max-run-duration={launch.max_hours}h"),
    }[launch.capacity]
    account = (f"--service-account={launch.service_account}",) if launch.service_account else ()
    labels = ",".join(f"{key}={value}" for key, value in {"app": "visor", **dict(launch.labels)}.items())
    argv = (
        *(("gcloud", "alpha", *QUEUED[1:]) if flex else QUEUED),
        *("create", launch.name, *which),
        *(f"--accelerator-type={accelerator_type(launch)}", f"--runtime-version={RUNTIMES[chip]}"),
        *capacity,
        *(() if flex else (f"--valid-until-duration={launch.max_hours}h",)),
        *(*account, f"--scopes={SCOPE}", f"--labels={labels}", *place(launch)),
    )
    return Command(argv, "create the queued resource")


def describe_command(launch: Launch, assumed: str) -> Command:
    """Returns the command that shows the queued resource; a dry run goes on as if it were in the state `assumed`."""
    found = {"state": {"state": assumed}}
    argv = (*QUEUED, "describe", launch.name, "--format=json", *place(launch))
    return Command(argv, "look at the queued resource", json.dumps(found), premise=assumed)


def ssh_command(launch: Launch, script: str, purpose: str, worker: str = "all") -> Command:
    """Returns the command that runs a script on every worker of every slice, or on worker 0 of the first."""
    which = (f"--node={'all' if worker == 'all' else '0'}", f"--worker={worker}")
    return Command((*QUEUED, "ssh", launch.name, *place(launch), *which, f"--command={script}"), purpose)


def delete_command(launch: Launch) -> Command:
    """Returns the command that deletes the queued resource with its nodes, and waits until they are gone."""
    return Command((*QUEUED, "delete", launch.name, "--force", *place(launch)), "delete the queued resource")


def script(launch: Launch, name: str, **values: Any) -> str:
    """Returns a script for the workers."""
    return render(f"tpu_{name}.sh", launch=launch, unit=f"visor-{launch.name}", mounts=MOUNTS, **values)


def run_script(launch: Launch) -> str:
    """Returns the script that systemd runs on every worker."""
    command = visor_argv(launch, "config.json", "env/bin/visor")
    return script(launch, "run", environment=list(environment(launch).items()), command=command)


# --- actions ----------------------------------------------------------------------------------------------------------


def state_of(launch: Launch, runner: Runner, assumed: str) -> tuple[str, dict[str, Any]]:
    """Returns the state of the queued resource and its record; `ABSENT` if there is none.

    Raises:
      RequestError: it exists with other machines.
    """
    done = runner.run(describe_command(launch, assumed), accept=NOT_FOUND)
    if done.status:
        return ABSENT, {}
    try:
        record = json.loads(done.out)
        state = record["state"]["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"gcloud: the description of {launch.name} is not understood: {done.out[:200]!r}") from error
    for spec in record.get("tpu", {}).get("nodeSpec", []) if launch.rented is not None else []:
        found = spec.get("node", {}).get("acceleratorType", accelerator_type(launch))
        if found != accelerator_type(launch):
            raise RequestError(
                f"--name={launch.name}: exists in {launch.zone} with {found}, not {accelerator_type(launch)};"
                " choose another name, or delete it first"
            )
    return state, record


def up(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Creates the machines unless they exist, waits for them, and starts the run unless it is running."""
    state, record = state_of(launch, runner, ABSENT)
    if state in ("SUSPENDED", "FAILED", *GOING):
        raise RunError(
            f"{launch.name} is {state}{reason(record)}; 'visor launch resume' with the same flags creates it again"
        )
    if state == ABSENT or runner.dry_run:
        create(launch, runner)
    return start(launch, runner)


def resume(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Creates again what was preempted, suspended or failed, waits, and starts the run, which continues."""
    state, record = state_of(launch, runner, "SUSPENDED")
    while state in GOING:
        runner.say(f"{launch.name}: {state}; waiting until it has ended")
        runner.sleep(POLL_SECONDS)
        state, record = state_of(launch, runner, "SUSPENDED")
    lost = state in ("SUSPENDED", "FAILED") or (state == "ACTIVE" and lost_nodes(launch, runner))
    if lost:
        check_capacity(launch, record)
        runner.say(f"{launch.name}: {state}; deleting it and asking again")
        runner.run(delete_command(launch), accept=NOT_FOUND)
    if lost or state == ABSENT:
        create(launch, runner)
    return start(launch, runner)


def check_capacity(launch: Launch, record: Mapping[str, Any]) -> None:
    """Checks that what replaces a request is paid for in the same way: a forgotten flag costs money.

    Raises:
      RequestError: the request was for spot or reserved machines, and the launch is not.
    """
    reserved = (record.get("guaranteed") or {}).get("reserved")
    before = "spot" if "spot" in record else "reserved" if reserved else launch.capacity
    if before != launch.capacity:
        raise RequestError(
            f"--capacity={launch.capacity}: {launch.name} was asked for with --capacity={before}; give that again, or"
            " 'visor launch delete' it first"
        )


def create(launch: Launch, runner: Runner) -> None:
    """Asks for the machines; someone may have done so since we looked."""
    runner.run(create_command(launch), accept=EXISTS)


def start(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Waits for the machines, copies and installs the package, and starts the run, unless it is running."""
    machines = launch.machines.hosts * launch.machines.slices
    if machines > 1 and not launch.in_bucket:
        runner.say(f"--workdir={launch.workdir}: has to be on a file system that all {machines} machines share")
    wait(launch, runner)
    prepared = runner.run(ssh_command(launch, script(launch, "prepare"), "make the run's folder on every worker"))
    workers = re.findall(r"^([\w.-]+): (running|ready)$", prepared.out, re.MULTILINE)
    if workers and all(state == "running" for _, state in workers):
        runner.say(f"{launch.name}: is running; nothing is copied")
    else:
        copy(launch, runner)
        run(launch, runner)
    return {"state": "running", "workdir": launch.workdir}


def wait(launch: Launch, runner: Runner) -> None:
    """Waits until the machines are ready, and reports every change of state.

    Raises:
      RunError: the request failed, expired, or was preempted.
    """
    before, polls = "", 0
    while True:
        state, record = state_of(launch, runner, "ACTIVE")
        if state != before or polls % REPORT_POLLS == 0:
            waited = polls * POLL_SECONDS / 60
            runner.say(f"{launch.name}: {state}" + (f" after {waited:.0f} minutes" if waited >= 1 else ""))
        if state == "ACTIVE":
            return
        if state not in COMING:
            raise RunError(f"{launch.name} is {state}{reason(record)}; 'visor launch resume' asks for it again")
        before, polls = state, polls + 1
        runner.sleep(POLL_SECONDS)


def copy(launch: Launch, runner: Runner) -> None:
    """Copies the package as a wheel and the resolved configuration to every worker, and nothing else."""
    runner.say(f"{launch.name}: copying the package and the configuration to every worker")
    package, config = wheel.build(runner), runner.write("config.json", launch.config_json)
    target = (f"{launch.name}:visor/{launch.name}/", *place(launch), "--node=all", "--worker=all")
    runner.run(Command((*QUEUED, "scp", str(package), str(config), *target), "copy the package and the configuration"))


def run(launch: Launch, runner: Runner) -> None:
    """Installs the package on every worker and starts the run there."""
    install = script(launch, "install", wheel=wheel.FILE, pins=wheel.pins())
    runner.say(f"{launch.name}: installing on every worker, which takes minutes")
    runner.run(ssh_command(launch, install, "install the package on every worker"))
    started = runner.run(
        ssh_command(launch, script(launch, "start", run_script=run_script(launch)), "start the run on every worker")
    )
    report(runner, started)


def logs(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Shows the end of the log of worker 0; from the bucket if the machines are gone."""
    state, _ = state_of(launch, runner, "ACTIVE")
    if state == "ACTIVE":
        runner.show(ssh_command(launch, script(launch, "logs"), "show the log of worker 0", worker="0"))
    elif launch.in_bucket:
        runner.show(
            Command(("gcloud", "storage", "cat", f"{launch.workdir}/logs/*.log"), "show the logs in the bucket")
        )
    else:
        raise RunError(f"{launch.name} is {state}: its machines have no log to show; --workdir=gs://... keeps one")
    return {"state": state}


def status(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Reports the machines' state, and the run's on every worker."""
    state, record = state_of(launch, runner, "ACTIVE")
    runner.tell(f"{launch.name}: {state}{reason(record)}")
    workers = {}
    if state == "ACTIVE":
        done = runner.run(ssh_command(launch, script(launch, "status"), "ask every worker"))
        workers = {
            host: worker_state(line)
            for host, line in re.findall(r"^([\w.-]+): (SubState=.*|.*SubState=.*)$", done.out, re.M)
        }
        for host, text in sorted(workers.items()):
            runner.tell(f"{host}: {text}")
    return {"state": state, "workers": workers}


def worker_state(line: str) -> str:
    """Returns in words what systemd says about the run of one worker."""
    shown = dict(re.findall(r"(\w+)=(\S*)", line))
    ended, restarts = shown.get("ExecMainStatus", ""), shown.get("NRestarts", "0")
    again = f", restarted {restarts} times" if restarts not in ("", "0") else ""
    match shown.get("SubState"):
        case "running":
            return f"running{again}"
        case "auto-restart":
            return f"restarting{again}"
        case "exited":
            return {"0": "complete", "143": "stopped after saving"}.get(ended, f"ended with {ended}") + again
        case "failed":
            return f"failed with {ended} ({shown.get('Result', '')}){again}"
    return "not started"


def stop(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Sends SIGTERM to the run on every worker and waits until it has saved; the machines stay."""
    state, _ = state_of(launch, runner, "ACTIVE")
    if state == "ACTIVE":
        report(runner, runner.run(ssh_command(launch, script(launch, "stop"), "stop the run on every worker")))
        runner.say(f"{launch.name}: stopped; its machines still cost money until 'visor launch delete'")
    else:
        runner.say(f"{launch.name}: {state}; nothing runs")
    return {"state": "stopped"}


def delete(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Deletes the machines and the request; the workdir stays."""
    done = runner.run(delete_command(launch), accept=NOT_FOUND)
    runner.say(f"{launch.name}: {'does not exist' if done.status else 'deleted'}")
    return {"state": ABSENT}


def lost_nodes(launch: Launch, runner: Runner) -> bool:
    """Returns whether a slice of an active request is gone: preempted, terminated or deleted."""
    for node in nodes(launch):
        argv = ("gcloud", "compute", "tpus", "tpu-vm", "describe", node, "--format=value(state)", *place(launch))
        done = runner.run(Command(argv, f"look at the slice {node}", "READY"), accept=NOT_FOUND)
        if done.status or done.out.strip() in ("PREEMPTED", "TERMINATED", "STOPPED", "DELETING"):
            return True
    return False


def reason(record: Mapping[str, Any]) -> str:
    """Returns why a request failed, as the service says it."""
    error = record.get("state", {}).get("failedData", {}).get("error", {})
    return f" ({error['message']})" if isinstance(error, dict) and error.get("message") else ""


def report(runner: Runner, done: Done) -> None:
    """Repeats what the workers said."""
    for line in done.out.splitlines():
        if line.strip():
            runner.say(line)


ACTIONS: Mapping[str, Callable[[Launch, Runner], dict[str, Any]]] = {
    "up": up,
    "logs": logs,
    "status": status,
    "stop": stop,
    "resume": resume,
    "delete": delete,
}
