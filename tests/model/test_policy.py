"""The policy's choice is monotonic in the dial, and always a viable budget."""

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
SCORES = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
COSTS = st.floats(1, 2.0**50, width=32)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    scores=st.lists(st.lists(SCORES, min_size=5, max_size=5), min_size=3, max_size=3),
    costs=st.lists(st.lists(COSTS, min_size=5, max_size=5), min_size=3, max_size=3),
    dials=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=2, max_size=6),
)
def test_a_higher_dial_never_picks_a_cheaper_budget(scores, costs, dials) -> None:
    """For no sample, hence not on average, whatever the policy says and the budgets cost, near-ties included."""
    scores, costs = np.array(scores, np.float32), np.array(costs, np.float32)
    before = np.zeros(3)
    for dial in sorted(dials):
        found = np.asarray(CHOOSE(scores, costs, np.float32(dial)))
        now = np.take_along_axis(costs, found[:, None], axis=1)[:, 0].astype(float)
        assert (now >= before).all() and now.mean() >= before.mean()
        before = now


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    scores=st.lists(st.integers(-40, 40), min_size=5, max_size=5),
    powers=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    dial=st.integers(-8, 8),
)
def test_the_choice_is_the_best_shifted_score_and_of_equals_the_cheaper(scores, powers, dial) -> None:
    """Costs are powers of two and scores multiples of log 2, so that ties are ties."""
    unit = float(np.log(np.float32(2)))
    costs = np.float32(2) ** np.array(powers)
    found = int(CHOOSE(np.array([scores], np.float32) * np.float32(unit), costs, float(dial))[0])
    shifted = [score + dial * (power - min(powers)) for score, power in zip(scores, powers, strict=True)]
    best = [index for index in range(5) if shifted[index] == max(shifted)]
    near = [index for index in range(5) if shifted[index] >= max(shifted) - 1e-3]
    assert found in near
    if dial == 0:
        assert found == min(best, key=lambda index: (powers[index], index))


def test_costs_may_be_those_of_all_samples_or_of_each() -> None:
    scores = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    assert CHOOSE(scores, jnp.array([1.0, 2.0]), 2.0).tolist() == [1, 1]
    assert CHOOSE(scores, jnp.array([[1.0, 2.0], [2.0, 1.0]]), -2.0).tolist() == [0, 1]


def test_the_ends_of_the_dial() -> None:
    scores, costs = jnp.array([[0.0, 3.0, -1.0], [5.0, 0.0, 0.0]]), jnp.array([1.0, 2.0, 4.0])
    assert CHOOSE(scores, costs).tolist() == [1, 0], "at 0 the policy's choice"
    assert CHOOSE(scores, costs, 100.0).tolist() == [2, 2], "highest dial: the most expensive budget"
    assert CHOOSE(scores, costs, -100.0).tolist() == [0, 0], "lowest dial: the cheapest budget"


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
