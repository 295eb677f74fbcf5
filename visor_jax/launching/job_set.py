"""The JobSet of a run on GKE.

A replica of the JobSet is one slice, a pod one host, and a process of the run one pod. The container's last word is
`exec visor run ...`, so SIGTERM reaches the training process; it saves within the grace period and exits with 143.

Restarts: a pod that exits with 143 or 134, or that Kubernetes evicts, fails its Job, and the JobSet creates all pods
again, at most `max_restarts` times. Any other exit status fails the JobSet at once.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from visor_jax.errors import ABORTED, STOPPED
from visor_jax.launching.description import MOUNTS, Launch, travels, visor_argv
from visor_jax.launching.environment import environment

CONTAINER, REPLICATED_JOB, PORT = "visor", "slice", 8476
CONFIG_FOLDER = "/etc/visor"
RESTART_CODES = (ABORTED, STOPPED)
DIGEST = "visor-jax/launch"  # annotation: a digest of the description, to notice that another run has this name
# The label of the nodes that have a chip.
TPUS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
GPUS = {"h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb"}


def manifest(launch: Launch) -> str:
    """Returns the YAML documents of a run: its service account, its configuration if it has to travel, its JobSet."""
    documents = [_service_account(launch)] if launch.service_account else []
    documents += [_config_map(launch)] if travels(launch) else []
    documents.append(job_set(launch))
    return yaml.safe_dump_all(documents, sort_keys=False, width=10_000)


def job_set(launch: Launch) -> dict[str, Any]:
    """Returns the JobSet of a run, as `jobset.x-k8s.io/v1alpha2` defines it."""
    machines = launch.machines
    labels = {"app.kubernetes.io/name": "visor-jax", **dict(launch.labels)}
    annotations = {}
    if machines.kind == "tpu":  # one slice per node pool
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    job = {
        "parallelism": machines.hosts,
        "completions": machines.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_failure_rules()},
        "template": {"metadata": _pod_metadata(launch, labels), "spec": _pod(launch)},
    }
    spec = {
        "network": {"enableDNSHostnames": True},
        "failurePolicy": {
            "maxRestarts": launch.max_restarts,
            "rules": [{"name": "fails", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [{"name": REPLICATED_JOB, "replicas": machines.slices, "template": {"spec": job}}],
    }
    annotations[DIGEST] = hashlib.sha256(json.dumps([spec, launch.config_json]).encode()).hexdigest()[:16]
    if launch.queue and launch.capacity == "flex-start":
        annotations["provreq.kueue.x-k8s.io/maxRunDurationSeconds"] = str(launch.max_hours * 3600)
    if launch.queue:
        labels = {"kueue.x-k8s.io/queue-name": launch.queue, **labels}
    metadata = {"name": launch.name, "labels": labels, "annotations": annotations}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _pod_failure_rules() -> list[dict[str, Any]]:
    """Returns the rules of a Job, of which the first that matches counts.

    An evicted pod that does not end within the grace period is killed (137), so its condition is asked first. `Count`
    fails the Job by its backoff limit of 0, which is no `PodFailurePolicy`: the JobSet restarts.
    """
    return [
        {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": sorted(RESTART_CODES)},
        },
    ]


def _pod_metadata(launch: Launch, labels: Mapping[str, str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": dict(labels)}
    if launch.buckets:
        metadata["annotations"] = {"gke-gcsfuse/volumes": "true"}
    return metadata


def _pod(launch: Launch) -> dict[str, Any]:
    machines = launch.machines
    resource = "google.com/tpu" if machines.kind == "tpu" else "nvidia.com/gpu"
    volumes, mounts = _volumes(launch)
    container = {
        "name": CONTAINER,
        "image": launch.image,
        "command": ["bash", "-c"],
        "args": [unexpanded(shell_command(launch))],
        "env": _variables(launch),
        "resources": {"limits": {resource: machines.chips_per_host}},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # a process alone cannot rejoin the others: the JobSet restarts them together
        "terminationGracePeriodSeconds": launch.grace_seconds,
        "shareProcessNamespace": True,  # the run is not process 1, for which Linux ignores SIGTERM without a handler
        "nodeSelector": node_selector(launch),
        "tolerations": _tolerations(launch),
        "containers": [container],
        "volumes": volumes,
    }
    if machines.slices > 1 or (machines.kind == "gpu" and machines.hosts > 1):
        # Gradients cross the data-center network: without the overlay of the pods' network.
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if launch.service_account:
        pod["serviceAccountName"] = _service_account(launch)["metadata"]["name"]
    return pod


def shell_command(launch: Launch) -> str:
    """Returns the one line that a container runs; `exec` hands the process, and with it SIGTERM, to the run."""
    return "exec " + shlex.join(visor_argv(launch, f"{CONFIG_FOLDER}/config.json"))


def unexpanded(text: str) -> str:
    """Returns a text from which Kubernetes makes the given one: it replaces `$(NAME)`, and `$$` by `$`."""
    return text.replace("$", "$$")


def node_selector(launch: Launch) -> dict[str, str]:
    """Returns the labels of the nodes that a launch may use."""
    machines = launch.machines
    if machines.kind == "tpu":
        labels = {
            "cloud.google.com/gke-tpu-accelerator": TPUS[machines.chip.name],
            "cloud.google.com/gke-tpu-topology": machines.grid,
        }
    else:
        labels = {"cloud.google.com/gke-accelerator": GPUS[machines.chip.name]}
    if launch.zone:
        labels["topology.kubernetes.io/zone"] = launch.zone
    if launch.capacity in ("spot", "flex-start"):
        labels[f"cloud.google.com/gke-{launch.capacity}"] = "true"
    if launch.reservation:
        labels["cloud.google.com/reservation-name"] = launch.reservation
    return labels


def _tolerations(launch: Launch) -> list[dict[str, str]]:
    resource = "google.com/tpu" if launch.machines.kind == "tpu" else "nvidia.com/gpu"
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if launch.capacity in ("spot", "flex-start"):
        key = f"cloud.google.com/gke-{launch.capacity}"
        tolerations.append({"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    if launch.capacity == "flex-start":  # nodes that Kueue asked for
        tolerations.append({"key": "cloud.google.com/gke-queued", "operator": "Exists", "effect": "NoSchedule"})
    return tolerations


def _variables(launch: Launch) -> list[dict[str, Any]]:
    """Returns the environment of the container: of the chip, of the processes, and secrets by reference."""
    values = dict(environment(launch))
    if launch.machines.kind == "gpu" and launch.machines.hosts > 1:
        # GKE tells TPUs of each other. For GPUs process 0 is pod 0; the index is the pod's JOB_COMPLETION_INDEX.
        values["JAX_COORDINATOR_ADDRESS"] = f"{launch.name}-{REPLICATED_JOB}-0-0.{launch.name}:{PORT}"
        values["JAX_NUM_PROCESSES"] = str(launch.machines.hosts)
    variables: list[dict[str, Any]] = [{"name": name, "value": unexpanded(text)} for name, text in values.items()]
    for secret in launch.secrets:
        reference = {"name": secret_object(secret), "key": secret}
        variables.append({"name": secret, "valueFrom": {"secretKeyRef": reference}})
    return variables


def secret_object(secret: str) -> str:
    """Returns the name of the Kubernetes Secret that holds a secret: `hf-token`, with the key HF_TOKEN."""
    return secret.lower().replace("_", "-").strip("-")


def _volumes(launch: Launch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns volumes and mounts: shared memory for data workers, the configuration, and mounted buckets."""
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if travels(launch):
        volumes.append({"name": "config", "configMap": {"name": f"{launch.name}-config"}})
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    for i, bucket in enumerate(launch.buckets):
        attributes = {"bucketName": bucket, "mountOptions": "implicit-dirs"}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}
        volumes.append({"name": f"bucket-{i}", "csi": driver})
        mounts.append({"name": f"bucket-{i}", "mountPath": f"{MOUNTS}/{bucket}", "readOnly": True})
    return volumes, mounts


def _config_map(launch: Launch) -> dict[str, Any]:
    metadata = {"name": f"{launch.name}-config", "labels": {"app.kubernetes.io/name": "visor-jax"}}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {"config.json": launch.config_json},
    }


def _service_account(launch: Launch) -> dict[str, Any]:
    """Returns the Kubernetes service account that acts as the given one of Google Cloud (Workload Identity)."""
    annotations = {"iam.gke.io/gcp-service-account": launch.service_account}
    metadata = {"name": launch.service_account.partition("@")[0], "annotations": annotations}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}
