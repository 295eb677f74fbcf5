"""Attention of a few queries over a long cache, in plain XLA: reads only chunks of keys that some query sees.

In and out: as `base.attention`. Each sample's keys are split into chunks. A loop visits the pairs of sample and
chunk in which some key is visible, so that the free room of a cache costs nothing and each sample costs its own length,
not the longest one. Chunks are read in the layout and dtype of the cache, without a copy. The chunks' outputs are
merged at the end. The backward pass is `xla_chunked`'s.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from visor_jax.kernels.attention import xla_chunked
from visor_jax.kernels.attention.base import MASKED_LOGIT, AnyArray, ArrayOrShape, AttentionMask, unfold, validated
from visor_jax.kernels.attention.merge_partials import merge_partials
from visor_jax.kernels.precision import widened

CHUNK = 1024
MAX_QUERIES = 16


def attention(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """`base.attention` for up to `MAX_QUERIES` queries; reverse-mode gradients only.

    Raises:
      ValueError: an argument of the wrong shape or dtype, or too many queries; the message names it.
    """
    q, k, v, mask = validated(q, k, v, mask)
    if reason := refusal(q, k, mask):
        raise ValueError(f"xla_decode cannot serve: {reason}")
    return _attention(q, k, v, mask)


def refusal(q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"], mask: AttentionMask) -> str | None:
    """Why this cannot serve the arguments; None if it can."""
    del k, mask
    if q.shape[1] > MAX_QUERIES:
        return f"there are {q.shape[1]} queries; it serves up to {MAX_QUERIES}"
    return None


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    batch, q_length, num_heads, head_dim = q.shape
    kv_heads, chunk_size = k.shape[2], min(CHUNK, k.shape[1])
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    grouped = q.reshape(batch, q_length, kv_heads, num_heads // kv_heads, head_dim)
    order, num_visible, num_chunks = chunks_with_work(mask, chunk_size)

    def step(n, partials):
        sample, chunk = order[n] // num_chunks, order[n] % num_chunks
        # The last chunk may overlap the one before it: keys that both hold are masked here.
        start = jnp.minimum(chunk * chunk_size, k.shape[1] - chunk_size)
        keys, values, allowed = read_chunk(sample, start, chunk_size, k, v, mask)
        allowed &= (start + jnp.arange(chunk_size) >= chunk * chunk_size)[None]
        partial = attend_chunk(grouped[sample], keys, values, allowed)
        return jax.tree.map(lambda xs, x: xs.at[sample, chunk].set(x), partials, partial)

    shape = (batch, num_chunks, kv_heads, num_heads // kv_heads * q_length)
    wide = widened(q[:0]).dtype
    partials = (jnp.zeros((*shape, head_dim), wide), jnp.full(shape, jnp.inf, wide))
    out, _ = merge_partials(*jax.lax.fori_loop(0, num_visible, step, partials))
    return unfold(out, q.shape).astype(q.dtype)


def attend_chunk(
    q: Float[Array, "Tq K G D"],
    keys: Float[Array, "C K D"],
    values: Float[Array, "C K D"],
    allowed: Bool[Array, "Tq C"],
) -> tuple[Float[Array, "K R D"], Float[Array, "K R"]]:
    """Output and log-sum-exp of all query heads over one chunk; R = G*Tq, rows as in `base.fold`."""
    kv_heads, head_dim = keys.shape[1:]
    wide = widened(q[:0]).dtype
    key_used, query_valid = jnp.any(allowed, axis=0)[:, None, None], jnp.any(allowed, axis=1)
    keys, values = jnp.where(key_used, keys, 0), jnp.where(key_used, values, 0)
    logits = jnp.einsum("TKGD,CKD->KGTC", q, keys, preferred_element_type=wide) * head_dim**-0.5
    logits = jnp.where(allowed, logits, MASKED_LOGIT)
    max_logit = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - max_logit[..., None])
    denominator = jnp.sum(weights, axis=-1)  # [K,G,Tq]
    weighted = jnp.einsum("KGTC,CKD->KGTD", weights, values, preferred_element_type=wide)
    out = jnp.where(query_valid[:, None], weighted / denominator[..., None], 0)
    log_sum = jnp.where(query_valid, max_logit + jnp.log(denominator), jnp.inf)
    return out.reshape(kv_heads, -1, head_dim), log_sum.reshape(kv_heads, -1)


def chunks_with_work(mask: AttentionMask, chunk_size: int) -> tuple[Int[Array, " chunks"], Int[Array, ""], int]:
    """Pairs sample * m + chunk, those in which some query sees a key first; the count of these; and m, the chunks per
    sample."""
    key_used = jnp.any(mask.as_array(), axis=1)
    padded = jnp.pad(key_used, ((0, 0), (0, -key_used.shape[1] % chunk_size)))
    idle = ~jnp.any(padded.reshape(padded.shape[0], -1, chunk_size), axis=2)
    return jnp.argsort(idle.reshape(-1), stable=True), jnp.sum(~idle), idle.shape[1]


def read_chunk(
    sample: Int[Array, ""],
    start: Int[Array, ""],
    chunk_size: int,
    k: Float[Array, "B Tk K D"],
    v: Float[Array, "B Tk K D"],
    mask: AttentionMask,
) -> tuple[Float[Array, "C K D"], Float[Array, "C K D"], Bool[Array, "Tq C"]]:
    """Keys and values of `chunk_size` keys of a sample from `start` on, and which of its queries may see them."""

    def keys(x: Array) -> Array:
        return jax.lax.dynamic_slice(x, (sample, start, *[0] * (x.ndim - 2)), (1, chunk_size, *x.shape[2:]))

    chunk_mask = AttentionMask(
        q_positions=mask.q_positions[sample][None],
        kv_positions=keys(mask.kv_positions),
        q_segments=mask.q_segments[sample][None],
        kv_segments=keys(mask.kv_segments),
        active=None if mask.active is None else mask.active[sample][None],
        causal=mask.causal,
        q_shared_segments=None if mask.q_shared_segments is None else mask.q_shared_segments[sample][None],
    )
    return keys(k)[0], keys(v)[0], chunk_mask.as_array()[0]


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask):
    return _attention(q, k, v, mask), (q, k, v, mask)


def _backward(saved, grad: Array):
    q, k, v, mask = saved
    _, pull = jax.vjp(lambda *x: xla_chunked.attention(*x, mask=mask), q, k, v)
    return *pull(grad), jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)


_attention.defvjp(_forward, _backward)
