"""Masks that lengths and "causal" express completely, so that cuDNN needs no array of queries by keys."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from visor_jax.kernels.attention import AttentionMask
from visor_jax.kernels.attention import dot_product_attention as library

Row = list[int]


def mask_of(q: tuple[Row, Row], kv: tuple[Row, Row], *, causal: bool, active: bool | None = None) -> AttentionMask:
    """One sample's, of (segments, positions) of queries and keys."""
    (q_segments, q_positions), (kv_segments, kv_positions) = (
        [jnp.array([x], jnp.int32) for x in side] for side in (q, kv)
    )
    flags = None if active is None else jnp.array([active])
    return AttentionMask(q_positions, kv_positions, q_segments, kv_segments, flags, causal)


def with_lengths(mask: AttentionMask) -> np.ndarray:
    """Returns the mask that cuDNN's arguments express."""
    lengths = library.lengths_of(mask)
    query, key = np.arange(mask.q_segments.shape[1])[:, None], np.arange(mask.kv_segments.shape[1])
    allowed = (query < np.asarray(lengths.queries)[:, None, None]) & (key < np.asarray(lengths.keys)[:, None, None])
    return allowed & (key <= query) if mask.causal else allowed


REAL = ([1] * 6, [*range(6)])
PADDED = ([2] * 4 + [0] * 2, [3, 4, 8, 9, 0, 0])  # text around a picture that lies elsewhere


@pytest.mark.parametrize(
    ("q", "kv", "causal", "said"),
    [
        (REAL, REAL, True, True),
        (PADDED, PADDED, True, True),
        (REAL, ([1] * 4 + [0] * 2, [*range(6)]), True, True),
        (([1] * 3, [0] * 3), REAL, False, True),
        (([0] * 6, [0] * 6), REAL, False, True),
        (([1] * 3, [3, 4, 5]), REAL, True, False),  # the last queries of a stream
        (REAL, ([1] * 6, [0, 1, 2, 2, 3, 4]), True, False),  # a tie sees both ways
        (([1] * 6, [5] * 6), REAL, True, False),
        (([1] * 3 + [2] * 3, [*range(6)]), ([1] * 3 + [2] * 3, [*range(6)]), True, False),  # packed
        (([1, 0, 1, 1, 1, 1], [*range(6)]), REAL, True, False),  # padding in the middle
        (([1] * 3, [0] * 3), ([2] * 6, [0] * 6), False, False),  # strangers
        (REAL, ([1] * 2 + [0] * 4, [*range(6)]), True, True),  # more queries than keys
        (([1] * 4, [0, 1, 0, 0]), ([1, 1, 0, 0], [0, 1, 0, 0]), True, False),
    ],
)
def test_what_lengths_say(q, kv, causal, said):
    mask = mask_of(q, kv, causal=causal)
    assert bool(library.lengths_of(mask).suffice) == said
    if said:
        np.testing.assert_array_equal(with_lengths(mask), mask.as_array())
    assert not library.lengths_of(dataclasses.replace(mask, q_shared_segments=mask.q_segments)).suffice
    off = dataclasses.replace(mask, active=jnp.array([False]))
    assert library.lengths_of(off).queries == 0 and not np.any(with_lengths(off))


segments = st.lists(st.integers(0, 1), min_size=4, max_size=4)
places = st.lists(st.integers(0, 3), min_size=4, max_size=4)
leading = segments.map(lambda row: sorted(row, reverse=True))  # or hardly any would be told by lengths


@settings(max_examples=300, deadline=None)
@given(leading | segments, leading | segments, places, places | st.none(), st.booleans(), st.booleans() | st.none())
def test_lengths_never_say_more_than_the_mask(q, kv, q_places, kv_places, causal, active):
    mask = mask_of((q, q_places), (kv, q_places if kv_places is None else kv_places), causal=causal, active=active)
    if library.lengths_of(mask).suffice:
        np.testing.assert_array_equal(with_lengths(mask), mask.as_array())


def test_odd_lengths_get_one_token_of_padding():
    mask = mask_of(([1] * 5, [*range(5)]), ([1] * 5, [*range(5)]), causal=True, active=True)
    q, k, v, padded = library.pad_to_even(*(jnp.ones((1, 5, 2, 8)) * x for x in (1, 2, 3)), mask)
    assert q.shape == k.shape == v.shape == (1, 6, 2, 8)
    np.testing.assert_array_equal(padded.as_array()[:, :5, :5], mask.as_array())
    assert not np.any(padded.as_array()[:, 5]) and not np.any(padded.as_array()[:, :, 5])
    assert padded.active is not None and library.pad_to_even(q, k, v, padded)[0].shape == q.shape


def test_no_array_of_queries_by_keys_where_lengths_suffice():
    """The program contains both branches; a batch takes one of them."""
    seen: list[str] = []

    def run(q, k, v, allowed=None, **how):
        jax.debug.callback(lambda: seen.append("lengths" if allowed is None else "array"))
        return library.fused(q, k, v, allowed, implementation="xla", **how)

    q = jnp.ones((1, 6, 2, 8))
    for row in (PADDED, ([1] * 3 + [2] * 3, [*range(6)])):
        jax.block_until_ready(
            jax.jit(lambda mask: library.with_lengths(run, q, q, q, mask))(mask_of(row, row, causal=True))
        )
    jax.effects_barrier()
    assert seen == ["lengths", "array"]
