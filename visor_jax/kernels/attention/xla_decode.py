"""Attention of a few queries over a long cache, in plain XLA: only stretches of keys that someone sees are read.

In and out: as `base.attention`. Keys are split into chunks; those in which nothing is visible for any sample (a cache
is mostly room for what may still come) are passed over, the others meet all samples and heads at once, in the layout
and dtype of the cache: no copy of it is made. The backward pass is `xla_chunked`'s.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from visor_jax.kernels.attention import xla_chunked
from visor_jax.kernels.attention.base import MASKED_LOGIT, AttentionMask, validate, widened

CHUNK = 1024
MOST_QUERIES = 16


def attention(
    q: Float[Array, "B Tq H D"],
    k: Float[Array, "B Tk K D"],
    v: Float[Array, "B Tk K D"],
    *,
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """`base.attention` for up to `MOST_QUERIES` queries; reverse-mode gradients only.

    Raises:
      ValueError: an argument of the wrong shape or dtype, or too many queries; the message names it.
    """
    validate(q, k, v, mask)
    if reason := refusal(q, k, mask):
        raise ValueError(f"xla_decode cannot serve: {reason}")
    return _attention(q, k, v, mask)


def refusal(q: Array, k: Array, mask: AttentionMask) -> str | None:
    del k, mask
    if q.shape[1] > MOST_QUERIES:
        return f"there are {q.shape[1]} queries; it serves up to {MOST_QUERIES}"
    return None


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    batch, q_length, num_heads, head_dim = q.shape
    kv_heads, size = k.shape[2], min(CHUNK, k.shape[1])
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    grouped = q.reshape(batch, q_length, kv_heads, num_heads // kv_heads, head_dim)
    chunks, count = chunks_with_work(mask, size)

    def step(n, carry):
        peak, total, acc, sees = carry
        # The last chunk may reach back into the one before it: what that one has is masked here.
        first = chunks[n] * size
        start = jnp.minimum(first, k.shape[1] - size)
        keys, values, part = at(start, size, k, v, mask)
        new = (start + jnp.arange(size) >= first)[None, None, :]
        allowed = part.as_array() & new  # [B,Tq,C]
        seen = jnp.any(allowed, axis=1)[:, :, None, None]
        keys, values = jnp.where(seen, keys, 0), jnp.where(seen, values, 0)
        logits = jnp.einsum("BTKGD,BCKD->BKGTC", grouped, keys, preferred_element_type=peak.dtype) * head_dim**-0.5
        logits = jnp.where(allowed[:, None, None], logits, MASKED_LOGIT)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        weights, shrink = jnp.exp(logits - new_peak[..., None]), jnp.exp(peak - new_peak)
        read = jnp.einsum("BKGTC,BCKD->BKGTD", weights, values, preferred_element_type=peak.dtype)
        acc = acc * shrink[..., None] + read
        return new_peak, total * shrink + jnp.sum(weights, axis=-1), acc, sees | jnp.any(allowed, axis=2)

    zeros = jnp.zeros((batch, kv_heads, num_heads // kv_heads, q_length), widened(q[:0]).dtype)
    start = (
        zeros + MASKED_LOGIT,
        zeros,
        jnp.zeros((*zeros.shape, head_dim), zeros.dtype),
        jnp.zeros(q.shape[:2], bool),
    )
    _, total, acc, sees = jax.lax.fori_loop(0, count, step, start)
    sees = sees[:, None, None]
    out = jnp.where(sees[..., None], acc / jnp.where(sees, total, 1)[..., None], 0)  # [B,K,G,Tq,D]
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def chunks_with_work(mask: AttentionMask, size: int) -> tuple[Array, Array]:
    """The chunks of `size` keys in which some query of some sample sees a key, those first, and their count."""
    seen = jnp.any(mask.as_array(), axis=(0, 1))
    idle = ~jnp.any(jnp.pad(seen, (0, -seen.shape[0] % size)).reshape(-1, size), axis=1)
    return jnp.argsort(idle, stable=True), jnp.sum(~idle)


def at(start: Array, size: int, k: Array, v: Array, mask: AttentionMask) -> tuple[Array, Array, AttentionMask]:
    """Keys, values and mask of `size` keys from `start` on."""

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    part = dataclasses.replace(mask, kv_positions=cut(mask.kv_positions), kv_segments=cut(mask.kv_segments))
    return cut(k), cut(v), part


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask):
    return _attention(q, k, v, mask), (q, k, v, mask)


def _backward(saved, grad: Array):
    q, k, v, mask = saved
    _, pull = jax.vjp(lambda *x: xla_chunked.attention(*x, mask=mask), q, k, v)
    return *pull(grad), jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)


_attention.defvjp(_forward, _backward)
