"""Reads from the environment whether this process is one of several, and how it finds the others. No JAX import.

In: environment variables. Out: the arguments of `jax.distributed.initialize`. `visor_jax.scale.distributed` calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from visor_jax.errors import RequestError
from visor_jax.scale.xla_flags import PCI_CHIPS, chip_of_host

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Variables with whole seconds, and their defaults: when a silent process counts as dead, and how long to wait for all.
HEARTBEAT, CONNECT = ("VISOR_HEARTBEAT_SECONDS", 60), ("VISOR_CONNECT_SECONDS", 300)


def process_settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments that connect this process to the others of its run; None if there are no others.

    They are empty where JAX finds the coordinator itself (`in_cluster`).

    Raises:
      RequestError: the environment is incomplete or contradictory.
    """
    if environment.get("JAX_NUM_PROCESSES") == "1" and environment.get("JAX_PROCESS_ID") in (None, "", "0"):
        return None  # also in a Slurm step or on a pod
    if (settings := explicit_settings(environment)) is not None:
        return settings
    if in_cluster(environment):
        return {}
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        raise _not_set(["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
    return None


def explicit_settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize` that the variables in `EXPLICIT` name; None without them.

    In a Kubernetes Job with indexed completion, `JOB_COMPLETION_INDEX` replaces a missing `JAX_PROCESS_ID`.

    Raises:
      RequestError: some of the variables are missing or malformed.
    """
    given = {name: environment.get(name, "") for name in EXPLICIT}
    if not given["JAX_NUM_PROCESSES"] and not given["JAX_PROCESS_ID"]:
        return None  # an address alone may serve a cluster that JAX recognizes
    of_index = "JAX_PROCESS_ID" if given["JAX_PROCESS_ID"] else "JOB_COMPLETION_INDEX"
    given["JAX_PROCESS_ID"] = environment.get(of_index, "")
    if missing := [name for name, value in given.items() if not value]:
        raise _not_set(missing)
    address, count, index = given.values()
    if not count.isdecimal() or int(count) < 1:
        raise RequestError(
            f"environment: JAX_NUM_PROCESSES={count}: expected how many processes the run has, a whole number"
        )
    if not index.isdecimal() or int(index) >= int(count):
        raise RequestError(
            f"environment: {of_index}={index}: expected 0 to {int(count) - 1} with JAX_NUM_PROCESSES={count},"
            " another number for each process"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise RequestError(
            f"environment: JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT of process 0, such as 10.0.0.1:1234"
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def _not_set(missing: Sequence[str]) -> RequestError:
    return RequestError(
        f"environment: {', '.join(missing)} not set; expected all of {', '.join(EXPLICIT)}, or none of them for a"
        " process that runs alone"
    )


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether this is one of several processes of a Slurm step, or runs on a TPU pod or in its JobSet.

    JAX then finds the coordinator itself: from Slurm's variables, GKE's (`TPU_WORKER_HOSTNAMES`, `MEGASCALE_*`), or
    the metadata of a Cloud TPU VM.

    Raises:
      RequestError: only some of the variables of Slurm or of the pod are set.
    """
    if _in_slurm_step(environment):
        return True
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    if _on_pod(environment) or _number(environment.get("MEGASCALE_NUM_SLICES")) > 1:
        return True
    return "TPU_SKIP_MDS_QUERY" not in environment and _has_tpu()


def _in_slurm_step(environment: Mapping[str, str]) -> bool:
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if tasks in ("", "1"):
        return False
    problems = ["SLURM_STEP_NUM_TASKS"] * (not tasks.isdecimal())
    problems += [
        name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS") if not _is_number(environment, name)
    ]
    problems += [name for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST") if not environment.get(name)]
    if problems:
        name = problems[0]
        raise RequestError(
            f"environment: {name}={environment.get(name, '')}: SLURM_STEP_NUM_TASKS={tasks} names several processes;"
            " expected the variables that srun sets: start with srun, or set JAX_NUM_PROCESSES=1 to run alone"
        )
    return True


def _on_pod(environment: Mapping[str, str]) -> bool:
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) == 1:
        return False
    index = environment.get("TPU_WORKER_ID", "")
    if not index.isdecimal() or int(index) >= len(hosts):
        raise RequestError(
            f"environment: TPU_WORKER_ID={index}: TPU_WORKER_HOSTNAMES names {len(hosts)} machines; expected 0 to"
            f" {len(hosts) - 1}, or JAX_NUM_PROCESSES=1 to run alone"
        )
    return True


def _has_tpu() -> bool:
    """Returns whether this machine has TPU chips that `libtpu` can use, by its PCI devices.

    Device files differ: v4 has /dev/accel0, newer chips /dev/vfio/0, which other hardware has too.
    """
    return find_spec("libtpu") is not None and chip_of_host() in PCI_CHIPS.values()


def _is_number(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").isdecimal()


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def seconds(variable: tuple[str, int], environment: Mapping[str, str]) -> int:
    """Returns the value of `HEARTBEAT` or `CONNECT`.

    Raises:
      RequestError: the variable is not a number of seconds.
    """
    name, default = variable
    text = environment.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"environment: {name}={text}: expected whole seconds, at least 1")
    return int(text)
