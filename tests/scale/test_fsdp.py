"""Fully sharded training over eight simulated devices equals training on a single device up to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from visor_jax.scale.compiler_options import QUICK

PROGRAM = Path(__file__).with_name("fsdp_program.py")
# Fast compilation, because the programs run only three steps.
FLAGS = " ".join(
    ["--xla_force_host_platform_device_count=8", *(f"--{name}={str(x).lower()}" for name, x in QUICK.items())]
)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["full", "base"])
def test_steps_on_a_mesh_equal_those_of_one_device(stage: str, tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": str(PROGRAM.parents[2])}
    command = [sys.executable, str(PROGRAM), stage, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for mesh, measured in json.loads(done.stdout.splitlines()[-1]).items():
        assert measured["start"] < 1e-6, "the same random parameters on every mesh, up to rounding"
        np.testing.assert_allclose(measured["losses"], measured["expected_losses"], rtol=1e-5, err_msg=mesh)
        assert len(set(measured["losses"])) == len(measured["losses"]) and measured["moved"] > 0.01, "it trained"
        assert measured["norms"] < 1e-5 and measured["gradients"] < 1e-5 and measured["end"] < 1e-2, (mesh, measured)
        assert len(measured["likelihoods"]) == 5
        np.testing.assert_allclose(measured["likelihoods"], measured["expected_likelihoods"], rtol=1e-2, err_msg=mesh)
        fsdp, tensor = (int(n) for n in mesh.replace("-1", "8").split("x")[1:])
        assert measured["held"] < 1.3 / (fsdp * tensor), "a device holds its share, and all small parameters"
