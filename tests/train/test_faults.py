"""Faults: a step with non-finite values changes nothing, and too many of them end a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from visor_jax.errors import RunError
from visor_jax.train.faults import BadSteps, keep_if_finite

# --- non-finite steps -------------------------------------------------------------------------------------------------


def test_a_nan_step_changes_neither_parameters_nor_optimizer_state():
    tx = optax.adam(0.1)

    @jax.jit
    def update(params, state, x):
        loss, gradients = jax.value_and_grad(lambda p: jnp.sum(p["w"] * x))(params)
        updates, new_state = tx.update(gradients, state, params)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(gradients))
        return keep_if_finite(finite, (optax.apply_updates(params, updates), new_state), (params, state))

    params = {"w": jnp.arange(4.0)}
    state = tx.init(params)
    params, state = update(params, state, jnp.ones(4))
    for _ in range(20):
        for bad in (jnp.nan, jnp.inf):
            after = update(params, state, jnp.ones(4).at[2].set(bad))
            for old, new in zip(jax.tree.leaves((params, state)), jax.tree.leaves(after), strict=True):
                assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    moved, _ = update(params, state, jnp.ones(4))
    assert not np.array_equal(moved["w"], params["w"])


def test_bad_steps_in_a_row_end_the_run_and_name_the_samples():
    bad = BadSteps(3)
    for step, finite in enumerate([False, False, True, False, False]):
        bad.observe(step, finite, ["a", "b"])
    assert bad.in_row == 2
    with pytest.raises(RunError, match=r"step 5: .*3 steps in a row.*glyph-17, glyph-18"):
        bad.observe(5, False, ["glyph-17", "glyph-18"])


def test_none_allowed_means_the_first_one_ends_the_run():
    with pytest.raises(RunError):
        BadSteps(0).observe(1, False, ["a"])


def test_a_stage_whose_last_steps_were_bad_has_not_ended_well():
    bad = BadSteps(3)
    bad.observe(4, True, [])
    bad.check_ended_well("full", 4)
    bad.observe(5, False, ["glyph-3"])
    with pytest.raises(RunError, match=r"full: .* in the last 1 steps, up to step 5; .*not complete.*glyph-3"):
        bad.check_ended_well("full", 5)


def test_counts_of_bad_steps_travel():
    bad, later = BadSteps(3), BadSteps(3)
    for step, finite in enumerate([False, True, False, False]):
        bad.observe(step, finite, [])
    later.restore(bad.state())
    assert (later.in_row, later.total) == (2, 3)
    with pytest.raises(RunError, match="3 steps in a row"):
        later.observe(9, False, [])
    for nothing in (None, [], {"in_row": "x"}, {"in_row": -1, "total": 2.5}):
        later.restore(nothing)
        assert (later.in_row, later.total) == (0, 0)
