"""Kinds of blocks: never wrong, exact for the relevant masks, and without needless fetches."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax.kernels.attention import AttentionMask
from visor_jax.kernels.attention.blocks import ALL, NOTHING, block_kinds, pad_mask, visits

Q_BLOCK, KV_BLOCK = 4, 8


def in_blocks(mask: AttentionMask) -> np.ndarray:
    """Returns which query attends to which key as [B, n, m, pairs of a block]; padding takes no part."""
    allowed = np.asarray(mask.as_array())
    batch, q_length, kv_length = allowed.shape
    allowed = np.pad(allowed, ((0, 0), (0, -q_length % Q_BLOCK), (0, -kv_length % KV_BLOCK)))
    split = allowed.reshape(batch, -(-q_length // Q_BLOCK), Q_BLOCK, -(-kv_length // KV_BLOCK), KV_BLOCK)
    return split.swapaxes(2, 3).reshape(*split.shape[:2], split.shape[3], -1)


def kinds_of(mask: AttentionMask) -> np.ndarray:
    return np.asarray(block_kinds(pad_mask(mask, Q_BLOCK, KV_BLOCK), Q_BLOCK, KV_BLOCK))


def integers(length: int, low: int, high: int) -> st.SearchStrategy[np.ndarray]:
    return numpy_strategies.arrays(np.int32, (2, length), elements=st.integers(low, high))


@hypothesis.given(
    mask=st.builds(
        AttentionMask,
        q_positions=integers(11, 0, 5),
        kv_positions=integers(18, 0, 5),
        q_segments=integers(11, -1, 2),
        kv_segments=integers(18, -1, 2),
        active=st.none() | numpy_strategies.arrays(bool, (2,)),
        causal=st.booleans(),
        q_shared_segments=st.none() | integers(11, -1, 2),
    )
)
def test_nothing_and_all_are_certain(mask):
    mask = jax.tree.map(jnp.asarray, mask)
    kinds, pairs = kinds_of(mask), in_blocks(mask)
    assert not pairs[kinds == NOTHING].any()
    assert pairs[kinds == ALL].all()


def row(*parts: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(np.concatenate(parts), jnp.int32)[None]


STREAM_POSITIONS = row(np.arange(14, 62), np.arange(14), np.arange(62, 80))  # [V; T]: text before and after V
PACKED = row(np.full(20, 1), np.full(28, 2), np.full(24, 3), np.zeros(8, int))
ONES = jnp.ones_like(STREAM_POSITIONS)
PLAIN = AttentionMask(row(np.arange(80)), row(np.arange(80)), ONES, ONES)
STREAM = AttentionMask(STREAM_POSITIONS, STREAM_POSITIONS, ONES, ONES)
# Turns 11 and 12 of sample 10, turns 21 and 22 of sample 20, whose tokens come in this order.
TURNS = row(np.full(24, 10), np.full(16, 11), np.full(8, 12), np.full(16, 20), np.full(8, 21), np.full(8, 22))
WITH_TURNS = AttentionMask(
    *[row(np.arange(40), np.arange(24, 32), np.arange(24), np.arange(16, 24))] * 2,
    *[TURNS] * 2,
    q_shared_segments=TURNS // 10 * 10,
)


@pytest.mark.parametrize(
    "mask",
    [
        PLAIN,
        dataclasses.replace(PLAIN, causal=False),
        dataclasses.replace(PLAIN, q_segments=PACKED, kv_segments=PACKED),
        dataclasses.replace(PLAIN, active=jnp.zeros(1, bool)),
        STREAM,
        dataclasses.replace(STREAM, kv_segments=row(np.zeros(48, int), np.ones(32, int))),  # a slot that is off
        WITH_TURNS,
        dataclasses.replace(WITH_TURNS, causal=False),
    ],
    ids=["causal", "both ways", "packed", "off", "stream", "stream without V", "turns", "turns, both ways"],
)
def test_exact_where_tokens_come_in_order(mask):
    kinds, pairs = kinds_of(mask), in_blocks(mask)
    np.testing.assert_array_equal(kinds != NOTHING, pairs.any(axis=3))
    np.testing.assert_array_equal(kinds == ALL, pairs.all(axis=3))


@hypothesis.given(kinds=numpy_strategies.arrays(np.int32, (2, 4, 5), elements=st.integers(0, 2)))
def test_only_blocks_with_work_are_fetched(kinds):
    """Walking the grid as the hardware does: a fetch is a change of column, and there is one per block with work, or
    none where the last one is still there."""
    rows, cells = (np.asarray(x) for x in visits(jnp.asarray(kinds)))
    cells, rows = cells.reshape(kinds.shape), rows.reshape(kinds.shape[:2])
    np.testing.assert_array_equal(cells & 3, kinds)
    for kind, column, outer in zip(kinds, cells >> 2, rows, strict=True):
        working = kind.reshape(-1) != NOTHING
        columns = column.reshape(-1)
        np.testing.assert_array_equal(columns[working], np.nonzero(kind != NOTHING)[1])
        fetches = 1 + np.count_nonzero(np.diff(columns))
        wanted = 1 + np.count_nonzero(np.diff(columns[working])) if working.any() else 1
        assert fetches == wanted
        busy = (kind != NOTHING).any(axis=1)
        np.testing.assert_array_equal(outer[busy], np.nonzero(busy)[0])
        assert 1 + np.count_nonzero(np.diff(outer)) == max(busy.sum(), 1)
