"""A step in parts equals the step of the whole batch to rounding: loss, gradients, metrics, packed rows, bad steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from visor_jax import testing
from visor_jax.config import architecture, as_config, stage_config
from visor_jax.model.visor import init_params
from visor_jax.train.accumulation import Accumulation, joined, split
from visor_jax.train.objectives import PARTS, make_objective
from visor_jax.train.objectives.answers import answer_loss
from visor_jax.train.optimizer import build_optimizer, split_trainable
from visor_jax.train.update import State, update_step
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir

ARCH = testing.tiny_architecture(3)
ROWS = 8


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_shard_gives_each_part_an_equal_share_of_its_rows(shards: int) -> None:
    how = Accumulation(2, shards, PARTS["answer"])
    rows = np.arange(ROWS * 3).reshape(ROWS, 3)
    with jax.set_mesh(jax.make_mesh((1, 1), ("replica", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        parts = jax.jit(partial(split, how=how))(rows)
        back = jax.jit(partial(joined, how=how))(parts)
    assert parts.shape == (2, ROWS // 2, 3)
    share = ROWS // (2 * shards)
    for part in range(2):
        expected = [row for row in range(ROWS) if row // share % 2 == part]
        np.testing.assert_array_equal(parts[part], rows[expected])
    np.testing.assert_array_equal(back, rows)


def packed(rows_per_pool: int) -> dict[str, Any]:
    """A batch whose rows have different numbers of targets; neighboring rows share a pool of tiles."""
    texts = ((3, 4), (2, 3), (2, 2, 3), (7,))  # (one or two pictures, or none, and text around them) of a row
    batch = dict(testing.random_batch(ARCH, tuple((texts[row % len(texts)],) for row in range(ROWS))).arrays)
    keep = np.arange(batch["loss_mask"].shape[1])[None] % (1 + np.arange(ROWS)[:, None]) == 0
    batch["loss_mask"] = np.asarray(batch["loss_mask"]) & keep
    if rows_per_pool > 1:
        tiles = np.asarray(batch["tiles"])
        batch["tiles"] = tiles.reshape(-1, rows_per_pool * tiles.shape[1], *tiles.shape[2:])
    return batch


@pytest.mark.parametrize("rows_per_pool", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_in_parts_equals_the_whole(rows_per_pool: int) -> None:
    params, batch = flatten(testing.random_params(ARCH)), packed(rows_per_pool)
    loss, tx = partial(answer_loss, arch=ARCH, num_turns=2, remat="none", tower_remat="none"), optax.scale_by_adam()
    state = State(params, {}, tx.init(params))
    step = testing.quick_jit(partial(update_step, loss, tx), static_argnames="accumulation")
    arguments = (state, batch, jnp.array([True]), jnp.float32(1e-3))
    whole, metrics = step(*arguments)
    in_parts, metrics_in_parts = step(*arguments, accumulation=Accumulation(4, 1, PARTS["answer"]))
    tokens = [float(np.sum(rows)) for rows in np.split(np.asarray(batch["loss_mask"]), 4)]
    assert len(set(tokens)) > 1, "a mean of means would differ"
    chex.assert_trees_all_close(metrics_in_parts, metrics, rtol=2e-5)
    moments = [optax.tree.get(state.opt_state, "mu") for state in (in_parts, whole)]
    scale = max(float(jnp.abs(x).max()) for x in moments[1].values())
    chex.assert_trees_all_close(*moments, rtol=1e-3, atol=1e-5 * scale)


def test_one_bad_part_leaves_the_whole_state_unchanged() -> None:
    def loss(params: Any, batch: Any, budget: Any) -> Any:
        return jnp.mean(params["w"] * batch["x"]), {"target_tokens": jnp.float32(len(batch["x"]))}

    tx, params = optax.scale_by_adam(), {"w": jnp.float32(2.0)}
    average = {"w": jnp.float32(1.0)}
    state = State(params, {}, tx.init(params), average)
    x = jnp.ones(4).at[2].set(jnp.nan)
    how = Accumulation(2, 1, PARTS["answer"])
    after, metrics = update_step(
        loss, tx, state, {"x": x}, jnp.array([True]), jnp.float32(0.1), ema_decay=0.5, accumulation=how
    )
    assert not metrics["finite"]
    chex.assert_trees_all_equal(after, state)
    after, metrics = update_step(
        loss, tx, state, {"x": jnp.ones(4)}, jnp.array([True]), jnp.float32(0.1), ema_decay=0.5, accumulation=how
    )
    assert metrics["finite"] and float(metrics["loss"]) == 2.0
    assert float(after.ema["w"]) == pytest.approx((1.0 + float(after.trainable["w"])) / 2)


@pytest.mark.parametrize("stage", [pytest.param("base", marks=pytest.mark.slow), "policy"])
def test_other_stages_are_accumulated_and_averaged_too(tiny_run: Path, quick: None, stage: str) -> None:
    """`accumulate` and `ema_decay` in the stages base and policy: the losses and parameters of whole batches."""
    config = as_config(testing.tiny_config({"train.ema_decay": 0.5, f"stage_overrides.{stage}.accumulate": 2}))
    arch, settings = architecture(config, stage), stage_config(config, stage)
    objective, tx = make_objective(config, stage, Workdir(tiny_run)), build_optimizer(settings)
    step = next(iter(objective.steps(0, 1)))
    trainable, frozen = split_trainable(init_params(arch, jax.random.key(0)), settings.trainable)
    state = State(trainable, frozen, tx.init(trainable), trainable)
    update = testing.quick_jit(
        partial(update_step, objective.loss, tx, ema_decay=settings.ema_decay), static_argnames="accumulation"
    )
    arguments = (state, step.arrays, jnp.asarray(step.budget, bool), jnp.float32(1e-3))
    whole, metrics = update(*arguments)
    in_parts, metrics_in_parts = update(*arguments, accumulation=Accumulation(2, 1, PARTS[settings.objective]))
    chex.assert_trees_all_close(metrics_in_parts, metrics, rtol=2e-5, atol=1e-6)
    moments = [optax.tree.get(state.opt_state, "mu") for state in (in_parts, whole)]
    scale = max(float(jnp.abs(x).max()) for x in moments[1].values())
    chex.assert_trees_all_close(*moments, rtol=1e-3, atol=1e-5 * scale)
    for path, before in trainable.items():
        np.testing.assert_allclose(in_parts.ema[path], (before + in_parts.trainable[path]) / 2, atol=1e-6)
