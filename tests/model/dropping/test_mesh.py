"""Dropping on four simulated devices, two of which split the rows, and in other dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest

from visor_jax.testing.processes import program_report

PROGRAM = Path(__file__).with_name("dropping_mesh_program.py")


@pytest.mark.slow
def test_every_device_chooses_in_its_own_rows_in_every_dtype() -> None:
    report = program_report(PROGRAM, devices=4)
    assert len(report) == 3
    for method, found in report.items():
        assert max(found["mesh"], found["double"]) < 1e-4, method
        assert found["dtypes"] == ["bfloat16", "float64"] and found["finite"], method
