"""Attention in plain XLA without an array of queries by keys: a scan over chunks of keys with a running softmax.

In and out: as `base.attention`. Grouped queries are folded into rows, so that each chunk is one matrix product per KV
head. The backward pass recomputes each chunk's weights from the saved log-sum-exp instead of keeping them: memory is
that of one chunk, forward and backward. Lengths need not divide: keys are padded inside.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from visor_jax.kernels.attention.base import (
    MASKED_LOGIT,
    AttentionMask,
    fold,
    heads_first,
    mask_logits,
    unfold,
    validate,
)

CHUNK = 512


def attention(
    q: Float[Array, "B Tq H D"],
    k: Float[Array, "B Tk K D"],
    v: Float[Array, "B Tk K D"],
    *,
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """`base.attention` at the memory of one chunk of keys; reverse-mode gradients only.

    Raises:
      ValueError: an argument of the wrong shape or dtype; the message names it.
    """
    validate(q, k, v, mask)
    return _attention(q, k, v, mask)


class _Chunk(NamedTuple):
    """A stretch of keys as the scan meets it: k, v float32 [B,K,C,D]; positions, segments [B,C]."""

    k: Array
    v: Array
    positions: Array
    segments: Array


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask):
    rows = fold(q, k.shape[2]) * q.shape[3] ** -0.5  # [B,K,R,D], R = G*Tq

    def step(carry, chunk: _Chunk):
        peak, total, acc, sees = carry
        logits, chunk, allowed = _logits(rows, chunk, mask)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        # A row that has seen nothing yet stands at MASKED_LOGIT and gathers rubbish. The first key that it sees scales
        # this by exp(MASKED_LOGIT - peak) = 0; a row that never sees one is set to 0 below.
        weights = jnp.exp(logits - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + jnp.sum(weights, axis=-1)
        acc = acc * shrink[..., None] + jnp.einsum("BKRC,BKCD->BKRD", weights, chunk.v)
        return (new_peak, total, acc, sees | jnp.any(allowed, axis=2)), None

    zeros = jnp.zeros(rows.shape[:3], rows.dtype)
    start = (zeros + MASKED_LOGIT, zeros, jnp.zeros_like(rows), jnp.zeros(q.shape[:2], bool))
    (peak, total, acc, sees), _ = jax.lax.scan(step, start, _chunks(k, v, mask))
    sees = jnp.tile(sees, (1, q.shape[2] // k.shape[2]))[:, None]  # [B,1,R]
    total = jnp.where(sees, total, 1)
    out = jnp.where(sees[..., None], acc / total[..., None], 0)
    # Plus infinity makes every recomputed weight of a row that sees nothing exactly 0.
    log_sum = jnp.where(sees, peak + jnp.log(total), jnp.inf)
    return unfold(out, q.shape).astype(q.dtype), (q, k, v, mask, out, log_sum)


def _backward(saved, grad: Array):
    q, k, v, mask, out, log_sum = saved
    scale = q.shape[3] ** -0.5
    sees = (log_sum != jnp.inf)[..., None]
    rows = jnp.where(sees, fold(q, k.shape[2]) * scale, 0)
    grad_rows = jnp.where(sees, fold(grad, k.shape[2]), 0)
    delta = jnp.sum(grad_rows * out, axis=-1)  # [B,K,R]

    def step(grad_q, chunk: _Chunk):
        logits, chunk, _ = _logits(rows, chunk, mask)
        weights = jnp.exp(logits - log_sum[..., None])
        grad_v = jnp.einsum("BKRC,BKRD->BKCD", weights, grad_rows)
        grad_weights = jnp.einsum("BKRD,BKCD->BKRC", grad_rows, chunk.v)
        grad_logits = weights * (grad_weights - delta[..., None])
        grad_k = jnp.einsum("BKRC,BKRD->BKCD", grad_logits, rows)
        return grad_q + jnp.einsum("BKRC,BKCD->BKRD", grad_logits, chunk.k), (grad_k, grad_v)

    grad_q, (grad_k, grad_v) = jax.lax.scan(step, jnp.zeros_like(rows), _chunks(k, v, mask))
    return (
        unfold(grad_q * scale, q.shape).astype(q.dtype),
        _join(grad_k, k.shape[1]).astype(k.dtype),
        _join(grad_v, v.shape[1]).astype(v.dtype),
        jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask),  # integers and booleans have no gradient
    )


_attention.defvjp(_forward, _backward)


def _logits(rows: Array, chunk: _Chunk, mask: AttentionMask) -> tuple[Array, _Chunk, Array]:
    """Masked logits [B,K,R,C]; the chunk, with 0 in the keys and values that no query sees; who sees whom [B,Tq,C]."""
    allowed = dataclasses.replace(mask, kv_positions=chunk.positions, kv_segments=chunk.segments).as_array()
    seen = jnp.any(allowed, axis=1)[:, None, :, None]
    chunk = chunk._replace(k=jnp.where(seen, chunk.k, 0), v=jnp.where(seen, chunk.v, 0))
    return mask_logits(jnp.einsum("BKRD,BKCD->BKRC", rows, chunk.k), allowed), chunk, allowed


def _chunks(k: Array, v: Array, mask: AttentionMask) -> _Chunk:
    """Keys padded with segment 0 to whole chunks, the chunk axis first."""
    length = k.shape[1]
    size = max(1, min(CHUNK, length))
    count = -(-length // size)

    def split(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, count * size - length if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    return _Chunk(
        split(heads_first(k), 2), split(heads_first(v), 2), split(mask.kv_positions, 1), split(mask.kv_segments, 1)
    )


def _join(x: Array, length: int) -> Array:
    """The inverse for gradients: [n,B,K,C,D] -> [B,Tk,K,D]."""
    count, batch, kv_heads, size, head_dim = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, kv_heads, head_dim)[:, :length]
