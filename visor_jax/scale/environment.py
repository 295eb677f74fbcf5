"""Reads from the environment whether this process is one of several, and how it finds the others. No JAX import.

In: environment variables. Out: the arguments of `jax.distributed.initialize`. `visor_jax.scale.distributed` calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Variables with whole seconds, and their defaults: when a silent process counts as dead, and how long to wait for all.
HEARTBEAT, CONNECT = ("VISOR_HEARTBEAT_SECONDS", 60), ("VISOR_CONNECT_SECONDS", 300)


def process_settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments that connect this process to the others of its run; None if there are no others.

    They are empty where JAX finds the coordinator itself (`in_cluster`).

    Raises:
      RequestError: the environment is incomplete or contradictory.
    """
    settings = explicit_settings(environment)
    if settings is None:
        return {} if environment.get("JAX_NUM_PROCESSES") != "1" and in_cluster(environment) else None
    return settings


def explicit_settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize` that the variables in `EXPLICIT` name; None without them.

    In a Kubernetes Job with indexed completion, `JOB_COMPLETION_INDEX` replaces a missing `JAX_PROCESS_ID`.

    Raises:
      RequestError: some of the variables are missing or malformed.
    """
    given = {name: environment.get(name, "") for name in EXPLICIT}
    if not given["JAX_NUM_PROCESSES"] and not given["JAX_PROCESS_ID"]:
        return None  # an address alone may serve a cluster that JAX recognizes
    given["JAX_PROCESS_ID"] = given["JAX_PROCESS_ID"] or environment.get("JOB_COMPLETION_INDEX", "")
    if missing := [name for name, value in given.items() if not value]:
        raise RequestError(f"environment: {', '.join(missing)} not set; expected all of {', '.join(EXPLICIT)} or none")
    address, count, index = given.values()
    if not count.isdecimal() or int(count) < 1:
        raise RequestError(f"environment: JAX_NUM_PROCESSES={count}: expected a number of processes, at least 1")
    if not index.isdecimal() or int(index) >= int(count):
        raise RequestError(f"environment: JAX_PROCESS_ID={index}: expected 0 to {int(count) - 1}")
    _, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise RequestError(f"environment: JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT of process 0")
    if int(count) == 1:
        return None
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether this is one of several processes of a Slurm step, or runs on a TPU pod or in its JobSet.

    JAX then finds the coordinator itself: from Slurm's variables, GKE's (`TPU_WORKER_HOSTNAMES`, `MEGASCALE_*`), or
    the metadata of a Cloud TPU VM.
    """
    if _number(environment.get("SLURM_STEP_NUM_TASKS")) > 1 and "SLURM_PROCID" in environment:
        return True
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or _number(environment.get("MEGASCALE_NUM_SLICES")) > 1:
        return True
    return "TPU_SKIP_MDS_QUERY" not in environment and _has_tpu()


def _has_tpu() -> bool:
    """Returns whether this machine has TPU chips that `libtpu` can use."""
    return find_spec("libtpu") is not None and any(Path("/dev").glob("accel*"))


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
