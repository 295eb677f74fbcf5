"""Compiles the steps of stages for a TPU topology, without a TPU, in a process of their own.

An installed libtpu looks for TPUs when JAX is imported, so the process that plans never compiles. Its child gets an
environment in which libtpu does not look, and the flags with which training would run on these chips.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visor_jax.config import Config, to_json
from visor_jax.errors import RequestError, RunError
from visor_jax.scale.topologies import Topology
from visor_jax.scale.xla_flags import set_flags

WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-16",  # any; each compilation names its topology
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time: none of them holds a TPU
}
LAST_LINES = 5


def check_libtpu(topology: Topology) -> None:
    """Raises:
    RequestError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RequestError(
            f"{topology.flags}: compiling for TPUs needs libtpu, which is not installed; install the extra"
            " [aot]: pip install 'visor_jax[aot]', preferably in an environment of its own"
        )


def compile_stages(
    config: Config, topology: Topology, stages: Sequence[str], seconds: float, *, until_unfit: bool = False
) -> dict[str, Any]:
    """Compiles the step of each stage, in order; those that are not done after `seconds` are missing from the result.

    Args:
      until_unfit: stop after the first stage that does not fit.

    Returns:
      {stage: what `visor_jax.planning.worker.compiled` returns}.

    Raises:
      RequestError: libtpu is missing or knows no such topology, or a stage cannot run on it.
      RunError: the compiler failed.
    """
    check_libtpu(topology)
    with tempfile.TemporaryDirectory(prefix="visor_plan_") as name:
        folder = Path(name)
        out, request = folder / "out.json", folder / "request.json"
        asked = {
            "config": json.loads(to_json(config)),
            "topology": topology.name,
            "slices": topology.slices,
            "stages": [*stages],
            "out": str(out),
        }
        asked["until_unfit"] = until_unfit
        request.write_text(json.dumps(asked))
        command = [sys.executable, "-P", "-m", "visor_jax.planning.worker", str(request)]
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | WITHOUT_TPU
        set_flags(environment, topology.chip.name)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=max(seconds, 1)
            )
            failure = done.stderr.strip().splitlines()[-LAST_LINES:] if done.returncode else []
        except subprocess.TimeoutExpired:
            failure = []
        result = json.loads(out.read_text()) if out.exists() else {}
    if "refused" in result:
        raise RequestError(f"{topology.flags}: {result['refused']}")
    if failure:
        raise RunError(f"{topology.flags}: the compiler failed: {' '.join(failure)}")
    return result.get("stages", {})
