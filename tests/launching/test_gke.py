"""GKE's actions against a stand-in for `kubectl`, and the `xpk` command against xpk itself where it is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launching.conftest import Clients
from tests.launching.test_job_set import launch
from visor_jax.errors import RequestError, RunError
from visor_jax.launching import gke
from visor_jax.launching.description import Launch, describe
from visor_jax.launching.steps import Runner

# --- xpk -----------------------------------------------------------------------------------------------------------

# Where xpk's manifest differs, and why. A field that is missing here has to be equal.
DIFFERENCES = {
    "metadata.annotations.visor-jax/launch": "ours: tells another run of the same name",
    "metadata.labels.app.kubernetes.io/name": "ours: to select all runs",
    "metadata.labels.xpk.google.com/workload": "xpk's own label",
    "job.template.metadata.labels.app.kubernetes.io/name": "as above",
    "job.template.metadata.labels.xpk.google.com/workload": "as above",
    "spec.failurePolicy.rules.0.name": "JobSet's definition requires it; xpk leaves it to the webhook",
    "spec.network.enableDNSHostnames": "JobSet's default, stated",
    "spec.ttlSecondsAfterFinished": "xpk deletes a finished run after 12 hours; here `status` can still be asked",
    "job.completionMode": "JobSet's default, stated",
    "job.podFailurePolicy.rules.evicted.action": "xpk restarts after every status from 127, so also after 137",
    "job.podFailurePolicy.rules.evicted.onPodConditions.0.status": "as above",
    "job.podFailurePolicy.rules.evicted.onPodConditions.0.type": "as above",
    "job.podFailurePolicy.rules.status.onExitCodes.values": "xpk adds 42 and 127 to 255 to the statuses given",
    "pod.containers.visor.command": "xpk wraps the command in a script that passes SIGTERM on; ours is the command",
    "pod.containers.visor.args": "as above",
    "pod.containers.visor.securityContext.allowPrivilegeEscalation": "xpk's containers are privileged; ours are not",
    "pod.containers.visor.securityContext.privileged": "as above",
    "pod.hostNetwork": "xpk always; ours where hosts talk over the data-center network",
    "pod.dnsPolicy": "as above",
    "pod.imagePullSecrets.None.name": "xpk names a secret called None",
    "pod.nodeSelector.cloud.google.com/gke-spot": "xpk selects it in clusters that provision nodes themselves",
    "pod.nodeSelector.cloud.google.com/reservation-name": "as above",
    "pod.nodeSelector.topology.kubernetes.io/zone": "ours with --zone; xpk takes the zone for the cluster's",
    "pod.nodeSelector.cloud.google.com/placement-policy-name": "a policy of this name exists in xpk's clusters only",
    "pod.priorityClassName": "a class of this name exists in xpk's clusters only",
    "pod.schedulerName": "Kubernetes' default, stated",
    "pod.shareProcessNamespace": "ours: otherwise the run is process 1, to which SIGTERM does nothing while it starts",
    "pod.tolerations.0.effect": "xpk tolerates every effect of the taint",
    "pod.tolerations.1.effect": "ours: the nodes' taint for spot",
    "pod.tolerations.1.key": "as above",
    "pod.tolerations.1.operator": "as above",
    "pod.tolerations.1.value": "as above",
}


POD, JOB = "spec.replicatedJobs.slice.template.spec.template.spec.", "spec.replicatedJobs.slice.template.spec."


def fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields every field of a manifest with its path; items of a list are called by their `name`, else by number."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from fields(inner, (*path, str(name)))
    elif isinstance(value, list) and all(isinstance(inner, dict) for inner in value):
        for i, inner in enumerate(value):
            yield from fields(inner, (*path, str(inner.get("name", i))))
    else:
        yield ".".join(path).replace(POD, "pod.").replace(JOB, "job."), value


def comparable(text: str) -> dict[str, Any]:
    """Returns the fields of a JobSet; xpk's names of the replicated job and the volume are replaced by ours."""
    document = yaml.safe_load(text.replace("slice-job", "slice").replace("dshm-2", "shm"))
    policy = document["spec"]["failurePolicy"]
    policy["rules"] = {str(i): rule for i, rule in enumerate(policy["rules"])}
    policy = document["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
    policy["rules"] = {"status" if "onExitCodes" in rule else "evicted": rule for rule in policy["rules"]}
    return dict(fields(document))


OPTIONS: list[dict[str, Any]] = [
    {"topology": "v6e:4x4", "zone": "us-east5-b"},
    {"topology": "v5e:4x4", "zone": "us-west4-a", "slices": 2, "capacity": "spot"},
    {"topology": "v5p:2x2x2", "zone": "us-east5-a", "max_restarts": 3, "grace_seconds": 120},
    {"topology": "tpu7x:2x2x2", "zone": "us-central1-c"},
    {"topology": "v6e:2x2", "zone": "us-east5-b", "capacity": "reserved", "reservation": "mine"},
]


@pytest.mark.slow
def test_xpk_would_create_the_same(tmp_path: Path) -> None:
    if shutil.which("xpk") is None:
        pytest.skip("xpk is not installed: pip install xpk")
    unlike = set()
    for options in OPTIONS:
        queue = {"queue": gke.QUEUE_OF_XPK, "cluster": "gke_my-project_zone_c", "project": "my-project"}
        given = launch(**queue | options)
        theirs = comparable(rendered_by_xpk(given, tmp_path))
        ours = comparable(gke.manifest(given))
        unlike |= {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}
        command = theirs["pod.containers.visor.command"][-1]
        assert f"({ours['pod.containers.visor.args'][0]}) & PID=$!" in command, "SIGTERM reaches what `exec` starts"
    assert unlike == set(DIFFERENCES)


def rendered_by_xpk(given: Launch, folder: Path) -> str:
    """Returns the manifest that xpk's dry run writes."""
    file, environment = folder / "xpk.yaml", {**os.environ, "HOME": str(folder)}
    argv = [*gke.xpk(given).argv, "--dry-run", f"--output-manifest-file={file}"]
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return file.read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"secrets": ["HF_TOKEN"]}, "--secret"),
        ({"config": "mine.py"}, "--config=mine.py"),
        ({"service_account": "trainer@project.iam.gserviceaccount.com"}, "--service-account"),
        ({"buckets": ["images"]}, "--bucket"),
        ({"queue": "mine"}, "--queue=mine"),
        ({"topology": "v5e:2x4"}, "--topology=v5e:2x4"),
        ({"topology": "h100x8"}, "--topology=h100x8"),
        ({"capacity": "reserved"}, "--capacity=reserved without --reservation"),
        ({"overrides": ["--config.a=1\n2"]}, "a line break"),
    ],
)
def test_what_xpk_cannot_say_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=f"xpk has no option for {named}"):
        gke.xpk(launch(**options))


# --- actions -------------------------------------------------------------------------------------------------------

STARTING: dict[str, Any] = {}
RUNNING = {"restarts": 2, "replicatedJobsStatus": [{"name": "slice", "ready": 1}]}
FAILED = {"terminalState": "Failed", "restarts": 50}
COMPLETED = {"terminalState": "Completed"}


def act(action: str, **options: Any) -> dict[str, Any]:
    given = launch(**options)
    gke.check(given)
    return gke.ACTIONS[action](given, Runner("mine"))


def set_status(clients: Clients, status: dict[str, Any], pods: list[str], **spec: Any) -> None:
    sets = clients.get("jobsets")
    sets["mine"]["document"] |= {"status": status, "spec": spec}
    sets["mine"]["pods"] = pods
    clients.set(jobsets=sets)


def test_a_run_is_started_once(clients: Clients) -> None:
    assert act("up")["state"] == "submitted"
    assert yaml.safe_load(clients.get("jobsets")["mine"]["manifest"])["kind"] == "JobSet"
    clients.forget()
    assert act("up")["state"] == "starting"
    assert not clients.calls("apply")


def test_another_run_of_the_same_name_is_not_replaced(clients: Clients) -> None:
    act("up")
    with pytest.raises(RequestError, match="--name=mine: runs with other options"):
        act("up", config_json='{"seed": 1}')
    assert len(clients.calls("apply")) == 1


@pytest.mark.parametrize(
    ("status", "pods", "spec", "expected"),
    [
        (STARTING, ["Pending"], {}, {"state": "starting", "restarts": 0, "pods": {"Pending": 1}}),
        (STARTING, [], {"suspend": True}, {"state": "queued", "restarts": 0, "pods": {}}),
        (RUNNING, ["Running"] * 4, {}, {"state": "running", "restarts": 2, "pods": {"Running": 4}}),
        (FAILED, ["Failed", "Succeeded"], {}, {"state": "failed", "pods": {"Failed": 1, "Succeeded": 1}}),
        (COMPLETED, ["Succeeded"], {}, {"state": "completed", "pods": {"Succeeded": 1}}),
    ],
)
def test_status(
    status: dict[str, Any],
    pods: list[str],
    spec: dict[str, Any],
    expected: dict[str, Any],
    clients: Clients,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert act("status") == {"name": "mine", "target": "gke", "state": "absent"}
    assert capsys.readouterr().out == "mine: absent\n"
    act("up")
    assert "mine: submitted" in capsys.readouterr().err
    set_status(clients, status, pods, **spec)
    capsys.readouterr()
    assert act("status").items() >= expected.items()
    out = capsys.readouterr().out
    assert out.startswith(f"mine: {expected['state']}; restarts: ") and out.count("\n") == 1
    assert all(phase in out for phase in pods)


def test_stop_waits_for_the_pods_to_save_and_resume_starts_the_same_run(clients: Clients) -> None:
    act("up")
    manifest = clients.get("jobsets")["mine"]["manifest"]
    for _ in range(2):
        assert act("stop", grace_seconds=300)["state"] == "stopped"
    call = clients.calls("delete", "jobset")[0]
    assert {"--cascade=foreground", "--wait", "--timeout=360s", "--ignore-not-found"} <= set(call)
    assert act("status")["state"] == "absent"
    assert act("resume")["state"] == "submitted"
    assert clients.get("jobsets")["mine"]["manifest"] == manifest
    clients.forget()
    assert act("resume")["state"] == "starting"
    assert not clients.calls("apply") and not clients.calls("delete")


@pytest.mark.parametrize("status", [FAILED, COMPLETED])
def test_a_run_that_is_over_is_continued_by_resume_only(status: dict[str, Any], clients: Clients) -> None:
    act("up")
    set_status(clients, status, ["Failed"])
    with pytest.raises(RequestError, match="visor launch resume"):
        act("up")
    assert act("resume")["state"] == "submitted"
    assert act("status")["state"] == "starting"
    assert len(clients.calls("apply")) == 2


def test_delete_leaves_nothing_of_the_run_in_the_cluster(clients: Clients) -> None:
    act("up", config="mine.py")
    for _ in range(2):
        assert act("delete")["state"] == "deleted"
    assert clients.get("jobsets") == {}
    assert clients.calls("delete", "configmap", "mine-config")


def test_logs_are_those_of_all_pods(clients: Clients, capfd: pytest.CaptureFixture[str]) -> None:
    act("logs")
    assert "[pod/mine-slice-0-0-abcde/visor] step 1" in capfd.readouterr().out
    assert not clients.calls("--follow")
    act("logs", follow=True)
    assert clients.calls("--follow")


def test_a_secret_that_the_cluster_lacks_is_named_and_never_read(clients: Clients) -> None:
    with pytest.raises(RequestError, match="--secret=HF_TOKEN: the cluster has no secret hf-token"):
        act("up", secrets=["HF_TOKEN"])
    assert not clients.calls("apply")
    clients.set(secrets={"hf-token": "the value"})
    assert act("up", secrets=["HF_TOKEN"])["state"] == "submitted"
    asked = clients.calls("secret")
    assert asked and all("--output=name" in call for call in asked)
    assert "the value" not in str(clients.calls()) + clients.get("jobsets")["mine"]["manifest"]


@pytest.mark.parametrize(
    "said",
    [
        'E1129 17:12:14.138800 22791 memcache.go:265] "Unhandled Error" err="no API group list"\n'
        "The connection to the server localhost:8080 was refused - did you specify the right host or port?",
        "Error in configuration: context was not found for specified context: c",
        "error: You must be logged in to the server (Unauthorized)",
    ],
)
def test_without_a_cluster_the_request_is_wrong(said: str, clients: Clients) -> None:
    clients.fail("kubectl", said)
    with pytest.raises(RequestError) as caught:
        act("status")
    assert said.splitlines()[-1] in str(caught.value) and "get-credentials CLUSTER" in str(caught.value)


@pytest.mark.parametrize("action", ["up", "status", "stop", "resume", "delete"])
def test_a_cluster_without_jobset_is_named(action: str, clients: Clients) -> None:
    clients.fail("jobset", 'error: the server doesn\'t have a resource type "jobset"')
    with pytest.raises(RequestError, match="--cluster=mine: the cluster has no JobSet"):
        act(action, cluster="mine")
    assert not clients.calls("apply")


def test_a_save_that_takes_too_long_is_a_failure(clients: Clients) -> None:
    clients.fail("delete jobset", "error: timed out waiting for the condition on jobsets/mine")
    with pytest.raises(RunError, match="timed out waiting"):
        act("stop")


def test_the_cluster_is_a_context_of_kubectl(clients: Clients) -> None:
    act("up", cluster="gke_my-project_us-west4_first")
    assert all("--context=gke_my-project_us-west4_first" in call for call in clients.calls("kubectl"))


def test_a_dry_run_prints_the_manifest_and_runs_nothing(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    given = launch(secrets=["HF_TOKEN"])
    gke.ACTIONS["up"](given, Runner("mine", dry_run=True))
    out, err = capsys.readouterr()
    assert gke.manifest(given).strip() in out
    assert "kubectl apply --filename=visor-launch/mine/manifest.yaml" in out
    assert "gcloud container node-pools create mine-0" in err and "xpk has no option for --secret" in err
    gke.ACTIONS["up"](launch(), Runner("mine", dry_run=True))
    assert shlex.join(gke.xpk(launch()).argv) in capsys.readouterr().err
    assert not clients.calls()


def test_a_dry_run_shows_every_command_of_an_action(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {}
    for action in ("status", "resume"):
        runner = Runner("mine", dry_run=True)
        gke.ACTIONS[action](launch(), runner)
        verbs[action] = [" ".join(argv[1:3]).partition(" --")[0] for argv in runner.shown]
    assert verbs == {"status": ["get jobset", "get pods"], "resume": ["get jobset", "delete jobset", "apply"]}
    out = capsys.readouterr().out
    assert "# look for mine (assumed here: running)" in out and "# look for mine (assumed here: failed)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": ""}, r"--image: not set; .*launch/docker/tpu\.Dockerfile"),
        ({"image": "", "topology": "h100x8"}, r"launch/docker/cuda\.Dockerfile"),
        ({"workdir": "/data/run"}, r"--workdir=/data/run: expected gs://BUCKET/PATH"),
        ({"topology": "h200x2"}, "--topology=h200x2: .*expected h200x8"),
        ({"max_hours": 3}, "--max-hours=3: GKE ends no run by time; expected with --capacity=flex-start and --queue"),
        ({"topology": "v5e:2x2", "slices": 2}, "--slices=2: .*v5e:2x2 is one machine"),
        ({"labels": ["team=vision-"]}, "--label=team=vision-: Kubernetes"),
    ],
)
def test_what_gke_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gke.check(launch(**options))


def test_actions_other_than_up_need_no_topology(clients: Clients) -> None:
    for bare in (describe("gke", "mine"), describe("gke", "mine", config="a.py", config_json="{}")):
        for action in ("status", "logs", "stop", "delete"):
            gke.check(bare)
            gke.ACTIONS[action](bare, Runner("mine"))
    assert clients.calls("kubectl")


# --- node pools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"topology": "v5e:4x4"}, ["--machine-type=ct5lp-hightpu-4t", "--num-nodes=4", "--tpu-topology=4x4"]),
        ({"topology": "v5e:2x4"}, ["--machine-type=ct5lp-hightpu-8t", "--num-nodes=1", "--tpu-topology=2x4"]),
        ({"topology": "v6e:2x2", "capacity": "spot"}, ["--machine-type=ct6e-standard-4t", "--spot"]),
        ({"topology": "v5p:2x2x2", "capacity": "flex-start"}, ["--flex-start", "--num-nodes=0", "--max-nodes=2"]),
        ({"capacity": "flex-start", "queue": "mine"}, ["--max-nodes=4", "--enable-queued-provisioning"]),
        ({"topology": "v5p:2x2x2", "capacity": "reserved"}, ["--reservation-affinity=specific"]),
        ({"topology": "h100x8:2"}, ["--machine-type=a3-highgpu-8g", "--num-nodes=2"]),
        ({"topology": "tpu7x:2x2x1"}, ["--machine-type=tpu7x-standard-4t", "--num-nodes=1"]),
    ],
)
def test_node_pools(options: dict[str, Any], expected: list[str]) -> None:
    (command,) = gke.node_pool(launch(**options))
    assert command.argv[:5] == ("gcloud", "container", "node-pools", "create", "mine-0")
    assert set(expected) <= set(command.argv)


def test_slices_of_several_tpu7x_hosts_are_placed_by_a_policy() -> None:
    policy, *pools = gke.node_pool(launch("tpu7x:2x2x2", slices=2, zone="us-central1-c"))
    assert policy.argv[3:6] == ("create", "workload-policy", "tpu7x-2x2x2")
    assert {"--type=HIGH_THROUGHPUT", "--accelerator-topology=2x2x2", "--region=us-central1"} <= set(policy.argv)
    assert [pool.argv[4] for pool in pools] == ["mine-0", "mine-1"]
    for pool in pools:
        assert "--placement-policy=tpu7x-2x2x2" in pool.argv
        assert not any(word.startswith("--tpu-topology") for word in pool.argv)


@pytest.mark.slow
def test_kubectl_knows_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, where it is installed, reads the command lines of all actions; nothing listens at its server."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    monkeypatch.chdir(tmp_path)
    given, runner = launch(config="mine.py", secrets=["HF_TOKEN"], follow=True), Runner("mine")
    runner.write("manifest.yaml", gke.manifest(given))
    dry = Runner("mine", dry_run=True)
    for action in gke.ACTIONS.values():
        action(given, dry)
    pods = (
        "kubectl",
        "get",
        "pods",
        f"--selector={gke.SELECTOR}=mine",
        "--output=json",
    )  # of `status`, if there is a run
    assert {argv[1] for argv in dry.shown} == {"get", "apply", "logs", "delete"}
    for argv in {*dry.shown, pods}:
        nowhere = ("--server=http://127.0.0.1:9", "--request-timeout=2s", f"--cache-dir={tmp_path}")
        done = subprocess.run([program, *argv[1:], *nowhere], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "127.0.0.1:9" in done.stderr, (argv, done.stderr)
