"""Kernels on a mesh of eight simulated devices: each device computes its share, with equal results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("mesh_program.py")


def test_each_device_computes_its_part():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(PROGRAM.parents[2])}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
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
