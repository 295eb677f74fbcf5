"""The JobSet of a run: its fields, the published schemas, what restarts it, and what its container executes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from visor_jax.errors import RequestError
from visor_jax.launching.description import Launch, describe
from visor_jax.launching.job_set import RESTART_CODES, job_set, manifest
from visor_jax.scale.environment import process_settings

SCHEMA = Path(__file__).with_name("schemas") / "jobset.json"
IMAGE = "us-docker.pkg.dev/project/visor/visor:1"


def launch(topology: str = "v5e:4x4", **options: Any) -> Launch:
    given: dict[str, Any] = {
        "config": "almanac_mini",
        "config_json": '{"seed": 0}',
        "workdir": "gs://bucket/run",
        "image": IMAGE,
    }
    return describe("gke", "mine", topology, **given | options)


def documents(given: Launch) -> dict[str, dict[str, Any]]:
    """Returns the documents of a manifest by their kind, as a YAML reader sees them."""
    return {document["kind"]: document for document in yaml.safe_load_all(manifest(given))}


def job_of(given: Launch) -> dict[str, Any]:
    return documents(given)["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(given: Launch) -> dict[str, Any]:
    return job_of(given)["template"]["spec"]


def container_of(given: Launch) -> dict[str, Any]:
    (container,) = pod_of(given)["containers"]
    return container


EVERYTHING: dict[str, dict[str, Any]] = {
    "plain": {},
    "a configuration of the user": {"config": "mine.py"},
    "all options": {
        "slices": 2,
        "zone": "us-west4-a",
        "capacity": "spot",
        "secrets": ["HF_TOKEN", "WANDB_API_KEY"],
        "labels": ["team=vision"],
        "buckets": ["images", "more-images"],
        "queue": "multislice-queue",
        "service_account": "trainer@project.iam.gserviceaccount.com",
        "overrides": ["--config.train.steps=9"],
    },
    "GPUs": {"topology": "h100x8:2"},
    "tpu7x": {"topology": "tpu7x:2x2x2", "capacity": "flex-start"},
}


@pytest.mark.parametrize(
    ("topology", "slices", "labels", "hosts", "chips"),
    [
        ("v4:2x2x2", 1, {"gke-tpu-accelerator": "tpu-v4-podslice", "gke-tpu-topology": "2x2x2"}, 2, 4),
        ("v5e:1x1", 1, {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "1x1"}, 1, 1),
        ("v5e:2x4", 1, {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "2x4"}, 1, 8),
        ("v5e:4x4", 3, {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "4x4"}, 4, 4),
        ("v5p:4x4x4", 1, {"gke-tpu-accelerator": "tpu-v5p-slice", "gke-tpu-topology": "4x4x4"}, 16, 4),
        ("v6e:16x16", 1, {"gke-tpu-accelerator": "tpu-v6e-slice", "gke-tpu-topology": "16x16"}, 64, 4),
        ("tpu7x:2x2x2", 2, {"gke-tpu-accelerator": "tpu7x", "gke-tpu-topology": "2x2x2"}, 2, 4),
        ("h100x8", 1, {"gke-accelerator": "nvidia-h100-80gb"}, 1, 8),
        ("h200x8:2", 1, {"gke-accelerator": "nvidia-h200-141gb"}, 2, 8),
    ],
)
def test_chips_become_nodes(topology: str, slices: int, labels: dict[str, str], hosts: int, chips: int) -> None:
    given = launch(topology, slices=slices)
    replicated = documents(given)["JobSet"]["spec"]["replicatedJobs"][0]
    assert replicated["replicas"] == slices
    assert (job_of(given)["parallelism"], job_of(given)["completions"]) == (hosts, hosts)
    assert pod_of(given)["nodeSelector"] == {f"cloud.google.com/{name}": value for name, value in labels.items()}
    resource = "nvidia.com/gpu" if topology.startswith("h") else "google.com/tpu"
    assert container_of(given)["resources"]["limits"] == {resource: chips}
    assert {"key": resource, "operator": "Exists", "effect": "NoSchedule"} in pod_of(given)["tolerations"]
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert (exclusive in documents(given)["JobSet"]["metadata"]["annotations"]) == (resource == "google.com/tpu")


@pytest.mark.parametrize(
    ("capacity", "label"),
    [("on-demand", None), ("reserved", None), ("spot", "gke-spot"), ("flex-start", "gke-flex-start")],
)
def test_capacity_selects_nodes_and_tolerates_their_taint(capacity: str, label: str | None) -> None:
    pod = pod_of(launch(capacity=capacity))
    added = {name for name in pod["nodeSelector"] if not name.startswith("cloud.google.com/gke-tpu-")}
    assert added == ({f"cloud.google.com/{label}"} if label else set())
    queued = {"cloud.google.com/gke-queued"} if capacity == "flex-start" else set()
    assert {taint["key"] for taint in pod["tolerations"]} == {"google.com/tpu"} | added | queued


def test_a_reservation_selects_its_nodes() -> None:
    selector = pod_of(launch(capacity="reserved", reservation="mine-2027"))["nodeSelector"]
    assert selector["cloud.google.com/reservation-name"] == "mine-2027"
    with pytest.raises(RequestError, match="--reservation: expected with --target=gke and --capacity=reserved only"):
        launch(reservation="mine-2027")


def test_a_queue_asks_for_flex_start_machines_for_a_time() -> None:
    metadata = documents(launch(capacity="flex-start", queue="mine", max_hours=2))["JobSet"]["metadata"]
    assert metadata["annotations"]["provreq.kueue.x-k8s.io/maxRunDurationSeconds"] == "7200"


def test_options_reach_their_fields() -> None:
    given = launch(**EVERYTHING["all options"])
    pod, container = pod_of(given), container_of(given)
    metadata = documents(given)["JobSet"]["metadata"]
    assert metadata["name"] == "mine"
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "multislice-queue"
    assert metadata["labels"]["team"] == job_of(given)["template"]["metadata"]["labels"]["team"] == "vision"
    assert pod["nodeSelector"]["topology.kubernetes.io/zone"] == "us-west4-a"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    account = documents(given)["ServiceAccount"]["metadata"]
    assert pod["serviceAccountName"] == account["name"] == "trainer"
    assert account["annotations"]["iam.gke.io/gcp-service-account"] == "trainer@project.iam.gserviceaccount.com"
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["name"] == "shm"
    for bucket in ("images", "more-images"):
        (volume,) = [one for one in pod["volumes"] if one["name"] == mounts[f"/gcs/{bucket}"]["name"]]
        assert volume["csi"]["volumeAttributes"]["bucketName"] == bucket
        assert volume["csi"]["readOnly"] and mounts[f"/gcs/{bucket}"]["readOnly"]
    assert documents(given)["JobSet"]["spec"]["failurePolicy"]["maxRestarts"] == 50


def test_secrets_are_references() -> None:
    variables = {one["name"]: one for one in container_of(launch(secrets=["HF_TOKEN"]))["env"]}
    assert variables["HF_TOKEN"] == {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN"}},
    }


def test_the_configuration_travels_unless_the_image_has_it() -> None:
    shipped, own = launch(), launch(config="mine.py")
    assert set(documents(shipped)) == {"JobSet"}
    assert json.loads(documents(own)["ConfigMap"]["data"]["config.json"]) == {"seed": 0}
    mounted = {mount["mountPath"] for mount in container_of(own)["volumeMounts"]}
    (file,) = re.findall(r"--config=(\S+)", container_of(own)["args"][0])
    assert str(Path(file).parent) in mounted


def test_another_configuration_is_another_digest() -> None:
    digests = {
        str(job_set(launch(config_json=text))["metadata"]["annotations"]) for text in ("{}", '{"a": 1}', '{"a": 1}')
    }
    assert len(digests) == 2


# --- the schemas ---------------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """Returns a schema that refuses fields it does not know, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: strict(part) for name, part in schema.items()}
    return inner | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else inner


def validate(document: dict[str, Any], version: str) -> None:
    """Raises an error if a document is not what Kubernetes, or JobSet's published definition, has."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    if document["kind"] != "JobSet":
        kubernetes.validate(document, version, strict=True)
        return
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(document, strict(json.loads(SCHEMA.read_text())))
    metadata = {"name": "pod", **document["metadata"]}
    kubernetes.validate({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}, version, strict=True)
    for replicated in document["spec"]["replicatedJobs"]:
        template = replicated["template"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": template.get("metadata", {})}
        kubernetes.validate(job | {"spec": template["spec"]}, version, strict=True)


@pytest.mark.parametrize("version", ["1.31", "1.37"])  # GKE has tpu7x since 1.34, native sidecars since 1.29
@pytest.mark.parametrize("case", EVERYTHING)
def test_manifests_follow_the_schemas(case: str, version: str) -> None:
    for document in documents(launch(**EVERYTHING[case])).values():
        validate(document, version)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "RestartEverything"),
        (("spec", "replicatedJobs", 0, "replicas"), "two"),
        (("spec", "replicatedJobs", 0, "template", "spec", "backOffLimit"), 0),
        (
            ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 1, "onExitCodes", "values"),
            "1",
        ),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "grace"), 300),
        (("metadata", "labels", "team"), 3),
    ],
)
def test_the_schemas_refuse_what_is_wrong(path: tuple[str | int, ...], value: Any) -> None:
    document = documents(launch())["JobSet"]
    place: Any = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        validate(document, "1.37")


@pytest.mark.parametrize("case", EVERYTHING)
def test_names_are_not_longer_than_dns_allows(case: str) -> None:
    """JobSet's webhook refuses a name from which a pod's name of more than 63 characters follows."""
    document = job_set(describe("gke", "n" * 40, **{"topology": "v5e:4x4", "image": IMAGE} | EVERYTHING[case]))
    for replicated in document["spec"]["replicatedJobs"]:
        slices, hosts = replicated["replicas"], replicated["template"]["spec"]["completions"]
        pod = f"{document['metadata']['name']}-{replicated['name']}-{slices - 1}-{hosts - 1}-abcde"
        assert len(pod) <= 63


# --- what restarts a run -------------------------------------------------------------------------------------------


def verdict(given: Launch, status: int, *, evicted: bool = False) -> str:
    """Returns what the cluster does when a process ends: "complete", "restart" or "fail".

    The rules of Kubernetes' Job controller (the first rule that matches; exit status 0 matches none), of a backoff
    limit of 0, and of JobSet's failure policy (the first rule that matches; RestartJobSet if none does).
    """
    if status == 0:
        return "complete"
    job, reason = job_of(given), "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        matches = evicted and any(c == {"type": "DisruptionTarget", "status": "True"} for c in conditions)
        if codes is not None:
            assert codes["containerName"] == container_of(given)["name"]
            matches = (status in codes["values"]) == (codes["operator"] == "In")
        if matches:
            assert rule["action"] in ("Count", "FailJob"), "Ignore would start the process without the others"
            reason = "PodFailurePolicy" if rule["action"] == "FailJob" else reason
            break
    assert job["backoffLimit"] == 0
    for rule in documents(given)["JobSet"]["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return {"FailJobSet": "fail", "RestartJobSet": "restart"}[rule["action"]]
    return "restart"


@pytest.mark.parametrize(
    ("status", "evicted", "expected"),
    [
        (0, False, "complete"),
        (143, False, "restart"),  # SIGTERM: saved
        (143, True, "restart"),
        (134, False, "restart"),  # another process is gone, or a step hangs
        (137, True, "restart"),  # evicted, and killed when the grace period was over
        (137, False, "fail"),  # killed: out of memory
        (1, False, "fail"),
        (2, False, "fail"),
        (139, False, "fail"),
    ],
)
@pytest.mark.parametrize("topology", ["v5e:4x4", "h100x8:2"])
def test_only_a_stopped_or_aborted_run_restarts(topology: str, status: int, evicted: bool, expected: str) -> None:
    assert verdict(launch(topology), status, evicted=evicted) == expected
    assert pod_of(launch(topology))["restartPolicy"] == "Never", "podFailurePolicy needs it"
    assert RESTART_CODES == (134, 143)


# --- what a container executes -------------------------------------------------------------------------------------


def expanded(text: str, environment: dict[str, str]) -> str:
    """Returns a text as Kubernetes passes it on: `$(NAME)` is replaced if NAME is a variable, and `$$` is `$`."""

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", replaced, text)


def started(given: Launch, folder: Path, program: str) -> subprocess.Popen[str]:
    """Starts a container's command with a stand-in for `visor`, which is the only other program on PATH."""
    (folder / "visor").write_text(f"#!/bin/bash\n{program}\n")
    (folder / "visor").chmod(0o755)
    (folder / "bash").symlink_to("/bin/bash")
    container = container_of(given)
    values = {one["name"]: one.get("value", "the value of a secret") for one in container["env"]}
    values = {name: expanded(text, values) for name, text in values.items()}
    argv = [expanded(text, values) for text in (*container["command"], *container["args"])]
    return subprocess.Popen(argv, env={"PATH": str(folder), **values}, cwd=folder, stdout=subprocess.PIPE, text=True)


def test_arguments_arrive_as_they_were_given(tmp_path: Path) -> None:
    hostile = [
        "--config.a=$(HF_TOKEN)",
        "--config.b=`touch canary`",
        "--config.c='; touch canary; \"$$ #",
        "--config.d=ü\n",
    ]
    given = launch(overrides=hostile, secrets=["HF_TOKEN"])
    with started(given, tmp_path, 'printf "%s\\0" "$@"') as process:
        out, _ = process.communicate(timeout=20)
    assert out.split("\0")[:-1] == ["run", "--config=almanac_mini", "--workdir=gs://bucket/run", *hostile]
    assert not (tmp_path / "canary").exists()


def test_sigterm_reaches_the_run_and_its_status_comes_back(tmp_path: Path) -> None:
    program = "trap 'exit 143' TERM; echo ready $$; while :; do read -t 0.05 <> <(:); done"
    with started(launch(), tmp_path, program) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["ready", str(process.pid)], "exec: no shell is left in between"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) == 143


def test_the_environment_has_the_flags_of_the_chip() -> None:
    values = {one["name"]: one["value"] for one in container_of(launch("v6e:4x4"))["env"]}
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in values["LIBTPU_INIT_ARGS"]
    values = {one["name"]: one["value"] for one in container_of(launch("h100x8"))["env"]}
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in values["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("topology", "slices", "by_gke", "expected"),
    [
        ("v5e:2x2", 1, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "true"}, None),
        ("v5e:4x4", 1, {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}, {}),
        ("v5e:4x4", 2, {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ("h100x8", 1, {}, None),
        ("h100x8:2", 1, {}, {"coordinator_address": "mine-slice-0-0.mine:8476", "num_processes": 2, "process_id": 1}),
    ],
)
def test_the_processes_of_a_run_find_each_other(
    topology: str, slices: int, by_gke: dict[str, str], expected: dict[str, Any] | None
) -> None:
    """GKE adds variables to pods with TPUs, and Kubernetes the index of the pod (here of the last one) in its Job."""
    given = launch(topology, slices=slices)
    values = {one["name"]: one["value"] for one in container_of(given)["env"]}
    index = str(job_of(given)["completions"] - 1)
    assert job_of(given)["completionMode"] == "Indexed"
    assert process_settings(values | by_gke | {"JOB_COMPLETION_INDEX": index}) == expected
