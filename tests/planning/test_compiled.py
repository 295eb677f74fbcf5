"""Plans through the real TPU compilers, where libtpu is installed (extra `aot`)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from visor_jax.planning import check_flags
from visor_jax.scale.xla_flags import FLAGS

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing (extra aot)")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", FLAGS)
def test_every_flag_is_known(chip: str) -> None:
    assert check_flags.problem(chip) == ""


@pytest.mark.slow
@needs_libtpu
def test_an_unknown_flag_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    variable, flags = FLAGS["v5e"]
    monkeypatch.setitem(check_flags.FLAGS, "v5e", (variable, (*flags, "--xla_tpu_no_such_flag=true")))
    assert "xla_tpu_no_such_flag" in check_flags.problem("v5e")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_small_run_is_compiled_and_fits(topology: str) -> None:
    command = [sys.executable, "-P", "-m", "visor_jax", "plan", "--config=configs/almanac_mini.py"]
    command.append("--config.data.batch_size=24")  # rows for 4 chips, and for the 8 devices of 4 chips of tpu7x
    done = subprocess.run(
        [*command, f"--topology={topology}", "--stage=warmup", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stage = json.loads(done.stdout.splitlines()[-1])["stages"]["warmup"]
    assert stage["fits"] and stage["compiled"] and stage["collective_bytes"] > 0
    assert stage["bytes_per_chip"] < stage["bytes_available"]
