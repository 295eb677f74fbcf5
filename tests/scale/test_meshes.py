"""One step on every mesh: the same losses over 20 steps, one program for all budgets, gathers inside the scan.

No array is replicated to change its sharding.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visor_jax.scale.compiler_options import QUICK
from visor_jax.testing.processes import run_processes
from visor_jax.workdir.metrics_log import read_rows

PROGRAM = Path(__file__).with_name("mesh_program.py")
ALONE = "1,1,1"
FLAGS = " ".join(
    ["--xla_force_host_platform_device_count=8", *(f"--{name}={str(x).lower()}" for name, x in QUICK.items())]
)
# A head of two layers and two super-blocks; budgets that differ from step to step.
MODEL = {
    "model.text.num_layers": 8,
    "model.head_layers": 2,
    "train.remat": "full",
    "train.learning_rate": 1e-3,
    "stage_overrides.full.budgets": "subsets",
    "stage_overrides.full.init_from": "",
}
WITH_TAIL = {"model.text.num_layers": 13}  # three super-blocks, and two layers after them
STACKS = (2, 3)  # layers in a stack


def run(folder: Path, steps: int, meshes: Sequence[str], **overrides: object) -> dict[str, Any]:
    changes = json.dumps([f"--config.{name}={value}" for name, value in {**MODEL, **overrides}.items()])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": str(PROGRAM.parents[2])}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # which hides the compiler's warnings
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    command = [sys.executable, str(PROGRAM), str(folder), str(steps), changes, *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    replicated = [line[:600] for line in done.stderr.splitlines() if "full rematerialization" in line]
    assert not replicated, "the compiler replicates an array to change its sharding"
    return json.loads(done.stdout.splitlines()[-1])


def check_gathers(name: str, found: dict[str, Any]) -> None:
    """Layers gather their own weights, in loops and branches: neither activations nor whole stacks of layers."""
    shapes = {where: [[int(n) for n in re.findall(r"\d+", shape.partition("[")[2])] for shape in found[where]]
              for where in ("inside", "outside")}  # fmt: skip
    assert shapes["inside"] and all(len(shape) <= 2 for shape in shapes["inside"]), f"{name}: {found['inside']}"
    stacks = [shape for shape in shapes["outside"] if len(shape) == 3 and shape[0] in STACKS]
    assert not stacks, f"{name}: {found['outside']}"
    assert found["branches"][-1] >= 4, "a slot gathers its weights in the branch that uses them"


@pytest.mark.slow
def test_a_mesh_of_two_slices_trains_as_one_device(tmp_path: Path) -> None:
    """A replica in each slice, within it `fsdp` and `tensor`: the losses of one device."""
    mesh = "1,2,2,2,1"
    found = run(tmp_path, 4, [ALONE, mesh])
    np.testing.assert_allclose(found[mesh]["losses"], found[ALONE]["losses"], atol=1e-5, rtol=0)
    assert found[mesh]["programs"] == found[ALONE]["programs"] == 1, "compiled once for all budgets"
    check_gathers(mesh, found[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_mesh_trains_as_one_device(tmp_path: Path, remat: str) -> None:
    meshes = ["1,8,1", "2,4,1", "1,4,2", "2,2,2", "1,4,1,2,1", "1,4,1,1,2", "1,8,1:2", "2,4,1:2"]
    found = run(tmp_path, 20, [ALONE, f"{ALONE}:4", *meshes], **{**WITH_TAIL, "train.remat": remat})
    for name, measured in found.items():
        np.testing.assert_allclose(measured["losses"], found[ALONE]["losses"], atol=1e-5, rtol=0, err_msg=name)
        assert measured["programs"] == 1, "compiled once for all budgets"
        if "inside" in measured:
            check_gathers(name, measured)


CONFIG = """from visor_jax.testing import tiny_config
def get_config():
    changes = {"stage": "full", "stage_overrides.full.init_from": "", "train.learning_rate": 1e-3}
    return tiny_config(changes, steps=20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [4, 2])
def test_two_processes_train_as_one(tmp_path: Path, fsdp: int) -> None:
    """Two devices each: parameters shared by all four, or a replica in each process."""
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    losses = {}
    for name, count, mesh in (("one", 1, []), ("two", 2, [f"--config.mesh.replica={4 // fsdp}"])):
        arguments = ["train", f"--config={config}", f"--workdir={tmp_path / name}", *mesh]
        for status, output in run_processes(arguments, count=count, devices=count):
            assert status == 0, output
        losses[name] = [row["loss"] for row in read_rows(tmp_path / name / "full" / "metrics.jsonl")]
    assert len(losses["one"]) == 20
    np.testing.assert_allclose(losses["two"], losses["one"], atol=1e-5, rtol=0)
