"""Compiles the steps of stages for a TPU topology, without a TPU, each in a process of its own.

An installed libtpu looks for TPUs when JAX is imported, so the process that plans never compiles. Its children get an
environment in which libtpu does not look, and the flags with which training would run on these chips. They are stopped
once the program is optimized and laid out in memory: generating its machine code takes most of the time, and changes
neither bytes nor collectives.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from visor_jax.config import Config, to_json
from visor_jax.errors import RequestError, RunError
from visor_jax.planning import dump
from visor_jax.planning.hlo import traffic_of
from visor_jax.scale.topologies import Topology
from visor_jax.scale.xla_flags import set_flags

WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-16",  # any; each compilation names its topology
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time: none of them holds a TPU
}
WORKER = (sys.executable, "-P", "-m", "visor_jax.planning.worker")
LAST_LINES = 5
AT_ONCE = 2  # stages; each takes 2 to 4 GB of this machine's memory
POLL = 1.0  # seconds
CODE = 350_000_000  # bytes that machine code is counted as where it is not generated: programs had 50 to 330 MB


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
    config: Config,
    topology: Topology,
    stages: Sequence[str],
    seconds: float,
    *,
    until_unfit: bool = False,
    machine_code: bool = False,
) -> dict[str, Any]:
    """Compiles the step of each stage; those that are not done after `seconds` are missing from the result.

    Args:
      until_unfit: one after the other, and stop after the first stage that does not fit.
      machine_code: compile to the end, as on hardware.

    Returns:
      {stage: what `compile_stage` returns}.

    Raises:
      RequestError: libtpu is missing or knows no such topology, or a stage cannot run on it.
      RunError: the compiler failed.
    """
    check_libtpu(topology)
    deadline = time.monotonic() + seconds
    one = partial(compile_stage, config, topology, deadline=deadline, machine_code=machine_code)
    results: dict[str, Any] = {}
    if until_unfit:
        for stage in stages:
            if (found := one(stage)) is not None:
                results[stage] = found
            if found is None or not found["fits"]:
                break
        return results
    with ThreadPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        found = dict(zip(stages, pool.map(one, stages), strict=True))
    return {stage: result for stage, result in found.items() if result is not None}


def compile_stage(
    config: Config, topology: Topology, stage: str, *, deadline: float, machine_code: bool
) -> dict[str, Any] | None:
    """Returns bytes of one JAX device, collectives and seconds of one stage's step; None if there was no time.

    The keys are "weights", "optimizer", "batch" and "total", "fits", "limit" (bytes that a program may use), "seconds";
    if it fits also "temporaries", "code", "machine_code" (whether code was generated) and those of `traffic_of`.

    Raises: as `compile_stages`.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="visor_plan_") as name:
        folder = Path(name)
        out, request, log, dumped = (folder / part for part in ("out.json", "request.json", "log", "dump"))
        asked = {"topology": topology.name, "slices": topology.slices, "stage": stage, "out": str(out)}
        request.write_text(json.dumps({"config": json.loads(to_json(config)), **asked}))
        program = dump.Folder(dumped)
        with log.open("w") as messages:
            environment = _environment(topology, dumped)
            process = subprocess.Popen([*WORKER, str(request)], env=environment, stdout=messages, stderr=messages)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if not machine_code and program.finished():
                    break
                time.sleep(POLL)
            status = process.poll()
        finally:
            process.kill()
            process.wait()
        written = json.loads(out.read_text()) if out.exists() else {}
        if "refused" in written:
            raise RequestError(f"{topology.flags}: {written['refused']}")
        if status:
            last = log.read_text().strip().splitlines()[-LAST_LINES:]
            raise RunError(f"{topology.flags}: the compiler failed: {' '.join(last)}")
        limit = topology.chip.hbm_bytes // topology.chip.cores
        result, timing = written.get("result"), {"seconds": time.monotonic() - start}
        if result and not result["fits"]:
            return {**written["arguments"], **result, **timing, "machine_code": False}
        if not result and (machine_code or not program.finished()):
            return None
        return {**figures(written["arguments"], program.read(), limit, result), **timing}


def figures(
    arguments: dict[str, int], program: dump.Dumped, limit: int, result: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns what `compile_stage` does, from a program and, if machine code was generated, what the process found."""
    code = result["code"] if result else CODE
    total = sum(arguments.values()) + program.temporaries + code
    found = {"total": total, "fits": bool(result) or total <= limit, "limit": limit, "machine_code": bool(result)}
    return {**arguments, **found, "temporaries": program.temporaries, "code": code, **traffic_of(program.text)}


def _environment(topology: Topology, dumped: Path) -> dict[str, str]:
    """Returns the environment of a compiling process: no TPU is looked for, no program comes from a cache."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | WITHOUT_TPU
    set_flags(environment, topology.chip.name)
    given = environment.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = f"{given} {dump.FLAGS.format(folder=dumped)}".strip()
    return environment
