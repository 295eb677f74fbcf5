"""Merged partial results over parts of the keys equal attention over all keys."""

from __future__ import annotations

import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from visor_jax.kernels.attention.merge_partials import merge_partials

NUM_CHUNKS, KEYS, ROWS, SIZE = 3, 4, 5, 2


def softmax(logits: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [R,S] over values [S,D]; 0 and plus infinity for a row without a key."""
    no_keys = np.all(np.isneginf(logits), axis=1)
    max_logit = np.where(no_keys, 0, logits.max(axis=1))
    weights = np.exp(logits - max_logit[:, None])
    denominator = np.where(no_keys, 1, weights.sum(axis=1))
    return weights @ values / denominator[:, None], np.where(no_keys, np.inf, max_logit + np.log(denominator))


@settings(max_examples=100, deadline=None)
@given(numpy_strategies.arrays(bool, (ROWS, NUM_CHUNKS * KEYS)), st.integers(0, 99), st.sampled_from([1, 30, 3000]))
def test_merged_chunks_equal_softmax_over_all_keys(allowed, seed, scale):
    rng = np.random.default_rng(seed)
    logits = np.where(allowed, rng.normal(size=allowed.shape) * scale, -np.inf)
    values = rng.normal(size=(NUM_CHUNKS * KEYS, SIZE))
    outs, log_sums = zip(
        *(softmax(logits[:, chunk], values[chunk]) for chunk in np.split(np.arange(NUM_CHUNKS * KEYS), NUM_CHUNKS)),
        strict=True,
    )
    out, log_sum = merge_partials(jnp.stack(outs)[None, :, None], jnp.stack(log_sums)[None, :, None])
    expected, wanted_log_sum = softmax(logits, values)
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(log_sum[0, 0], wanted_log_sum, rtol=1e-5, atol=1e-5)


def test_what_is_not_seen_may_hold_nan_and_what_is_seen_may_not():
    outs, log_sums = np.ones((1, 2, 1, 2, SIZE)), np.zeros((1, 2, 1, 2))
    outs[0, 0, 0, 0], log_sums[0, 0, 0, 0] = np.nan, np.inf
    outs[0, 0, 0, 1] = np.nan
    out, _ = merge_partials(jnp.asarray(outs), jnp.asarray(log_sums))
    np.testing.assert_array_equal(out[0, 0], [[1, 1], [np.nan, np.nan]])
