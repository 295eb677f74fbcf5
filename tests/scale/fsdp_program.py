"""Runs one stage's first steps on several meshes of eight simulated devices; a process of `test_fsdp.py`.

Usage: fsdp_program.py STAGE FOLDER. Prints one JSON object: for each mesh, named "replica x fsdp x tensor", how far
its losses, gradients, parameters and scores differ from a single device's, and one device's share of the state.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from visor_jax.config import architecture, load_config, stage_config
from visor_jax.data.questions import single_questions
from visor_jax.evaluate.scoring import score
from visor_jax.scale.mesh import build_mesh
from visor_jax.scale.sharding import batch_sharding, place_batch, replicated
from visor_jax.testing import questions_of
from visor_jax.train.objectives import make_objective
from visor_jax.train.optimizer import build_optimizer, learning_rates
from visor_jax.train.state import initial_state
from visor_jax.train.update import State, update_step
from visor_jax.tree import unflatten
from visor_jax.workdir.folder import Workdir

ROOT = Path(__file__).parents[2]
STEPS = 3
MESHES = {"full": [(1, -1, 1)], "base": [(2, 2, 2)]}
OVERRIDES = [
    "model.text.num_layers=3",
    "model.text.hidden_size=32",
    "model.text.intermediate_size=48",
    "model.text.head_dim=8",
    "model.vision.hidden_size=32",
    "model.vision.intermediate_size=48",
    "train.remat=none",
    "data.batch_size=8",
    "stage_overrides.base.batch_size=8",
    "stage_overrides.full.init_from=",
    "stage_overrides.full.warmup_fraction=0.0",
    "stage_overrides.base.warmup_fraction=0.0",
]


def run(config: Any, stage: str, workdir: Workdir, sizes: tuple[int, int, int], devices: Any) -> dict[str, Any]:
    """Returns losses and gradient norms of the first steps, the first step's gradients, the last step's parameters."""
    settings, arch = stage_config(config, stage), architecture(config, stage)
    mesh = build_mesh(*sizes, devices=devices)
    objective, tx = make_objective(config, stage, workdir), build_optimizer(settings)
    rates = learning_rates(settings)
    state, shardings = initial_state(config, stage, arch, tx, mesh, workdir)
    update = jax.jit(
        partial(update_step, objective.loss, tx),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh), replicated(mesh)),
        out_shardings=(shardings, None),
    )
    measured: dict[str, Any] = {"start": host(state), "held": bytes_share(state, devices[0]), "losses": [], "norms": []}
    for step in objective.steps(0, STEPS):
        batch, budget = place_batch(step.arrays, mesh), jnp.asarray(step.budget, bool)
        state, metrics = update(state, batch, budget, rates[step.number - 1])
        measured["losses"].append(float(metrics["loss"]))
        measured["norms"].append(float(metrics["gradient_norm"]))
        if step.number == 1:
            measured["gradients"] = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    samples = list(single_questions(config, "validation", 5))  # not divisible by the number of devices
    params = unflatten({**state.trainable, **state.frozen})
    scores = score(params, questions_of(config, samples).batches(5), [(True,) * arch.num_slots], arch, mesh=mesh)
    return {**measured, "end": host(state), "likelihoods": scores.log_likelihood[0].tolist()}


def host(state: State) -> dict[str, np.ndarray]:
    return jax.device_get({**state.trainable, **state.frozen})


def bytes_share(state: State, device: Any) -> float:
    """Returns the share of parameters and moments that one device holds."""
    leaves = [x for x in jax.tree.leaves(state) if x.ndim]
    here = sum(shard.data.size for x in leaves for shard in x.addressable_shards if shard.device == device)
    return here / sum(x.size for x in leaves)


def without_noise(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops key biases: softmax ignores a shift of all keys, so their gradients are rounding, which Adam amplifies."""
    return {path: x for path, x in params.items() if path != "blocks/cross_attention/k_proj/bias"}


def worst(measured: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Returns the largest difference relative to each array's largest magnitude."""
    assert measured.keys() == expected.keys()
    scales = {name: max(float(np.abs(x).max()), 1e-3) for name, x in expected.items()}
    return max(float(np.abs(measured[name] - expected[name]).max()) / scales[name] for name in expected)


def main(stage: str, folder: str) -> None:
    config = load_config(ROOT / "configs" / "almanac_mini.py", [f"--config.{line}" for line in OVERRIDES])
    devices, workdir = jax.devices(), Workdir(Path(folder))
    assert len(devices) == 8
    alone = run(config, stage, workdir, (1, 1, 1), devices[:1])
    report = {}
    for sizes in MESHES[stage]:
        measured = run(config, stage, workdir, sizes, devices)
        report["x".join(map(str, sizes))] = {
            "losses": measured["losses"],
            "expected_losses": alone["losses"],
            "norms": float(np.abs(np.subtract(measured["norms"], alone["norms"])).max() / max(alone["norms"])),
            "start": worst(measured["start"], alone["start"]),
            "gradients": worst(measured["gradients"], alone["gradients"]),
            "end": worst(without_noise(measured["end"]), without_noise(alone["end"])),
            "moved": worst(alone["end"], alone["start"]),
            "held": measured["held"],
            "likelihoods": measured["likelihoods"],
            "expected_likelihoods": alone["likelihoods"],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
