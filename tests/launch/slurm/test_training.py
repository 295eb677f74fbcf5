"""The default job's first stages as a Slurm job of two processes, undisturbed, and stopped and killed on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.whole_run import FLAGS, steps_of
from tests.launch.slurm.cluster import Cluster
from tests.launch.slurm.conftest import VISOR
from visor_jax.launching import slurm
from visor_jax.launching.description import Launch
from visor_jax.launching.steps import Runner
from visor_jax.workdir.metrics_log import read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

LIMIT = 900.0  # seconds for a job on a slow machine
STEPS = {"base": 60, "warmup": 6}
OVERRIDES = [
    *(f"--config.stage_overrides.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    "--config.stages=('base','warmup')",
    "--config.train.checkpoint_every=10",
    "--config.data.workers=1",  # Slurm signals them too
    "--config.evaluate.samples=24",
]


@pytest.fixture
def train(
    submit: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Launch, str]]]:
    """Returns a function that submits the job: `visor` is this package, on one CPU device per task."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", FLAGS)
    monkeypatch.setenv("PYTHONPATH", str(Path(slurm.__file__).parents[2]))
    monkeypatch.setenv("VISOR_HEARTBEAT_SECONDS", "20")

    def start(**fields: Any) -> tuple[Launch, str]:
        launch = submit(VISOR, overrides=OVERRIDES, **fields)
        return launch, slurm.up(launch, Runner(launch.name))["job"]

    yield start


def text_of(launch: Launch) -> str:
    """Returns the logs of the job and of both tasks."""
    return "\n".join(Path(slurm.log_file(launch, task)).read_text() for task in (None, 0, 1))


def rows(launch: Launch, stage: str) -> list[dict[str, Any]]:
    file = Path(launch.workdir) / stage / "metrics.jsonl"
    return read_rows(file) if file.exists() else []


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[dict[str, Any]]]:
    """The steps of the first test's job, for the second."""
    return {}


def test_two_processes_train_the_first_stages(
    cluster: Cluster, train: Callable[..., tuple[Launch, str]], undisturbed: dict[str, list[dict[str, Any]]]
) -> None:
    launch, job = train()
    assert cluster.wait_for_end(job, LIMIT) == ("COMPLETED", 0), text_of(launch)
    for task in (0, 1):
        assert f"process {task} of 2, 1 local devices" in Path(slurm.log_file(launch, task)).read_text()
    for stage, steps in STEPS.items():
        undisturbed[stage] = steps_of(Path(launch.workdir), stage)
        assert [row["step"] for row in undisturbed[stage]] == list(range(1, steps + 1))
        assert json.loads((Path(launch.workdir) / stage / "complete.json").read_text())
    losses = [row["loss"] for row in undisturbed["base"]]
    assert losses[-1] < losses[0]


def test_stopped_killed_and_continued_it_computes_the_same(
    cluster: Cluster, train: Callable[..., tuple[Launch, str]], undisturbed: dict[str, list[dict[str, Any]]]
) -> None:
    if not undisturbed:
        pytest.skip("needs the job of the test before")
    launch, job = train()
    cluster.wait_for(lambda: len(rows(launch, "base")) >= 8, LIMIT, "step 8 of base")
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait_for(lambda: cluster.job(job).get("Restarts") == "1", 120, "back in the queue")
    saved = len(rows(launch, "base"))
    assert 8 <= saved < STEPS["base"] - 10
    cluster.wait_for(lambda: len(rows(launch, "base")) >= saved + 5, LIMIT, "five more steps")
    victim = processes_of(job)[-1]
    os.kill(victim, 9)
    cluster.wait_for(lambda: cluster.job(job).get("Restarts") == "2", 120, "back in the queue again")
    assert cluster.wait_for_end(job, LIMIT) == ("COMPLETED", 0), text_of(launch)

    log = Path(slurm.log_file(launch)).read_text()
    assert "stopped by SIGTERM (143); back into the queue, restart 1 of at most 50 (task:status 0:143 1:143)" in log
    assert "a process was killed (137); back into the queue, restart 2 of at most 50" in log
    assert f"base: resumed after step {saved}\n" in Path(slurm.log_file(launch, 0)).read_text()  # nothing was lost
    for stage in STEPS:
        assert steps_of(Path(launch.workdir), stage) == undisturbed[stage]  # bit for bit


def test_a_configuration_that_is_wrong_is_not_tried_again(
    cluster: Cluster, train: Callable[..., tuple[Launch, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "OVERRIDES", ["--config.train.learning_rte=1"])
    launch, job = train()
    assert cluster.wait_for_end(job, LIMIT) == ("FAILED", 2), text_of(launch)
    assert cluster.job(job)["Restarts"] == "0"
    assert "failed with 2, not put back into the queue" in Path(slurm.log_file(launch)).read_text()
    assert "learning_rte" in text_of(launch)


def processes_of(job: str) -> list[int]:
    """Returns the ids of the Python processes of a job's tasks."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            variables = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdecimal() else []
            program = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended, or belongs to somebody else
        if f"SLURM_JOB_ID={job}".encode() in variables and b"visor_jax\0run\0" in program and b"bash" not in program:
            found.append(int(folder.name))
    return sorted(found)
