"""The optimizer: trained parameters, their rates, and schedules."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from visor_jax.config import stage_config
from visor_jax.config.train_fields import TrainConfig
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.train.optimizer import (
    build_optimizer,
    group_rate,
    learning_rates,
    schedule,
    split_trainable,
    state_shardings,
)
from visor_jax.tree import flatten, unflatten

GATES = {"self": {"gate": jnp.ones(4)}, "text": {"gate": jnp.ones(4)}}
PARAMS = {"vision": {"kernel": jnp.ones((2, 3))}, "blocks": GATES}


def settings(**changes: Any) -> TrainConfig:
    return dataclasses.replace(stage_config(tiny_config(), "full"), **changes)


def test_flatten_and_back() -> None:
    assert set(flatten(PARAMS)) == {"vision/kernel", "blocks/self/gate", "blocks/text/gate"}
    assert jax.tree.structure(unflatten(flatten(PARAMS))) == jax.tree.structure(PARAMS)


def test_patterns_match_from_the_start_of_a_path() -> None:
    trainable, frozen = split_trainable(PARAMS, ("blocks/self/", "vision"))
    assert set(trainable) == {"blocks/self/gate", "vision/kernel"} and set(frozen) == {"blocks/text/gate"}
    trainable, _ = split_trainable(PARAMS, ("(?!blocks/)",))
    assert set(trainable) == {"vision/kernel"}
    with pytest.raises(RequestError, match=r"train\.trainable: 'self' matches no parameter"):
        split_trainable(PARAMS, ("vision", "self"))


def test_an_unknown_pattern_is_told_the_nearest_path() -> None:
    with pytest.raises(RequestError, match="did you mean 'vision/kernel'"):
        split_trainable(PARAMS, ("vison/kernel",))


@pytest.mark.parametrize(("kind", "middle"), [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)])
def test_schedule_rises_to_the_peak_and_falls_to_the_end(kind: str, middle: float) -> None:
    rate = schedule(settings(steps=110, learning_rate=2.0, warmup_fraction=10 / 110, end_fraction=0.1, schedule=kind))
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])
    assert float(rate(60)) == pytest.approx(2.0 * middle)
    assert float(rate(110)) == pytest.approx(2.0 if kind == "constant" else 0.2)


def test_every_step_has_its_rate() -> None:
    stage = settings(steps=4, learning_rate=2.0, warmup_fraction=0.5, end_fraction=0.0, schedule="linear")
    assert learning_rates(stage).tolist() == [0.0, 1.0, 2.0, 1.0]


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert float(schedule(settings(steps=10, learning_rate=2.0, warmup_fraction=0.0))(0)) == pytest.approx(2.0)


def test_the_first_rate_that_matches_counts() -> None:
    rates = {"blocks/self/": 0.5, "blocks/": 2.0}
    assert [group_rate(path, rates) for path in ("blocks/self/gate", "blocks/text/gate", "vision/kernel")] == [
        0.5,
        2,
        1,
    ]


def updates_of(**changes: Any) -> dict[str, np.ndarray]:
    tx = build_optimizer(settings(**changes))
    flat = flatten(PARAMS)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, flat), tx.init(flat), flat)
    return {path: np.asarray(update) for path, update in updates.items()}


def test_group_rates_scale_the_updates_and_zero_stops_them() -> None:
    plain = updates_of()
    scaled = updates_of(group_rates=(("blocks/self/", 0.25), ("vision/", 0.0)))
    np.testing.assert_allclose(scaled["blocks/self/gate"], 0.25 * plain["blocks/self/gate"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["vision/kernel"], 0)
    np.testing.assert_array_equal(scaled["blocks/text/gate"], plain["blocks/text/gate"])


def test_weight_decay_is_decoupled_and_falls_with_the_group_rate() -> None:
    tx = build_optimizer(settings(weight_decay=0.5, group_rates=(("vision/", 0.5),)))
    flat = flatten(PARAMS)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, flat), tx.init(flat), flat)
    np.testing.assert_allclose(updates["blocks/self/gate"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["vision/kernel"], 0.25, rtol=1e-5)


def test_large_gradients_are_clipped_by_their_global_norm() -> None:
    """Adam is invariant to scale, so clipping is visible only in its moments."""
    tx = build_optimizer(settings(clip_norm=1.0))
    flat = flatten(PARAMS)
    _, state = tx.update(jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), flat), tx.init(flat), flat)
    mean = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    assert float(optax.global_norm(mean)) == pytest.approx(1 - 0.9, rel=1e-4)


def test_moments_live_where_their_parameters_live() -> None:
    flat = flatten(PARAMS)
    places = {path: f"place of {path}" for path in flat}
    state = jax.eval_shape(build_optimizer(settings()).init, flat)
    found = jax.tree.leaves(state_shardings(state, places, "everywhere"))
    assert sorted(found) == sorted([*places.values(), *places.values(), "everywhere"])
