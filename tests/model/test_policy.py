"""The policy's choice: a dial that only ever goes one way, and never a budget that is not viable."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.model.policy import choose, policy_logits

CHOOSE = jax.jit(choose)
# Eighths are exact in float32: near-ties that only rounding decides would say nothing about the dial.
EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    scores=st.lists(EIGHTHS, min_size=5, max_size=5),
    costs=st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    dials=st.lists(EIGHTHS, min_size=2, max_size=6),
)
def test_a_higher_dial_never_picks_a_cheaper_budget(scores, costs, dials) -> None:
    found = [int(CHOOSE(jnp.array([scores]), jnp.array(costs, jnp.float32), dial)[0]) for dial in sorted(dials)]
    chosen_costs = [costs[index] for index in found]
    assert chosen_costs == sorted(chosen_costs)


def test_the_ends_of_the_dial() -> None:
    scores, costs = jnp.array([[0.0, 3.0, -1.0], [5.0, 0.0, 0.0]]), jnp.array([1.0, 2.0, 4.0])
    assert CHOOSE(scores, costs).tolist() == [1, 0], "at 0 the policy's own choice"
    assert CHOOSE(scores, costs, 100.0).tolist() == [2, 2], "all the way up: the dearest"
    assert CHOOSE(scores, costs, -100.0).tolist() == [0, 0], "all the way down: the cheapest"


def test_what_is_not_viable_is_never_chosen() -> None:
    scores = jnp.array([[0.0, 1.0, 50.0, 99.0]])  # outputs past the two viable budgets
    for dial in (-9.0, 0.0, 9.0):
        assert int(CHOOSE(scores, jnp.array([1.0, 2.0]), dial)[0]) < 2


@pytest.mark.parametrize("num_viable", [1, 3, 8])
def test_scores_past_the_viable_budgets_are_minus_infinity(num_viable: int) -> None:
    arch = testing.tiny_architecture(3)
    params = testing.random_params(arch)["routing"]
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((4, arch.text.hidden_size)), jnp.bfloat16)
    scores = policy_logits(params, hidden, num_viable, arch.text.rms_norm_eps)
    assert scores.shape == (4, arch.policy.max_budgets) and scores.dtype == jnp.float32
    assert np.isfinite(scores[:, :num_viable]).all() and np.isneginf(scores[:, num_viable:]).all()
    probabilities = jax.nn.softmax(scores)
    np.testing.assert_allclose(probabilities[:, :num_viable].sum(axis=1), 1, atol=1e-6)
    assert int(jnp.argmax(scores, axis=1).max()) < num_viable
