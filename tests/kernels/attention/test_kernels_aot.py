"""The TPU kernels through the real TPU compilers, where libtpu is installed (extra `aot`)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "kernels_aot.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot)")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_shape_of_the_models_compiles(topology: str, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--topologies", topology, "--out", str(tmp_path / "aot.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    programs = json.loads((tmp_path / "aot.json").read_text())["programs"][topology]
    assert len(programs) == 16
    for name, found in programs.items():
        kernels = (
            {"forward_kernel"} if name.endswith("forward") else {"forward_kernel", "grad_q_kernel", "grad_kv_kernel"}
        )
        assert found["scoped_vmem_bytes"].keys() == kernels, name
        assert max(found["scoped_vmem_bytes"].values()) <= 16 * 2**20, name
