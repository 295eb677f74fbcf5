"""With `JAX_ENABLE_X64=1` in the environment, the package still computes in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import visor_jax.errors
from visor_jax.config import architecture
from visor_jax.files.read_write import read_json
from visor_jax.loading import load
from visor_jax.testing import tiny_config

ROOT = Path(visor_jax.errors.__file__).parents[1]
SHAPES = """
import collections, json, jax
from visor_jax.config import architecture
from visor_jax.model.visor import abstract_params
from visor_jax.testing import tiny_config
assert jax.config.jax_enable_x64
shapes = [abstract_params(architecture(tiny_config({"model.cross.init": init}))) for init in ("copy", "zero")]
print(json.dumps(sorted({leaf.dtype.name for leaf in jax.tree.leaves(shapes)})))
"""
ANSWER = """
import json, sys
import numpy as np
from visor_jax.loading import load
model = load(sys.argv[1])
picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
ids = [model.tokenizer.image_token_id, *model.tokenizer.encode("Which colour?")]
text = model.answer(picture, "Which colour?", "full", 4, temperature=0.5).text
print(json.dumps([text, model.logits(ids, [picture]).tolist()]))
"""
RUN = """
import sys
from visor_jax import loading
from visor_jax.commands.recipe import run_stages
from visor_jax.evaluate.runner import evaluate
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir
config = tiny_config(steps=2)
run_stages(config, sys.argv[1], config.stages)
evaluate(config, loading.load(sys.argv[1]), Workdir(sys.argv[1]))
"""


def with_x64(script: str, *arguments: object, cache: str = "") -> str:
    """Returns the last line that a script prints in a process with 64-bit JAX."""
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def test_parameters_begin_as_float32() -> None:
    assert json.loads(with_x64(SHAPES)) == ["float32"]


def test_a_checkpoint_is_loaded_and_answers_alike(tiny_run: Path, compiled: str) -> None:
    model = load(tiny_run)
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    ids = [model.tokenizer.image_token_id, *model.tokenizer.encode("Which colour?")]
    text, logits = json.loads(with_x64(ANSWER, tiny_run, cache=compiled))
    assert text == model.answer(picture, "Which colour?", "full", 4, temperature=0.5).text
    np.testing.assert_allclose(logits, model.logits(ids, [picture]), atol=1e-4)


@pytest.mark.slow
def test_a_whole_run_trains_searches_labels_and_evaluates(tmp_path: Path, compiled: str) -> None:
    with_x64(RUN, tmp_path / "run", cache=compiled)
    result = read_json(tmp_path / "run" / "eval" / "test.json")
    assert "auto" in result["budgets"] and architecture(tiny_config()).num_slots == 2
    manifest = read_json(tmp_path / "run" / "policy" / "checkpoints" / "2" / "manifest.json")
    dtypes = {dtype for name, (_, dtype) in manifest["tree"].items() if name.startswith("params/")}
    assert dtypes == {"float32"}
