"""A training run, launched, stopped and resumed as on a TPU VM; only `gcloud`, systemd and the TPU are replaced."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from tests.faults.whole_run import environment, visor
from tests.launching.conftest import Clients
from visor_jax.config import to_json
from visor_jax.launching import tpu
from visor_jax.launching.description import describe
from visor_jax.launching.steps import Runner
from visor_jax.testing import tiny_config

STEPS = 12


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "base/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_a_run_is_stopped_and_resumed_with_the_losses_of_an_uninterrupted_one(
    clients: Clients, compiled: str, tmp_path: Path
) -> None:
    """The first process stops itself at step 5, so that `stop` meets it there however slow this machine is."""
    config = to_json(tiny_config({"train.checkpoint_every": 4}, steps=STEPS))
    (tmp_path / "config.json").write_text(config)
    reference, run = tmp_path / "reference", tmp_path / "run"
    line = ("train", f"--config={tmp_path / 'config.json'}", "--config.stage=base", f"--workdir={reference}")
    assert visor(*line, compiled=compiled)[0] == 0

    def install(**more: str) -> None:
        """Sets what `visor` is on the worker: this package, on the CPU."""
        settings = environment(compiled, JAX_PLATFORMS="cpu", **more)
        names = [name for name in settings if name.startswith(("JAX_", "XLA_", "VISOR_")) or name == "PYTHONPATH"]
        exports = "".join(f"export {name}='{settings[name]}'\n" for name in names)
        program = f'#!/bin/bash\n{exports}exec {sys.executable} -P -m visor_jax "$@"\n'
        (clients.folder / "visor").write_text(program)

    def act(action: str) -> dict[str, object]:
        launch = describe(
            "tpu", "first", "v5p:2x2x1", zone="us-east5-a", config="c.json", config_json=config, workdir=str(run)
        )
        return tpu.ACTIONS[action](launch, Runner("first"))

    install(VISOR_TEST_KILL_AT="step:5", VISOR_TEST_SIGNAL="SIGSTOP")
    act("up")
    (unit,) = clients.units().values()
    log = run / "logs/first-w-0.log"
    clients.wait_for(lambda: is_stopped(unit["pid"]), 300)
    stopping = threading.Thread(target=act, args=("stop",))
    stopping.start()
    clients.wait_for(lambda: clients.calls("systemctl", "kill"), 60)
    os.kill(unit["pid"], signal.SIGCONT)
    stopping.join(120)
    assert act("status")["workers"] == {"first-w-0": "stopped after saving"}, log.read_text()
    assert 5 <= max(losses(run)) < STEPS and "stopped by SIGTERM" in log.read_text()

    install()
    assert act("resume")["state"] == "running"
    clients.wait_for(lambda: (run / "base/complete.json").exists(), 300)
    assert losses(run) == losses(reference) and set(losses(run)) == set(range(1, STEPS + 1))
    assert "resumed after step" in log.read_text()


def is_stopped(pid: int) -> bool:
    """Returns whether SIGSTOP has stopped a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
