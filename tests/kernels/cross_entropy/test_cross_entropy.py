"""Every implementation of cross-entropy against a float64 definition written out here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import visor_jax.kernels
from visor_jax.kernels import cross_entropy
from visor_jax.kernels.cross_entropy import api, base

ROWS, SIZE, VOCABULARY = 12, 5, 17


@pytest.fixture(params=list(api.IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> api.Implementation:
    return request.param


class Inputs(NamedTuple):
    hidden: np.ndarray
    head: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    grad: np.ndarray  # cotangent of the losses


def random_inputs(seed: int = 0) -> Inputs:
    """Every third row weighs nothing; about half of the labels are the likeliest."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(ROWS, SIZE)), rng.normal(size=(SIZE, VOCABULARY))
    labels = np.where(rng.random(ROWS) < 0.5, (hidden @ head).argmax(axis=1), rng.integers(0, VOCABULARY, ROWS))
    weights = np.where(np.arange(ROWS) % 3 == 2, 0, rng.uniform(0.2, 3, ROWS))
    hidden, head, weights, grad = (x.astype(np.float32) for x in (hidden, head, weights, rng.normal(size=ROWS)))
    return Inputs(hidden, head, labels.astype(np.int32), weights, grad)


def expected(inputs: Inputs) -> tuple[np.ndarray, ...]:
    """Weighted losses, correctness, gradients of hidden and head for the cotangent `grad` [N], in float64."""
    hidden, head, labels, weights, grad = inputs
    counted = weights != 0
    hidden = np.where(counted[:, None], hidden, 0).astype(np.float64)
    labels = np.where(counted, labels, 0)
    logits = hidden @ head.astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    logs = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    losses = -logs[np.arange(len(labels)), labels] * weights
    dlogits = (np.exp(logs) - np.eye(head.shape[1])[labels]) * (weights * grad)[:, None]
    return losses, (logits.argmax(axis=1) == labels) & counted, dlogits @ head.T, hidden.T @ dlogits


@functools.partial(jax.jit, static_argnames="implementation")
def computed(inputs: Inputs, implementation: api.Implementation):
    """What `expected` gives."""
    labels, weights = jnp.asarray(inputs.labels), jnp.asarray(inputs.weights)

    def losses(hidden, head):
        return cross_entropy(hidden, head, labels, weights, implementation=implementation)

    found, pull, correct = jax.vjp(losses, inputs.hidden, inputs.head, has_aux=True)
    return found, correct, *pull(inputs.grad)


def agree(found, wanted, tolerance: float = 2e-6) -> None:
    for name, x, y in zip(("losses", "correct", "dhidden", "dhead"), found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=tolerance, atol=tolerance, err_msg=name)


@hypothesis.settings(
    max_examples=20, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_losses_and_gradients(implementation, seed):
    inputs = random_inputs(seed)
    agree(computed(inputs, implementation), expected(inputs))


def test_rows_of_weight_zero_may_hold_anything(implementation):
    inputs = random_inputs()
    idle = inputs.weights == 0
    inputs.hidden[idle], inputs.labels[idle] = np.nan, -100
    found = computed(inputs, implementation)
    agree(found, expected(inputs))
    losses, correct, dhidden, _ = found
    assert not np.any(losses[idle]) and not np.any(correct[idle]) and not np.any(dhidden[idle])


def test_large_logits_stay_finite(implementation):
    inputs = random_inputs()
    inputs = inputs._replace(hidden=inputs.hidden * 1000, head=inputs.head * 1000)
    found = computed(inputs, implementation)
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found[0], expected(inputs)[0], rtol=1e-5, atol=1)


def test_bfloat16_is_accumulated_in_float32(implementation):
    inputs = random_inputs()
    low = inputs._replace(hidden=np.asarray(inputs.hidden, jnp.bfloat16), head=np.asarray(inputs.head, jnp.bfloat16))
    rounded = low._replace(hidden=np.asarray(low.hidden, np.float32), head=np.asarray(low.head, np.float32))
    losses, _, dhidden, dhead = computed(low, implementation)
    assert losses.dtype == jnp.float32 and dhidden.dtype == dhead.dtype == jnp.bfloat16
    np.testing.assert_allclose(losses, expected(rounded)[0], rtol=1e-5, atol=1e-5)


def test_the_first_of_equal_logits_counts(implementation):
    inputs = random_inputs()
    inputs = inputs._replace(head=np.zeros_like(inputs.head), labels=np.arange(ROWS, dtype=np.int32))
    _, correct, _, _ = computed(inputs, implementation)
    assert correct.tolist() == [True] + [False] * (ROWS - 1)


REFUSED = {
    "hidden must have 2 axes": lambda h, w, y, m: (h[0], w, y, m),
    "head must have 5 rows": lambda h, w, y, m: (h, w.T, y, m),
    "labels must have shape": lambda h, w, y, m: (h, w, y[1:], m),
    "weights must have shape": lambda h, w, y, m: (h, w, y, m[1:]),
    "labels must be integers": lambda h, w, y, m: (h, w, y.astype(np.float32), m),
    "hidden must be floating": lambda h, w, y, m: (h.astype(np.int32), w, y, m),
    "weights must be floating": lambda h, w, y, m: (h, w, y, m != 0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_by_name(message, implementation):
    hidden, head, labels, weights = map(jnp.asarray, REFUSED[message](*random_inputs()[:4]))
    with pytest.raises(ValueError, match=message):
        cross_entropy(hidden, head, labels, weights, implementation=implementation)


def test_an_unknown_implementation_is_refused_with_the_list():
    force: Callable[..., tuple[jax.Array, jax.Array]] = cross_entropy
    with pytest.raises(ValueError, match="'pallas' does not exist; known are xla"):
        force(*random_inputs()[:4], implementation="pallas")


def test_the_function_and_the_folder_of_the_same_name():
    assert callable(visor_jax.kernels.cross_entropy) and visor_jax.kernels.cross_entropy is not base.cross_entropy
