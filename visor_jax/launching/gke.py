"""GKE: the `kubectl` calls of every action, the equivalent `xpk workload create`, and the node pools of a launch.

`job_set.py` makes the manifest. Nothing here needs a client before a command is run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from visor_jax.errors import RequestError
from visor_jax.launching.description import Launch, travels
from visor_jax.launching.environment import environment
from visor_jax.launching.job_set import (
    CONTAINER,
    DIGEST,
    GPUS,
    RESTART_CODES,
    job_set,
    manifest,
    secret_object,
    shell_command,
    unexpanded,
)
from visor_jax.launching.steps import Command, Done, Runner

ENDED = ("completed", "failed")
QUEUE_OF_XPK = "multislice-queue"
LABEL = re.compile(r"[a-z0-9]([-_a-z0-9]*[a-z0-9])?")
# The machine type of a chip's hosts.
MACHINES = {
    "v4": "ct4p-hightpu-{}t",
    "v5e": "ct5lp-hightpu-{}t",
    "v5p": "ct5p-hightpu-{}t",
    "v6e": "ct6e-standard-{}t",
    "tpu7x": "tpu7x-standard-{}t",
    "h100": "a3-highgpu-{}g",
    "h200": "a3-ultragpu-{}g",
}
_XPK_TYPES = {"v5e": "v5litepod"}  # the others are called the same
_NO_JOB_SETS = "doesn't have a resource type"
SELECTOR = "jobset.sigs.k8s.io/jobset-name"


def check(launch: Launch) -> None:
    """Checks what only GKE asks for: an image, a workdir in a bucket, Kubernetes' labels, slices of several machines.

    Raises:
      RequestError: one of them is missing or cannot be.
    """
    if launch.workdir and not launch.in_bucket:
        raise RequestError(f"--workdir={launch.workdir}: expected gs://BUCKET/PATH; the disk of a pod is lost with it")
    machines = launch.rented
    if machines is not None and machines.slices > 1 and machines.hosts == 1:
        raise RequestError(
            f"--slices={machines.slices}: GKE joins slices of several machines only; {machines.text} is one machine"
        )
    if machines is not None and machines.chip.name == "h200" and machines.chips_per_host != 8:
        raise RequestError(f"--topology={machines.text}: Google's machines with H200 have 8 of them; expected h200x8")
    if launch.max_hours != Launch.max_hours and not (launch.queue and launch.capacity == "flex-start"):
        raise RequestError(
            f"--max-hours={launch.max_hours}: GKE ends no run by time; expected with --capacity=flex-start and --queue"
        )
    for key, value in launch.labels:
        if not LABEL.fullmatch(key) or not LABEL.fullmatch(value or "v"):
            raise RequestError(f"--label={key}={value}: Kubernetes' labels begin and end with a letter or digit")
    if launch.config_json and machines is not None and not launch.image:
        kind = "tpu" if machines.kind == "tpu" else "cuda"
        raise RequestError(
            f"--image: not set; a pod starts from an image: build launch/docker/{kind}.Dockerfile, push it, and give"
            " --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/visor:TAG"
        )


def xpk(launch: Launch) -> Command:
    """Returns the `xpk workload create` that starts the same run.

    Raises:
      RequestError: xpk has no option for a part of the launch, such as a secret by reference.
    """
    machines = launch.machines
    beyond = {
        "--secret": launch.secrets,
        "--bucket": launch.buckets,
        "--service-account": launch.service_account,
        "--label": launch.labels,
        f"--config={launch.config}": travels(launch),
        f"--topology={machines.text}": not _known_to_xpk(launch),
        f"--queue={launch.queue}": launch.queue not in ("", QUEUE_OF_XPK),
        "--capacity=reserved without --reservation": launch.capacity == "reserved" and not launch.reservation,
        "a line break": "\n" in shell_command(launch),
    }
    if named := [name for name, value in beyond.items() if value]:
        raise RequestError(f"xpk has no option for {', '.join(named)}; use the manifest")
    options = {
        "cluster": launch.cluster.rpartition("_")[2] or "CLUSTER",
        "workload": launch.name,
        "tpu-type": f"{_XPK_TYPES.get(machines.chip.name, machines.chip.name)}-{machines.grid}",
        "num-slices": machines.slices,
        "zone": launch.zone,
        "project": launch.project,
        "docker-name": CONTAINER,
        "docker-image": launch.image,
        "reservation": launch.reservation,
        "max-restarts": launch.max_restarts,
        "termination-grace-period-seconds": launch.grace_seconds,
        "restart-on-exit-codes": ",".join(map(str, sorted(RESTART_CODES))),
    }
    arguments = [f"--{name}={value}" for name, value in options.items() if value != ""]
    arguments += {"spot": ["--spot"], "flex-start": ["--flex"], "on-demand": ["--on-demand"]}.get(launch.capacity, [])
    if machines.chip.name == "tpu7x":
        arguments.append("--no-use-parallel-containers")  # otherwise one container for each half of a host
    arguments += [f"--env={name}={unexpanded(value)}" for name, value in environment(launch).items()]
    arguments.append(f"--command={unexpanded(shell_command(launch))}")
    return Command(("xpk", "workload", "create", *arguments), f"start {launch.name} with xpk")


def _known_to_xpk(launch: Launch) -> bool:
    """Returns whether xpk has machines of this size; its hosts of v5e have 4 chips, and those of v6e 1 or 4."""
    machines = launch.machines
    sizes = {"v5e": (4,), "v6e": (1, 4)}.get(machines.chip.name, (4,))
    small = machines.chip.name == "v5e" and machines.topology.chips == 4
    return machines.kind == "tpu" and machines.chips_per_host in sizes and not small


def node_pool(launch: Launch) -> tuple[Command, ...]:
    """Returns the commands that give a cluster the node pools of a launch, one per slice of TPUs.

    A slice of several tpu7x hosts is placed by a workload policy; the other chips name their topology.
    """
    machines, location = launch.machines, launch.zone or "ZONE"
    machine = MACHINES[machines.chip.name].format(machines.chips_per_host)
    options = [f"--cluster={launch.cluster.rpartition('_')[2] or 'CLUSTER'}", f"--node-locations={location}"]
    options += [f"--project={launch.project}"] if launch.project else []
    nodes = 0 if launch.capacity == "flex-start" else machines.hosts  # the autoscaler adds those of flex-start
    options += [f"--machine-type={machine}", f"--num-nodes={nodes}"]
    options += ["--workload-metadata=GKE_METADATA"] if launch.service_account else []
    commands = []
    if machines.kind == "gpu":
        label = GPUS[machines.chip.name]
        options.append(f"--accelerator=type={label},count={machines.chips_per_host},gpu-driver-version=default")
    elif machines.chip.name != "tpu7x":
        options.append(f"--tpu-topology={machines.grid}")
    elif machines.hosts > 1:
        policy = f"tpu7x-{machines.grid}"
        options.append(f"--placement-policy={policy}")
        placement = ("--type=HIGH_THROUGHPUT", f"--accelerator-topology={machines.grid}")
        region = f"--region={location.rpartition('-')[0] or 'REGION'}"
        create = ("gcloud", "compute", "resource-policies", "create", "workload-policy", policy, *placement, region)
        project = (f"--project={launch.project}",) if launch.project else ()
        commands.append(Command((*create, *project), f"place slices of {machines.grid}"))
    options += _capacity(launch)
    for i in range(machines.slices):
        argv = ("gcloud", "container", "node-pools", "create", f"{launch.name}-{i}", *options)
        commands.append(Command(argv, f"nodes of slice {i}"))
    return tuple(commands)


def _capacity(launch: Launch) -> list[str]:
    """Returns the options of a node pool that say how its machines are paid for."""
    if launch.capacity == "spot":
        return ["--spot"]
    if launch.capacity == "flex-start":
        scaling = ["--enable-autoscaling", f"--max-nodes={launch.machines.hosts}", "--location-policy=ANY"]
        queued = ["--enable-queued-provisioning"] if launch.queue else []
        return ["--flex-start", *scaling, "--reservation-affinity=none", "--no-enable-autorepair", *queued]
    if launch.capacity == "reserved":
        return ["--reservation-affinity=specific", f"--reservation={launch.reservation or 'RESERVATION'}"]
    return []


def _up(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Starts the run, unless it is there already. A dry run also says what the cluster needs, and how xpk does it."""
    if runner.dry_run:
        _say_alternatives(launch, runner)
    _check_secrets(launch, runner)
    found = _find(launch, runner)
    if found:
        state = _state(found)
        if state in ENDED:
            raise RequestError(
                f"--name={launch.name}: has {state}; continue it with 'visor launch resume', or delete it"
            )
        if _digest(found) != _digest(job_set(launch)):
            raise RequestError(f"--name={launch.name}: runs with other options; stop it first, or take another name")
        runner.say(f"{launch.name} is there already: {state}")
        return {"name": launch.name, "target": "gke", "state": state}
    return _apply(launch, runner)


def _say_alternatives(launch: Launch, runner: Runner) -> None:
    for command in node_pool(launch):
        runner.say(f"for a cluster without such nodes: {command}")
    try:
        runner.say(f"the same run by xpk: {xpk(launch)}")
    except RequestError as error:
        runner.say(str(error))


def _resume(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Continues a run that was stopped, has failed or lost its nodes; one that is not over stays as it is."""
    found = _find(launch, runner, "failed")
    if found and _state(found) not in ENDED:
        runner.say(f"{launch.name} is not over: {_state(found)}")
        return {"name": launch.name, "target": "gke", "state": _state(found)}
    _check_secrets(launch, runner)
    if found:
        _with_job_sets(_delete_job_set(launch), launch, runner)
    return _apply(launch, runner)


def _apply(launch: Launch, runner: Runner) -> dict[str, Any]:
    path = runner.write("manifest.yaml", manifest(launch))
    runner.run(_kubectl(launch, "apply", f"--filename={path}", purpose=f"create the pods of {launch.name}"))
    runner.say(f"{launch.name}: submitted; 'visor launch status' says when it runs")
    return {"name": launch.name, "target": "gke", "state": "submitted", "manifest": str(path)}


def _check_secrets(launch: Launch, runner: Runner) -> None:
    """Raises RequestError if the cluster lacks a secret: its pods would wait for it forever."""
    for secret in launch.secrets:
        name = secret_object(secret)
        purpose = f"look for the secret {name}, without reading it"
        command = _kubectl(launch, "get", "secret", name, "--output=name", purpose=purpose, assumed=f"secret/{name}")
        if runner.run(command, accept=("not found",)).status:
            raise RequestError(
                f"--secret={secret}: the cluster has no secret {name}; store the value, without showing it, by"
                f" 'kubectl create secret generic {name} --from-file={secret}=/dev/stdin'"
            )


def _logs(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Shows what the processes of the run printed, each line with the name of its pod."""
    options = [f"--selector={SELECTOR}={launch.name}", f"--container={CONTAINER}", "--prefix", "--tail=200"]
    options += ["--max-log-requests=256", "--ignore-errors"]
    options += ["--follow"] if launch.follow else []
    runner.show(_kubectl(launch, "logs", *options, purpose=f"show the logs of {launch.name}"))
    return {"name": launch.name, "target": "gke"}


def _status(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Returns the state of the run, its restarts, and how many pods are in which phase."""
    found = _find(launch, runner, "running")
    result: dict[str, Any] = {"name": launch.name, "target": "gke", "state": _state(found)}
    if not found:
        runner.tell(f"{launch.name}: absent")
        return result
    options = (f"--selector={SELECTOR}={launch.name}", "--output=json")
    command = _kubectl(launch, "get", "pods", *options, purpose="ask for its pods", assumed='{"items": []}')
    pods = json.loads(runner.run(command).out or "{}").get("items", [])
    phases = Counter(pod.get("status", {}).get("phase", "Unknown") for pod in pods)
    restarts = found.get("status", {}).get("restarts", 0)
    counts = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items())) or "none"
    runner.tell(f"{launch.name}: {result['state']}; restarts: {restarts}; pods: {counts}")
    return result | {"restarts": restarts, "pods": dict(sorted(phases.items()))}


def _stop(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Sends SIGTERM to all processes, and returns when they have saved and ended.

    The JobSet is deleted: one that is suspended is started again by Kueue as soon as there is room. The workdir has
    everything that `resume` needs.
    """
    runner.say(f"{launch.name}: SIGTERM; waiting at most {launch.grace_seconds} s for the processes to save")
    _with_job_sets(_delete_job_set(launch), launch, runner)
    runner.say(f"{launch.name}: stopped; node pools that do not shrink still cost money")
    return {"name": launch.name, "target": "gke", "state": "stopped"}


def _delete(launch: Launch, runner: Runner) -> dict[str, Any]:
    """Stops the run and deletes its configuration; the workdir, the secrets and the node pools stay."""
    _with_job_sets(_delete_job_set(launch), launch, runner)
    options = ("delete", "configmap", f"{launch.name}-config", "--ignore-not-found")
    runner.run(_kubectl(launch, *options, purpose=f"delete the configuration of {launch.name}"))
    runner.say(f"{launch.name}: deleted; workdir, secrets and node pools stay")
    return {"name": launch.name, "target": "gke", "state": "deleted"}


def _delete_job_set(launch: Launch) -> Command:
    waiting = ("--cascade=foreground", "--wait", f"--timeout={launch.grace_seconds + 60}s")
    purpose = f"end the pods of {launch.name} and wait for them"
    return _kubectl(launch, "delete", "jobset", launch.name, "--ignore-not-found", *waiting, purpose=purpose)


# What a dry run goes on with, instead of the cluster's answer.
_ASSUMED: Mapping[str, str] = {
    "absent": "",
    "running": '{"status": {"replicatedJobsStatus": [{"ready": 1}]}}',
    "failed": '{"status": {"terminalState": "Failed"}}',
}


def _find(launch: Launch, runner: Runner, assumed: str = "absent") -> dict[str, Any]:
    """Returns the JobSet as the cluster has it; empty if there is none. A dry run goes on as if it were `assumed`."""
    options = ("get", "jobset", launch.name, "--ignore-not-found", "--output=json")
    command = _kubectl(launch, *options, purpose=f"look for {launch.name}", assumed=_ASSUMED[assumed], premise=assumed)
    return json.loads(_with_job_sets(command, launch, runner).out or "{}")


def _with_job_sets(command: Command, launch: Launch, runner: Runner) -> Done:
    """Runs a command that needs a cluster with JobSet.

    Raises:
      RequestError: JobSet is not installed there.
    """
    done = runner.run(command, accept=(_NO_JOB_SETS,))
    if done.status:
        cluster = f"--cluster={launch.cluster}" if launch.cluster else "kubectl's current context"
        raise RequestError(f"{cluster}: the cluster has no JobSet; see https://jobset.sigs.k8s.io/docs/installation/")
    return done


def _state(found: Mapping[str, Any]) -> str:
    """Returns "absent", "queued", "starting", "running", "completed" or "failed"."""
    if not found:
        return "absent"
    status = found.get("status", {})
    if terminal := status.get("terminalState", ""):
        return terminal.lower()
    if found.get("spec", {}).get("suspend"):
        return "queued"
    jobs = status.get("replicatedJobsStatus", [])
    return "running" if jobs and all(job.get("ready", 0) for job in jobs) else "starting"


def _digest(found: Mapping[str, Any]) -> str:
    return found.get("metadata", {}).get("annotations", {}).get(DIGEST, "")


def _kubectl(launch: Launch, *arguments: str, purpose: str, assumed: str = "", premise: str = "") -> Command:
    context = (f"--context={launch.cluster}",) if launch.cluster else ()
    return Command(("kubectl", *context, *arguments), purpose, assumed, premise=premise)


ACTIONS: Mapping[str, Callable[[Launch, Runner], dict[str, Any]]] = {
    "up": _up,
    "logs": _logs,
    "status": _status,
    "stop": _stop,
    "resume": _resume,
    "delete": _delete,
}
