"""Runs lmms-eval in its own environment (test_lmms_eval.py says how to make one), offline, with this checkout's models.

`LMMS_EVAL_PYTHON` names its Python; tests marked with `needs_lmms_eval` are skipped without it.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
ROOT = Path(__file__).parents[2]
LIMIT = 2400  # seconds, of one command

needs_lmms_eval = pytest.mark.skipif(not PYTHON, reason="LMMS_EVAL_PYTHON names no python with lmms-eval")


def run(arguments: list[str], folder: Path, path: str = "") -> str:
    """Returns the output of a command in lmms-eval's environment, with its caches below `folder`, where it runs.

    Args:
      path: of further packages.
    """
    places = {"HF_HOME": str(folder / "hub_cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [PYTHON, *arguments],
        env={**os.environ, **places, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def entry_points(folder: Path) -> str:
    """Writes this checkout's entry points as an installation would; returns PYTHONPATH with both."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    information = folder / "visor_jax-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: visor-jax\nVersion: 0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (information / "entry_points.txt").write_text("[lmms_eval.models]\n" + lines)
    return f"{folder}:{ROOT}"
