"""Kernels on a mesh of eight simulated devices: each device computes its share, with equal results."""

from __future__ import annotations

from pathlib import Path

import pytest

from visor_jax.testing.processes import program_report

PROGRAM = Path(__file__).with_name("mesh_program.py")


@pytest.mark.slow
def test_each_device_computes_its_part():
    report = program_report(PROGRAM, devices=8)
    assert report.pop("order") == [], "every sample is sorted on its device"
    mixed = report.pop("mixed")
    assert mixed["worst"] < 1e-5
    assert mixed["sent"] == ["pred[] all-reduce"], "devices exchange only whether a part is on"
    assert len(report) == 9
    # Samples and KV heads of one device: 4 samples over replica x fsdp, 2 KV heads over tensor; and of 20 rows and 18
    # words. Eight divide neither two heads nor 18 words: then each device has all.
    heads = {"1x4x2": [1, 1], "2x2x2": [1, 1], "1x1x8": [4, 2]}
    words = {"1x4x2": [5, 9], "2x2x2": [5, 9], "1x1x8": [20, 18]}
    for name, found in report.items():
        kernel, sizes = name.split()
        assert found["worst"] < 2e-6, name
        assert found["parts"] == [(words if kernel == "cross_entropy" else heads)[sizes]], name
