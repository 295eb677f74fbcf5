"""The pods of a JobSet as processes of this machine: what the manifest says is started, stopped, and started again.

Only what a CPU cannot do is replaced: the platform, the flags of the chip, the name of pod 0 and the mount's folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.whole_run import ROOT, environment
from tests.launching.test_job_set import container_of, documents, expanded, job_of, launch, verdict
from visor_jax.config import load_config, to_json
from visor_jax.launching.description import Launch
from visor_jax.launching.job_set import CONFIG_FOLDER, PORT
from visor_jax.testing.processes import free_port
from visor_jax.workdir.metrics_log import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CONFIG = """
from visor_jax.testing import tiny_config
def get_config():
    return tiny_config({"stages": ("base",), "train.checkpoint_every": 5, "data.batch_size": 8, "data.workers": 1,
                        "evaluate.samples": 8}, steps=24)
"""
STEPS, LIMIT = 24, 900.0


class Pods:
    """Starts the containers of all pods of a job, as a kubelet does."""

    def __init__(self, given: Launch, folder: Path, compiled: str) -> None:
        self.given, self.folder, self.compiled = given, folder, compiled
        self.running: list[subprocess.Popen[bytes]] = []
        (folder / "config.json").write_text(documents(given)["ConfigMap"]["data"]["config.json"])
        visor = folder / "visor"
        visor.write_text(f'#!/bin/bash\nexec {sys.executable} -P -m visor_jax "$@"\n')
        visor.chmod(0o755)

    def start(self) -> None:
        container, port = container_of(self.given), free_port()
        values = {variable["name"]: variable["value"] for variable in container["env"]}
        assert values["JAX_COORDINATOR_ADDRESS"] == f"mine-slice-0-0.mine:{PORT}"
        for name in ("JAX_PLATFORMS", "XLA_FLAGS"):  # of GPUs
            values.pop(name)
        values["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        argv = [expanded(text, values).replace(CONFIG_FOLDER, str(self.folder)) for text in command_of(container)]
        base = environment(self.compiled, JAX_PLATFORMS="cpu", PATH=f"{self.folder}:{os.environ['PATH']}")
        for index in range(job_of(self.given)["completions"]):
            pod = base | values | {"JOB_COMPLETION_INDEX": str(index), "PYTHONPATH": str(ROOT)}
            log = (self.folder / f"pod-{index}.log").open("ab")
            self.running.append(subprocess.Popen(argv, env=pod, cwd=self.folder, stdout=log, stderr=log))

    def terminate(self) -> None:
        """Sends SIGTERM to the first process of every container, as Kubernetes does when pods are deleted."""
        for process in self.running:
            process.send_signal(signal.SIGTERM)

    def statuses(self, seconds: float) -> list[int]:
        ended = [process.wait(seconds) for process in self.running]
        self.running.clear()
        return ended

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("pod-*.log")))


def command_of(container: dict[str, list[str]]) -> list[str]:
    return [*container["command"], *container["args"]]


def steps(given: Launch) -> list[int]:
    file = Path(given.workdir) / "base" / "metrics.jsonl"
    return [row["step"] for row in read_rows(file)] if file.exists() else []


@pytest.fixture
def pods(tmp_path: Path, compiled: str) -> Iterator[Pods]:
    (tmp_path / "mine.py").write_text(CONFIG)
    text = to_json(load_config(tmp_path / "mine.py"))
    given = launch("h100x8:2", config="mine.py", config_json=text, workdir=str(tmp_path / "run"))
    made = Pods(given, tmp_path, compiled)
    yield made
    for process in made.running:
        process.kill()
        process.wait()


def test_a_stopped_run_restarts_and_completes(pods: Pods) -> None:
    pods.start()
    end = time.monotonic() + LIMIT
    while len(steps(pods.given)) < 6:
        assert time.monotonic() < end and all(process.poll() is None for process in pods.running), pods.logs()
        time.sleep(0.1)
    pods.terminate()
    ended = pods.statuses(pods.given.grace_seconds)
    assert ended == [143, 143], pods.logs()
    assert {verdict(pods.given, status) for status in ended} == {"restart"}
    stopped = steps(pods.given)[-1]
    assert 6 <= stopped < STEPS
    pods.start()
    ended = pods.statuses(LIMIT)
    assert ended == [0, 0], pods.logs()
    assert {verdict(pods.given, status) for status in ended} == {"complete"}
    assert steps(pods.given) == list(range(1, STEPS + 1))
