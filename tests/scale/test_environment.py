"""Which processes a process belongs to, by its environment: coordinator, Slurm, TPU pod, JobSet, or none."""

from __future__ import annotations

from typing import Any

import pytest

from visor_jax.errors import RequestError
from visor_jax.scale import environment
from visor_jax.scale.environment import CONNECT, HEARTBEAT, process_settings, seconds

COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
EXPLICIT = {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
SLURM |= {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_LOCALID": "0"}
POD = {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (COORDINATOR, EXPLICIT),
        ({**COORDINATOR, "JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "3"}, EXPLICIT),
        ({**COORDINATOR, **SLURM}, EXPLICIT),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({**SLURM, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({**SLURM, "JAX_NUM_PROCESSES": "1"}, None),
        ({"JOB_COMPLETION_INDEX": "1"}, None),  # a Job whose processes have nothing to do with each other
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, {}),
        (SLURM, {}),
        ({**SLURM, "JAX_PLATFORMS": "cpu"}, {}),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # the batch script itself
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (POD, {}),
        ({**POD, "JAX_PLATFORMS": "tpu,cpu"}, {}),
        ({**POD, "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "2"}, {}),
    ],
)
def test_the_environment_says_which_processes_run(
    variables: dict[str, str], expected: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_has_tpu", lambda: False)
    assert process_settings(variables) == expected


def test_a_machine_with_chips_asks_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_has_tpu", lambda: True)
    assert process_settings({}) == {}
    assert process_settings({"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert process_settings({"JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("chip", "libtpu", "expected"),
    [
        ("v4", True, True),
        ("v5e", True, True),
        ("v6e", True, True),
        ("v6e", False, False),
        ("h100", True, False),
        ("", True, False),
    ],
)
def test_tpus_are_found_by_their_pci_devices(
    chip: str, libtpu: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "chip_of_host", lambda: chip)
    monkeypatch.setattr(environment, "find_spec", lambda name: object() if libtpu else None)
    assert process_settings({}) == ({} if expected else None)


HALF = "not set; expected all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, or none"
SRUN = "expected the variables that srun sets: start with srun, or set JAX_NUM_PROCESSES=1 to run alone"


@pytest.mark.parametrize(
    ("variables", "messages"),
    [
        ({**COORDINATOR, "JAX_PROCESS_ID": ""}, ["JAX_PROCESS_ID", HALF]),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": ""}, ["JAX_NUM_PROCESSES", HALF]),
        ({**COORDINATOR, "JAX_COORDINATOR_ADDRESS": ""}, ["JAX_COORDINATOR_ADDRESS", HALF]),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, ["JAX_NUM_PROCESSES, JAX_PROCESS_ID", HALF]),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JOB_COMPLETION_INDEX": "1"}, ["JAX_NUM_PROCESSES", HALF]),
        ({"JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}, ["JAX_COORDINATOR_ADDRESS", HALF]),
        ({**COORDINATOR, "JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "4"}, ["JOB_COMPLETION_INDEX=4: expected 0 to"]),
        ({**COORDINATOR, "JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, ["JAX_COORDINATOR_ADDRESS=10.0.0.1: expected HOST:"]),
        ({**COORDINATOR, "JAX_COORDINATOR_ADDRESS": ":1234"}, ["JAX_COORDINATOR_ADDRESS=:1234: expected HOST:PORT"]),
        ({**COORDINATOR, "JAX_COORDINATOR_ADDRESS": "a:99999"}, ["JAX_COORDINATOR_ADDRESS=a:99999: expected HOST:"]),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "two"}, ["JAX_NUM_PROCESSES=two: expected how many processes"]),
        ({**COORDINATOR, "JAX_NUM_PROCESSES": "0"}, ["JAX_NUM_PROCESSES=0: expected how many processes"]),
        ({**COORDINATOR, "JAX_PROCESS_ID": "4"}, ["JAX_PROCESS_ID=4: expected 0 to 3 with JAX_NUM_PROCESSES=4"]),
        ({**COORDINATOR, "JAX_PROCESS_ID": "-1"}, ["JAX_PROCESS_ID=-1: expected 0 to 3"]),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "two"}, ["SLURM_STEP_NUM_TASKS=two: ", SRUN]),
        *(({**SLURM, name: ""}, [f"{name}=: SLURM_STEP_NUM_TASKS=2 names several processes", SRUN])
          for name in SLURM if name != "SLURM_STEP_NUM_TASKS"),
        ({**POD, "TPU_WORKER_ID": ""}, ["TPU_WORKER_ID=: TPU_WORKER_HOSTNAMES names 2 machines; expected 0 to 1"]),
        ({**POD, "TPU_WORKER_ID": "2"}, ["TPU_WORKER_ID=2: TPU_WORKER_HOSTNAMES names 2 machines"]),
    ],
)  # fmt: skip
def test_an_incomplete_environment_is_refused(variables: dict[str, str], messages: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        process_settings(variables)
    assert str(refused.value).startswith("environment: ") and "\n" not in str(refused.value)
    assert all(message in str(refused.value) for message in messages), refused.value


def test_time_limits() -> None:
    assert (seconds(HEARTBEAT, {}), seconds(CONNECT, {})) == (60, 300)
    assert seconds(HEARTBEAT, {"VISOR_HEARTBEAT_SECONDS": "7"}) == 7
    with pytest.raises(RequestError, match="VISOR_HEARTBEAT_SECONDS=soon"):
        seconds(HEARTBEAT, {"VISOR_HEARTBEAT_SECONDS": "soon"})
