"""The cluster, once for all tests of this folder, and a launch on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.slurm.cluster import Cluster, missing
from visor_jax.launching import slurm
from visor_jax.launching.description import Launch, describe
from visor_jax.launching.steps import Runner

# Stands for `visor`: each task does what a file named for the restart and the task says.
ACTOR = """\
#!/bin/bash
source "$ACTS/${SLURM_RESTART_COUNT:-0}-$SLURM_PROCID"
"""
VISOR = f"""\
#!/bin/bash
exec {sys.executable} -P -m visor_jax "$@"
"""
SITE = ("ACCOUNT", "CLUSTERS", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION", "TIMELIMIT")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacking := missing():
        pytest.skip(f"{', '.join(lacking)}: not installed; `launch/test.sh --cluster` installs slurm-wlm and munge")
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Launch]]:
    """Returns a function that describes a run of two tasks of a program; its jobs end with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    for name in SITE:
        monkeypatch.delenv(f"SBATCH_{name}", raising=False)

    def start(program: str, **fields: Any) -> Launch:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "visor").write_text(program)
        (folder / "visor").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        fields = {"config": "almanac_mini", "workdir": str(tmp_path / "run"), **fields}
        launch = describe("slurm", "two-tasks", fields.pop("topology", "h100x2"), **fields)
        slurm.check(launch)
        return launch

    yield start
    cluster.cancel()


@pytest.fixture
def act(
    submit: Callable[..., Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Launch, str]]:
    """Returns a function that submits a job whose tasks do what is written: {(restart, task): shell commands}."""

    def start(acts: dict[tuple[int, int], str], **fields: Any) -> tuple[Launch, str]:
        folder = tmp_path / "acts"
        folder.mkdir(exist_ok=True)
        for (restart, task), commands in acts.items():
            (folder / f"{restart}-{task}").write_text(commands)
        monkeypatch.setenv("ACTS", str(folder))
        launch = submit(ACTOR, **fields)
        return launch, slurm.up(launch, Runner(launch.name))["job"]

    return start
