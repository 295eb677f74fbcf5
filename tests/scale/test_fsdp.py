"""Fully sharded training over eight simulated devices equals training on a single device up to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from visor_jax.scale.compiler_options import QUICK
from visor_jax.testing.processes import program_report

PROGRAM = Path(__file__).with_name("fsdp_program.py")
# Fast compilation, because the programs run only three steps.
FLAGS = " ".join(f"--{name}={str(x).lower()}" for name, x in QUICK.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["full", "base"])
def test_steps_on_a_mesh_equal_those_of_one_device(stage: str, tmp_path: Path) -> None:
    for mesh, measured in program_report(PROGRAM, stage, str(tmp_path), devices=8, flags=FLAGS).items():
        assert measured["start"] < 1e-6, "the same random parameters on every mesh, up to rounding"
        np.testing.assert_allclose(measured["losses"], measured["expected_losses"], rtol=1e-5, err_msg=mesh)
        assert len(set(measured["losses"])) == len(measured["losses"]) and measured["moved"] > 0.01, "it trained"
        assert measured["norms"] < 1e-5 and measured["gradients"] < 1e-5 and measured["end"] < 1e-2, (mesh, measured)
        assert len(measured["likelihoods"]) == 5
        np.testing.assert_allclose(measured["likelihoods"], measured["expected_likelihoods"], rtol=1e-2, err_msg=mesh)
        fsdp, tensor = (int(n) for n in mesh.replace("-1", "8").split("x")[1:])
        assert measured["held"] < 1.3 / (fsdp * tensor), "a device holds its share, and all small parameters"
