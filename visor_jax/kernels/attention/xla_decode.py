"""Attention of a few queries over a long cache, in plain XLA: only stretches of keys that are seen are read.

In and out: as `base.attention`. Each sample's keys are split into chunks. A loop goes over the pairs of sample and
chunk in which something is visible (a cache is mostly room for what may still come), so that ragged lengths cost what
they hold, not what the longest holds; a chunk is read in the layout and dtype of the cache, of which no copy is made.
The parts of a sample are put together at the end. The backward pass is `xla_chunked`'s.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from visor_jax.kernels.attention import xla_chunked
from visor_jax.kernels.attention.base import MASKED_LOGIT, AttentionMask, unfold, validate
from visor_jax.kernels.attention.merge_partials import put_together
from visor_jax.kernels.precision import widened

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


def refusal(q: Float[Array, "B Tq H D"], k: Float[Array, "B Tk K D"], mask: AttentionMask) -> str | None:
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
    pairs, count, chunks = pairs_with_work(mask, size)

    def step(n, parts):
        sample, chunk = pairs[n] // chunks, pairs[n] % chunks
        # The last chunk may reach back into the one before it: what that one has is masked here.
        start = jnp.minimum(chunk * size, k.shape[1] - size)
        keys, values, allowed = at(sample, start, size, k, v, mask)
        allowed &= start + jnp.arange(size) >= chunk * size
        part = one_part(grouped[sample], keys, values, allowed)
        return jax.tree.map(lambda parts, part: parts.at[sample, chunk].set(part), parts, part)

    shape = (batch, chunks, kv_heads, num_heads // kv_heads * q_length)
    wide = widened(q[:0]).dtype
    parts = (jnp.zeros((*shape, head_dim), wide), jnp.full(shape, jnp.inf, wide))
    out, _ = put_together(*jax.lax.fori_loop(0, count, step, parts))
    return unfold(out, q.shape).astype(q.dtype)


def one_part(
    q: Float[Array, "Tq K G D"],
    keys: Float[Array, "C K D"],
    values: Float[Array, "C K D"],
    allowed: Bool[Array, "Tq C"],
) -> tuple[Float[Array, "K R D"], Float[Array, "K R"]]:
    """Output and log-sum-exp of all query heads over one chunk; R = G*Tq, rows as in `base.fold`."""
    kv_heads, head_dim = keys.shape[1:]
    wide = widened(q[:0]).dtype
    seen, sees = jnp.any(allowed, axis=0)[:, None, None], jnp.any(allowed, axis=1)
    keys, values = jnp.where(seen, keys, 0), jnp.where(seen, values, 0)
    logits = jnp.einsum("TKGD,CKD->KGTC", q, keys, preferred_element_type=wide) * head_dim**-0.5
    logits = jnp.where(allowed, logits, MASKED_LOGIT)
    peak = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - peak[..., None])
    total = jnp.sum(weights, axis=-1)  # [K,G,Tq]
    read = jnp.einsum("KGTC,CKD->KGTD", weights, values, preferred_element_type=wide)
    out = jnp.where(sees[:, None], read / total[..., None], 0)
    log_sum = jnp.where(sees, peak + jnp.log(total), jnp.inf)
    return out.reshape(kv_heads, -1, head_dim), log_sum.reshape(kv_heads, -1)


def pairs_with_work(mask: AttentionMask, size: int) -> tuple[Array, Array, int]:
    """The pairs of sample and chunk of `size` keys in which some query sees a key, those first, as sample * m + chunk;
    their count; and m, the chunks of a sample."""
    seen = jnp.any(mask.as_array(), axis=1)
    seen = jnp.pad(seen, ((0, 0), (0, -seen.shape[1] % size))).reshape(seen.shape[0], -1, size)
    idle = ~jnp.any(seen, axis=2)
    return jnp.argsort(idle.reshape(-1), stable=True), jnp.sum(~idle), idle.shape[1]


def at(
    sample: Int[Array, ""],
    start: Int[Array, ""],
    size: int,
    k: Float[Array, "B Tk K D"],
    v: Float[Array, "B Tk K D"],
    mask: AttentionMask,
) -> tuple[Float[Array, "C K D"], Float[Array, "C K D"], Bool[Array, "Tq C"]]:
    """Keys and values of `size` keys of a sample from `start` on, and which of its queries may see them."""

    def keys(x: Array) -> Array:
        return jax.lax.dynamic_slice(x, (sample, start, *[0] * (x.ndim - 2)), (1, size, *x.shape[2:]))

    part = AttentionMask(
        q_positions=mask.q_positions[sample][None],
        kv_positions=keys(mask.kv_positions),
        q_segments=mask.q_segments[sample][None],
        kv_segments=keys(mask.kv_segments),
        active=None if mask.active is None else mask.active[sample][None],
        causal=mask.causal,
    )
    return keys(k)[0], keys(v)[0], part.as_array()[0]


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask):
    return _attention(q, k, v, mask), (q, k, v, mask)


def _backward(saved, grad: Array):
    q, k, v, mask = saved
    _, pull = jax.vjp(lambda *x: xla_chunked.attention(*x, mask=mask), q, k, v)
    return *pull(grad), jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)


_attention.defvjp(_forward, _backward)
