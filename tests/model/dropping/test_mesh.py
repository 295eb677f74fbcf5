"""Dropping on four simulated devices, two of which split the rows, and in other dtypes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("dropping_mesh_program.py")


def test_every_device_chooses_in_its_own_rows_in_every_dtype() -> None:
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(PROGRAM.parents[3])}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 3
    for method, found in report.items():
        assert max(found["mesh"], found["double"]) < 1e-4, method
        assert found["dtypes"] == ["bfloat16", "float64"] and found["finite"], method
