"""Sampling: the best token, or one drawn by probability within top-p, reproducibly."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.errors import RequestError
from visor_jax.generate.sampling import MAX_SEED, Sampling, select

FORBIDDEN = 2
LOGITS = np.log(np.array([[0.5, 0.25, 9.0, 0.15, 0.1], [0.1, 0.1, 9.0, 0.1, 0.7]], np.float32))
SELECT = testing.quick_jit(select, static_argnames="forbidden")
# Draws at steps 0 .. 1999 in one program.
MANY = testing.quick_jit(
    lambda logits, draw: jax.lax.map(lambda step: select(logits, draw, step, FORBIDDEN), np.arange(2000))
)


def frequencies(temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    """Returns how often each token is drawn, [rows, vocabulary]."""
    drawn = np.asarray(MANY(LOGITS, Sampling(temperature, top_p, seed).draw()))  # [2000, B]
    return np.stack([np.bincount(row, minlength=5) for row in drawn.T]) / len(drawn)


def test_the_best_token_is_never_the_forbidden_one() -> None:
    assert Sampling().draw() is None
    assert SELECT(LOGITS, None, 0, forbidden=FORBIDDEN).tolist() == [0, 4]


def test_draws_follow_the_probabilities() -> None:
    expected = [[0.5, 0.25, 0, 0.15, 0.1], [0.1, 0.1, 0, 0.1, 0.7]]
    np.testing.assert_allclose(frequencies(1.0, 1.0), expected, atol=0.04)


def test_temperature_sharpens_and_flattens() -> None:
    weights = np.exp(LOGITS.astype(float) / 0.5)
    weights[:, FORBIDDEN] = 0
    np.testing.assert_allclose(frequencies(0.5, 1.0), weights / weights.sum(axis=1, keepdims=True), atol=0.04)
    assert frequencies(1e-30, 1.0).tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]], "toward 0 it selects the best token"
    assert frequencies(1e30, 1.0)[0, [0, 1, 3, 4]] == pytest.approx([0.25] * 4, abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [0]), (0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 3]), (0.999, [0, 1, 3, 4])],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[int]) -> None:
    sampled = frequencies(1.0, top_p)[0]
    assert np.flatnonzero(sampled).tolist() == kept
    probabilities = np.array([0.5, 0.25, 0, 0.15, 0.1])[kept]
    np.testing.assert_allclose(sampled[kept], probabilities / probabilities.sum(), atol=0.04)


def test_a_seed_is_an_answer() -> None:
    draws = {seed: np.asarray(MANY(LOGITS, Sampling(1.0, 1.0, seed).draw())) for seed in (0, 1, MAX_SEED)}
    for seed, tokens in draws.items():
        np.testing.assert_array_equal(tokens, MANY(LOGITS, Sampling(1.0, 1.0, seed).draw()))
    assert not np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[MAX_SEED])


@settings(max_examples=20)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
    temperature=st.floats(0, 1e6),
    top_p=st.floats(0, 1, exclude_min=True),
)
def test_a_row_draws_the_same_token_in_a_batch(values: list[float], temperature: float, top_p: float) -> None:
    draw, row = Sampling(temperature, top_p, seed=7).draw(), np.array([values], np.float32)
    alone = SELECT(row, draw, 3, forbidden=FORBIDDEN)
    assert 0 <= int(alone[0]) < 5 and int(alone[0]) != FORBIDDEN
    in_batch = SELECT(np.concatenate([LOGITS, row]), draw, 3, forbidden=FORBIDDEN)
    assert int(in_batch[2]) == int(alone[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1: expected 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_p": 0.0}, r"top_p=0\.0: expected more than 0 and at most 1"),
        ({"top_p": 1.01}, r"top_p=1\.01"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"seed": -1}, "seed=-1: expected 0 to"),
        ({"seed": MAX_SEED + 1}, "seed="),
    ],
)
def test_settings_outside_their_range(settings: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [1e-300, 1e30, 3e38, 1e39, 1e300])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_extreme_temperatures_draw_what_may_be_drawn(temperature: float, top_p: float) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9)), jnp.float32)
    draws = {int(select(logits, Sampling(temperature, top_p, seed).draw(), 0, 3)[0]) for seed in range(40)}
    assert 3 not in draws
    assert len(draws) == 1 if temperature < 1 else len(draws) >= 3
