"""Which blocks of queries see which blocks of keys, from the bounds of their positions and segments.

In: an `AttentionMask` and two block lengths. Out: small integer tables [B, blocks of queries, blocks of keys] that the
Pallas kernels read as scalars, so that a block in which nothing is visible is neither fetched nor computed. They
never build an array of queries by keys.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from visor_jax.kernels.attention.base import AttentionMask

# What a block of queries sees of a block of keys.
NOTHING, SOME, ALL = 0, 1, 2

INT32 = jnp.iinfo(jnp.int32)


class Bounds(NamedTuple):
    """Bounds [B, n] of blocks of tokens, with one more axis where queries and keys are compared.

    Real tokens are those of a segment; low > high where a block has none.
    """

    segment_low: Int[Array, "B ..."]  # of the real tokens
    segment_high: Int[Array, "B ..."]
    position_low: Int[Array, "B ..."]
    position_high: Int[Array, "B ..."]
    has_padding: Bool[Array, "B ..."]  # whether any token is not real


def block_kinds(mask: AttentionMask, q_block: int, kv_block: int) -> Int[Array, "B n m"]:
    """NOTHING, SOME or ALL for every block of `q_block` queries against every block of `kv_block` keys.

    NOTHING and ALL are exact; SOME may contain nothing or everything, where blocks mix segments or positions overlap.
    Lengths are multiples of the blocks and every sample is active (see `pad_mask`).
    """
    kv = bounds(mask.kv_segments, mask.kv_positions, kv_block)
    kinds = _kinds(bounds(mask.q_segments, mask.q_positions, q_block), kv, mask.causal)
    if mask.q_shared_segments is None:
        return kinds
    return jnp.maximum(kinds, _kinds(bounds(mask.q_shared_segments, mask.q_positions, q_block), kv, mask.causal))


def _kinds(q: Bounds, kv: Bounds, causal: bool) -> Int[Array, "B n m"]:
    """The kind of every pair of blocks, from their bounds, where each query sees the keys of one segment."""
    q, kv = Bounds(*(x[:, :, None] for x in q)), Bounds(*(x[:, None, :] for x in kv))
    some = (q.segment_low <= kv.segment_high) & (kv.segment_low <= q.segment_high)
    every = ~q.has_padding & ~kv.has_padding
    for bound in (q.segment_high, kv.segment_low, kv.segment_high):
        every &= bound == q.segment_low
    if causal:
        some &= kv.position_low <= q.position_high
        every &= kv.position_high <= q.position_low
    return jnp.where(some, jnp.where(every, ALL, SOME), NOTHING).astype(jnp.int32)


def bounds(segments: Int[Array, "B T"], positions: Int[Array, "B T"], block: int) -> Bounds:
    """The bounds of each block of `block` tokens."""
    segments, positions = (x.reshape(x.shape[0], -1, block) for x in (segments, positions))
    real = segments != 0

    def low(x: Array) -> Array:
        return jnp.min(jnp.where(real, x, INT32.max), axis=2)

    def high(x: Array) -> Array:
        return jnp.max(jnp.where(real, x, INT32.min), axis=2)

    return Bounds(low(segments), high(segments), low(positions), high(positions), ~jnp.all(real, axis=2))


class Visits(NamedTuple):
    """The steps of a grid (batch, rows, columns), column by column, as scalars that a kernel and its index maps read.

    `cells` [B*n*m]: at each step, 4 times the column to hold in memory plus the kind of the block. A step
    without work keeps the column that is already in memory, so that nothing is fetched. `rows` [B*n]: the same for
    arrays that are read once per row.
    """

    rows: Int[Array, " rows"]
    cells: Int[Array, " cells"]


def visits(kinds: Int[Array, "B n m"]) -> Visits:
    """The order of fetching for a grid that runs over the rows of `kinds` and, within each, its columns."""
    batch, rows, columns = kinds.shape
    flat = kinds.reshape(batch, rows * columns)
    steps = jnp.arange(rows * columns, dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(flat != NOTHING, steps, -1), axis=1)
    first = jnp.argmax(flat != NOTHING, axis=1, keepdims=True).astype(jnp.int32)  # 0 where there is none
    held = jnp.where(latest < 0, first, latest)
    last_of_row = held.reshape(batch, rows, columns)[:, :, -1]
    return Visits((last_of_row // columns).reshape(-1), (held % columns * 4 + flat).reshape(-1))


def pad_mask(mask: AttentionMask, q_block: int, kv_block: int) -> AttentionMask:
    """The same mask in int32 at lengths that are multiples of the blocks, with `active` folded into the segments."""

    def padded(x: Array, block: int) -> Array:
        return jnp.pad(x.astype(jnp.int32), ((0, 0), (0, -x.shape[1] % block)))

    def of_active(segments: Array) -> Array:
        return segments if mask.active is None else jnp.where(mask.active[:, None], segments, 0)

    shared = mask.q_shared_segments
    return dataclasses.replace(
        mask,
        q_positions=padded(mask.q_positions, q_block),
        kv_positions=padded(mask.kv_positions, kv_block),
        q_segments=padded(of_active(mask.q_segments), q_block),
        kv_segments=padded(of_active(mask.kv_segments), kv_block),
        active=None,
        q_shared_segments=None if shared is None else padded(of_active(shared), q_block),
    )
