"""A short `visor run` in separate processes, and everything in its workdir that must not depend on interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import visor_jax.errors
from visor_jax.checkpoint.restoring import examine_complete, read_arrays
from visor_jax.scale.compiler_options import QUICK
from visor_jax.train.observer import MEASURED
from visor_jax.tree import flatten, unflatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows

ROOT = Path(visor_jax.errors.__file__).parents[1]
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
TRAINED = ("base", "warmup", "full", "universal", "policy")
CONFIG = """
from visor_jax.testing import tiny_config
def get_config():
    return tiny_config({"train.checkpoint_every": 1, "evaluate.batch_size": 8, "search.samples": 16})
"""
# Fields of result files that say when or how fast, or name checkpoints, whose files' bytes differ between runs.
VOLATILE = ("seconds", "manifest_sha256", "identity", "created", "fingerprint", "model", "made_of", "latency")


def environment(compiled: str, **more: str) -> dict[str, str]:
    """Returns the environment of a command: this package, quick compilation, a cache of compiled programs."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS, "JAX_COMPILATION_CACHE_DIR": compiled}
    settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    settings.pop("VISOR_TEST_KILL_AT", None)
    return {**settings, **more}


def visor(*arguments: object, compiled: str, **more: str) -> tuple[int, str]:
    """Runs a command in a process of its own; returns its exit status and stderr."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "visor_jax", *map(str, arguments)],
        env=environment(compiled, **more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stderr


def results(run: Path) -> dict[str, Any]:
    """Returns what a run has computed, without times: {name: value}, for one comparison with another run's."""
    found: dict[str, Any] = {}
    for stage in TRAINED:
        found[f"{stage}: steps"] = steps_of(run, stage)
        found[f"{stage}: arrays"] = array_digests(run, stage)
    for name in ("search/viable.json", "labels/labels.json", "eval/test.json"):
        found[name] = without_times(json.loads((run / name).read_text()))
    found["search/subsets.csv"] = (run / "search/subsets.csv").read_text()
    with np.load(run / "labels/labels.npz") as labels:
        found["labels/labels.npz"] = {name: labels[name].tolist() for name in labels.files}
    return found


def steps_of(run: Path, stage: str) -> list[dict[str, Any]]:
    """Returns the rows of a stage's metrics, without what is measured, such as times."""
    rows = read_rows(run / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def exported(run: Path) -> dict[str, Any]:
    """Returns checksums of a run's exported weights and settings, and the figures of its proof."""
    proof = without_times(json.loads((run / "export/parity.json").read_text()))
    files = [*(run / "export").glob("*.safetensors"), run / "export/config.json"]
    return {"proof": proof, **{file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}


def array_digests(run: Path, stage: str) -> dict[str, str]:
    """Returns a sha256 of every parameter and every array of the optimizer state of a complete stage."""
    folder = Workdir(run).stage(stage)
    manifest = examine_complete(folder)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=place)
        for path, (shape, dtype) in manifest.tree.items()
    }
    arrays = read_arrays(folder.path / "checkpoints" / str(manifest.step), manifest, unflatten(like))
    return {path: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in flatten(arrays).items()}


def without_times(value: Any) -> Any:
    """Returns a JSON value without the fields that `VOLATILE` names."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith(VOLATILE)}
    return [without_times(item) for item in value] if isinstance(value, list) else value
