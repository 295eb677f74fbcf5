"""Attention in plain XLA without an array of queries by keys: one block of queries and one chunk of keys at a time.

In and out: as `base.attention`. For each block of queries a loop with a running softmax visits only the chunks in which
it sees something: first fully visible chunks, which need no mask, then the rest. Grouped queries are
folded into rows, so that a step is one matrix product per KV head. The backward pass recomputes each step's weights
from the saved log-sum-exp: memory is that of one step, forward and backward. The last
block and chunk are padded.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from visor_jax.kernels.attention.base import (
    MASKED_LOGIT,
    AnyArray,
    AttentionMask,
    fold,
    heads_first,
    mask_logits,
    named,
    unfold,
    validated,
)
from visor_jax.kernels.attention.blocks import ALL, NOTHING, block_kinds, pad_mask

# Rows of logits in a step, all heads counted, and keys: 8 MiB in float32 stay in a CPU's cache.
ROWS, CHUNK = 2048, 1024


def attention(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """`base.attention` at the memory of one step; reverse-mode gradients only.

    Raises:
      ValueError: an argument of the wrong shape or dtype; the message names it.
    """
    q, k, v, mask = validated(q, k, v, mask)
    return _attention(q, k, v, mask)


class _Queries(NamedTuple):
    """Blocks of queries, n of them: rows [B,n,K,R,D] with R = G*T, scaled; positions and segments [B,n,T]."""

    rows: Array
    positions: Array
    segments: Array
    shared_segments: Array | None


class _Keys(NamedTuple):
    """Chunks of keys, m of them: k, v [B,m,K,C,D]; positions and segments [B,m,C]."""

    k: Array
    v: Array
    positions: Array
    segments: Array


class _Visits(NamedTuple):
    """Chunks in the order [B,n,m] in which each block of queries visits them; counts [B,n] of fully visible and of all
    visited chunks."""

    order: Array
    whole: Array
    count: Array


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask):
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q), (q, k, v, mask, None, None)
    queries, keys, visits = _blocks(q, k, v, mask)
    forward = partial(_forward_sample, causal=mask.causal)
    out, log_sum = jax.lax.map(lambda sample: forward(*sample), (queries, keys, visits))
    out, log_sum = named((out, log_sum))
    return _unblocked(out, q.shape).astype(q.dtype), (q, k, v, mask, out, log_sum)


def _forward_sample(queries: _Queries, keys: _Keys, visits: _Visits, causal: bool) -> tuple[Array, Array]:
    """One sample's output as rows [n,K,R,D] and log-sum-exp [n,K,R], plus infinity where nothing is seen."""

    def of_block(block: tuple[_Queries, _Visits]) -> tuple[Array, Array]:
        rows = block[0].rows

        def step(chunk: Array, keys: _Keys, allowed: Array | None, carry):
            del chunk
            running_max, denominator, acc, query_valid = carry
            logits = _logits(rows, keys, allowed)
            new_max = jnp.maximum(running_max, jnp.max(logits, axis=-1))
            # Until a row sees a key, its maximum is MASKED_LOGIT and its sums are meaningless. Its first key scales
            # them by exp(MASKED_LOGIT - max) = 0; a row that never sees one is set to 0 below.
            weights = jnp.exp(logits - new_max[..., None])
            shrink = jnp.exp(running_max - new_max)
            denominator = denominator * shrink + jnp.sum(weights, axis=-1)
            acc = acc * shrink[..., None] + jnp.einsum("KRC,KCD->KRD", weights, keys.v)
            return new_max, denominator, acc, query_valid | (True if allowed is None else jnp.any(allowed, axis=1))

        zeros = jnp.zeros(rows.shape[:2], rows.dtype)
        start = (zeros + MASKED_LOGIT, zeros, jnp.zeros_like(rows), jnp.zeros(block[0].positions.shape, bool))
        running_max, denominator, acc, query_valid = _over_chunks(step, start, *block, keys, causal)
        query_valid = jnp.tile(query_valid, rows.shape[1] // query_valid.shape[0])  # [R]
        denominator = jnp.where(query_valid, denominator, 1)
        # Plus infinity makes every recomputed weight of a row that sees nothing exactly 0.
        return jnp.where(query_valid[:, None], acc / denominator[..., None], 0), jnp.where(
            query_valid, running_max + jnp.log(denominator), jnp.inf
        )

    return jax.lax.map(of_block, (queries, visits))


def _backward(saved, grad: Array):
    q, k, v, mask, out, log_sum = saved
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)  # integers and booleans have none
    if out is None:
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), no_gradient
    queries, keys, visits = _blocks(q, k, v, mask)
    query_valid = (log_sum != jnp.inf)[..., None]
    queries = queries._replace(rows=jnp.where(query_valid, queries.rows, 0))
    grad_rows = jnp.where(query_valid, _block_rows(grad, k.shape[2]), 0)
    delta = jnp.sum(grad_rows * out, axis=-1)  # [B,n,K,R]
    backward = partial(_backward_sample, causal=mask.causal)
    samples = (queries, grad_rows, log_sum, delta, keys, visits)
    grad_q, grad_k, grad_v = jax.lax.map(lambda sample: backward(*sample), samples)
    grad_q = _unblocked(grad_q, q.shape) * q.shape[3] ** -0.5
    return (
        grad_q.astype(q.dtype),
        _unchunked(grad_k, k.shape[1]).astype(k.dtype),
        _unchunked(grad_v, v.shape[1]).astype(v.dtype),
        no_gradient,
    )


def _backward_sample(
    queries: _Queries, grad_rows: Array, log_sum: Array, delta: Array, keys: _Keys, visits: _Visits, causal: bool
) -> tuple[Array, Array, Array]:
    """One sample's gradients of rows [n,K,R,D], keys and values [m,K,C,D]."""

    def of_block(grads_kv: tuple[Array, Array], block):
        queries, grad_rows, log_sum, delta, visits = block
        rows = queries.rows

        def step(chunk: Array, keys: _Keys, allowed: Array | None, carry):
            grad_q, grad_k, grad_v = carry
            # Transposed: then only one of the five products sums over its operands' leading axis, the slow way on CPUs.
            weights = jnp.exp(_transposed_logits(rows, keys, allowed) - log_sum[:, None])
            grad_weights = jnp.einsum("KCD,KRD->KCR", keys.v, grad_rows)
            grad_logits = weights * (grad_weights - delta[:, None])
            grad_k = grad_k.at[chunk].add(jnp.einsum("KCR,KRD->KCD", grad_logits, rows))
            grad_v = grad_v.at[chunk].add(jnp.einsum("KCR,KRD->KCD", weights, grad_rows))
            return grad_q + jnp.einsum("KCR,KCD->KDR", grad_logits, keys.k), grad_k, grad_v

        start = (jnp.zeros_like(rows).swapaxes(1, 2), *grads_kv)
        grad_q, grad_k, grad_v = _over_chunks(step, start, queries, visits, keys, causal)
        return (grad_k, grad_v), grad_q.swapaxes(1, 2)

    start = (jnp.zeros_like(keys.k), jnp.zeros_like(keys.v))
    (grad_k, grad_v), grad_q = jax.lax.scan(of_block, start, (queries, grad_rows, log_sum, delta, visits))
    return grad_q, grad_k, grad_v


_attention.defvjp(_forward, _backward)


# --- one block of queries against chunks of keys ----------------------------------------------------------------------


def _over_chunks(step: Any, start: Any, queries: _Queries, visits: _Visits, keys: _Keys, causal: bool) -> Any:
    """Runs `step(index, keys, allowed, carry)` over the chunks that the block visits; `allowed` is [T,C], or None for a
    fully visible chunk."""

    def whole(n, carry):
        chunk = visits.order[n]
        return step(chunk, jax.tree.map(lambda x: x[chunk], keys), None, carry)

    def partly(n, carry):
        chunk = visits.order[n]
        of_chunk = jax.tree.map(lambda x: x[chunk], keys)
        block = (queries.positions, of_chunk.positions, queries.segments, of_chunk.segments)
        q_positions, kv_positions, q_segments, kv_segments = (x[None] for x in block)
        shared = None if queries.shared_segments is None else queries.shared_segments[None]
        mask = AttentionMask(q_positions, kv_positions, q_segments, kv_segments, None, causal, shared)
        allowed = mask.as_array()[0]
        # Keys that none of these queries sees may hold NaN, and 0 * NaN is NaN.
        key_used = jnp.any(allowed, axis=0)[:, None]
        of_chunk = of_chunk._replace(k=jnp.where(key_used, of_chunk.k, 0), v=jnp.where(key_used, of_chunk.v, 0))
        return step(chunk, of_chunk, allowed, carry)

    carry = jax.lax.fori_loop(0, visits.whole, whole, start)
    return jax.lax.fori_loop(visits.whole, visits.count, partly, carry)


def _logits(rows: Array, keys: _Keys, allowed: Array | None) -> Array:
    """[K,R,C], masked where not everything is allowed."""
    logits = jnp.einsum("KRD,KCD->KRC", rows, keys.k)
    return logits if allowed is None else mask_logits(logits[None], allowed[None])[0]


def _transposed_logits(rows: Array, keys: _Keys, allowed: Array | None) -> Array:
    """The same as [K,C,R]."""
    logits = jnp.einsum("KCD,KRD->KCR", keys.k, rows)
    if allowed is None:
        return logits
    by_head = logits.reshape(*logits.shape[:2], -1, allowed.shape[0])
    return jnp.where(allowed.T[:, None], by_head, MASKED_LOGIT).reshape(logits.shape)


# --- into blocks and back ---------------------------------------------------------------------------------------------


def _blocks(q: Array, k: Array, v: Array, mask: AttentionMask) -> tuple[_Queries, _Keys, _Visits]:
    q_block, chunk = _balanced(q.shape[1], max(1, ROWS // q.shape[2])), _balanced(k.shape[1], CHUNK)
    padded = pad_mask(mask, q_block, chunk)
    rows = _block_rows(q, k.shape[2]) * q.shape[3] ** -0.5
    in_blocks = padded.map_queries(lambda x: x.reshape(x.shape[0], -1, q_block))
    kv_positions, kv_segments = (x.reshape(x.shape[0], -1, chunk) for x in (padded.kv_positions, padded.kv_segments))
    queries = _Queries(rows, in_blocks.q_positions, in_blocks.q_segments, in_blocks.q_shared_segments)
    keys = _Keys(_chunks(k, chunk), _chunks(v, chunk), kv_positions, kv_segments)
    kinds = block_kinds(padded, q_block, chunk)
    visits = _Visits(jnp.argsort(-kinds, axis=-1), jnp.sum(kinds == ALL, axis=-1), jnp.sum(kinds != NOTHING, axis=-1))
    return queries, keys, visits


def _balanced(length: int, limit: int) -> int:
    """The smallest block length that covers `length` in the fewest blocks of at most `limit` tokens."""
    return -(-length // -(-length // limit))


def _block_rows(x: Array, kv_heads: int) -> Array:
    """[B,T,H,D] as rows [B,n,K,G*T,D], widened; the last block is padded with zeros."""
    batch, length, *heads = x.shape
    block = _balanced(length, max(1, ROWS // heads[0]))
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0))).reshape(-1, block, *heads)
    rows = fold(x, kv_heads)
    return rows.reshape(batch, -1, *rows.shape[1:])


def _unblocked(rows: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_block_rows`; `shape` is (B, T, H, D)."""
    batch, length, *heads = shape
    block = rows.shape[2] * rows.shape[3] // heads[0]
    flat = rows.reshape(-1, *rows.shape[2:])
    return unfold(flat, (flat.shape[0], block, *heads)).reshape(batch, -1, *heads)[:, :length]


def _chunks(x: Array, chunk: int) -> Array:
    """[B,T,K,D] as [B,m,K,C,D], widened; the last chunk is padded with zeros."""
    batch, length, *heads = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0))).reshape(-1, chunk, *heads)
    chunks = heads_first(x)
    return chunks.reshape(batch, -1, *chunks.shape[1:])


def _unchunked(x: Array, length: int) -> Array:
    """The inverse of `_chunks` for gradients."""
    return x.swapaxes(2, 3).reshape(x.shape[0], -1, x.shape[2], x.shape[4])[:, :length]
