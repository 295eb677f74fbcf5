"""The bodies of the Pallas GPU attention kernels; `pallas_triton` lays out their arguments and runs them.

A program holds one block of one side and loops over the blocks of the other that have work: `work` [1+m] holds their
count and their indices. Shapes: R queries of a block, C keys of a block, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from visor_jax.kernels.attention.base import MASKED_LOGIT

# Arguments of a kernel are references into memory, as Pallas passes them; indexing one reads or writes its block.
Ref = Any


class Sizes(NamedTuple):
    """Static sizes of a kernel."""

    group: int  # query heads that share a KV head
    queries: int  # of a block
    keys: int
    scale: float
    causal: bool


def forward_kernel(
    work: Ref,
    q_segments: Ref,
    q_positions: Ref,
    kv_segments: Ref,
    kv_positions: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    out: Ref,
    log_sum: Ref,
    *,
    sizes: Sizes,
) -> None:
    """Output and log-sum-exp of a block of queries, by a running softmax over the blocks of keys."""
    here = pl.ds(pl.program_id(0) * sizes.queries, sizes.queries)
    ids, rows = (segments_at(q_segments, here), q_positions[here]), q[here, :]

    def step(n, carry):
        running_max, denominator, acc = carry
        there = pl.ds(work[1 + n] * sizes.keys, sizes.keys)
        allowed = may_see(ids, (kv_segments[there], kv_positions[there]), sizes)
        logits = masked_logits(rows, k[there, :], allowed, sizes)
        new_max = jnp.maximum(running_max, jnp.max(logits, axis=1))
        # Until a row sees a key, its maximum is MASKED_LOGIT and its sums are meaningless. Its first key scales them by
        # exp(MASKED_LOGIT - max) = 0; a row that never sees one is set to 0 at the end.
        weights = jnp.exp(logits - new_max[:, None])
        shrink = jnp.exp(running_max - new_max)
        values = where_seen(v[there, :], allowed)
        acc = acc * shrink[:, None] + product(weights.astype(values.dtype), values, 1, 0)
        return new_max, denominator * shrink + jnp.sum(weights, axis=1), acc

    zeros = jnp.zeros(sizes.queries, jnp.float32)
    start = (zeros + MASKED_LOGIT, zeros, jnp.zeros(rows.shape, jnp.float32))
    running_max, denominator, acc = jax.lax.fori_loop(0, work[0], step, start)
    no_keys = running_max <= MASKED_LOGIT / 2  # NaN is not "no keys": such a row has seen a key
    denominator = jnp.where(no_keys, 1.0, denominator)
    out[...] = jnp.where(no_keys[:, None], 0.0, acc / denominator[:, None]).astype(out.dtype)
    # Plus infinity makes every recomputed weight of a row that sees nothing exactly 0.
    log_sum[...] = jnp.where(no_keys, jnp.inf, running_max + jnp.log(denominator))


def grad_q_kernel(
    work: Ref,
    q_segments: Ref,
    q_positions: Ref,
    kv_segments: Ref,
    kv_positions: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    grad: Ref,
    log_sum: Ref,
    delta: Ref,
    grad_q: Ref,
    *,
    sizes: Sizes,
) -> None:
    """Gradient of a block of queries, summed over the blocks of keys."""
    here = pl.ds(pl.program_id(0) * sizes.queries, sizes.queries)
    ids = (segments_at(q_segments, here), q_positions[here])
    rows, grad_rows, logs, deltas = q[here, :], grad[here, :], log_sum[here], delta[here]

    def step(n, acc):
        there = pl.ds(work[1 + n] * sizes.keys, sizes.keys)
        allowed = may_see(ids, (kv_segments[there], kv_positions[there]), sizes)
        keys, values = where_seen(k[there, :], allowed), where_seen(v[there, :], allowed)
        _, grad_logits = recomputed(rows, keys, values, grad_rows, logs, deltas, allowed, sizes)
        return acc + product(grad_logits.astype(keys.dtype), keys, 1, 0)

    acc = jax.lax.fori_loop(0, work[0], step, jnp.zeros(rows.shape, jnp.float32))
    grad_q[...] = (acc * sizes.scale).astype(grad_q.dtype)


def grad_kv_kernel(
    work: Ref,
    q_segments: Ref,
    q_positions: Ref,
    kv_segments: Ref,
    kv_positions: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    grad: Ref,
    log_sum: Ref,
    delta: Ref,
    grad_k: Ref,
    grad_v: Ref,
    *,
    sizes: Sizes,
) -> None:
    """Gradients of a block of keys and values, summed over the blocks of queries and the heads that share them."""
    there = pl.ds(pl.program_id(0) * sizes.keys, sizes.keys)
    ids, count = (kv_segments[there], kv_positions[there]), work[0]

    def step(n, carry):
        acc_k, acc_v = carry
        g, n = jax.lax.div(n, count), jax.lax.rem(n, count)
        here = pl.ds(work[1 + n] * sizes.queries, sizes.queries)
        allowed = may_see((segments_at(q_segments, here), q_positions[here]), ids, sizes)
        rows, grad_rows = q[here, g, :], grad[here, g, :]
        keys, values = where_seen(k[there, :], allowed), where_seen(v[there, :], allowed)
        weights, grad_logits = recomputed(
            rows, keys, values, grad_rows, log_sum[g, here], delta[g, here], allowed, sizes
        )
        acc_v += product(weights.astype(rows.dtype), grad_rows, 0, 0)
        acc_k += product(grad_logits.astype(rows.dtype), rows, 0, 0)
        return acc_k, acc_v

    zeros = jnp.zeros(grad_k.shape, jnp.float32)
    acc_k, acc_v = jax.lax.fori_loop(0, count * sizes.group, step, (zeros, zeros))
    grad_k[...] = (acc_k * sizes.scale).astype(grad_k.dtype)
    grad_v[...] = acc_v.astype(grad_v.dtype)


def segments_at(q_segments: Ref, here: Any) -> tuple[Int[Array, " R"], ...]:
    """The segments of a block of queries: their own, and the shared one if the mask has them."""
    if len(q_segments.shape) == 1:
        return (q_segments[here],)
    return q_segments[0, here], q_segments[1, here]


def may_see(
    queries: tuple[tuple[Int[Array, " R"], ...], Int[Array, " R"]],
    keys: tuple[Int[Array, " C"], Int[Array, " C"]],
    sizes: Sizes,
) -> Bool[Array, "R C"]:
    """Whether each query may see each key, from segments and positions."""
    own, *shared = (segments[:, None] == keys[0][None, :] for segments in queries[0])
    allowed = functools.reduce(jnp.logical_or, shared, own) & (keys[0] != 0)[None, :]
    if sizes.causal:
        allowed &= keys[1][None, :] <= queries[1][:, None]
    return allowed


def where_seen(x: Float[Array, "C D"], allowed: Bool[Array, "R C"]) -> Float[Array, "C D"]:
    """0 in keys or values that no query of the block sees: 0 * NaN is NaN, so they are replaced before the product."""
    key_used = jnp.max(allowed.astype(jnp.int32), axis=0) > 0
    return jnp.where(key_used[:, None], x, jnp.zeros_like(x))


def masked_logits(
    rows: Float[Array, "R D"], keys: Float[Array, "C D"], allowed: Bool[Array, "R C"], sizes: Sizes
) -> Float[Array, "R C"]:
    """Scaled logits of every query against the keys, `MASKED_LOGIT` where a query may not see."""
    return jnp.where(allowed, product(rows, keys, 1, 1) * sizes.scale, MASKED_LOGIT)


def recomputed(
    rows: Float[Array, "R D"],
    keys: Float[Array, "C D"],
    values: Float[Array, "C D"],
    grad_rows: Float[Array, "R D"],
    log_sum: Float[Array, " R"],
    delta: Float[Array, " R"],
    allowed: Bool[Array, "R C"],
    sizes: Sizes,
) -> tuple[Float[Array, "R C"], Float[Array, "R C"]]:
    """Weights and gradient of the unscaled logits, from the saved log-sum-exp."""
    weights = jnp.exp(masked_logits(rows, keys, allowed, sizes) - log_sum[:, None])
    grad_weights = product(grad_rows, values, 1, 1)
    return weights, weights * (grad_weights - delta[:, None])


def product(
    x: Float[Array, "rows_x columns_x"], y: Float[Array, "rows_y columns_y"], x_axis: int, y_axis: int
) -> Float[Array, "M N"]:
    """Matrix product over the given axes, summed in float32; exact to float32 where the operands are."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
