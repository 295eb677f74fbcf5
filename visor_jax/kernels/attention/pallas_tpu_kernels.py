"""The bodies of the Pallas TPU attention kernels; `pallas_tpu` lays out their arguments and runs them.

Each handles one block of queries and one block of keys per step of a grid (batch, KV head, outer block, inner block),
and accumulates in scratch memory over the inner blocks. The query heads of one KV head are rows of one matrix product.
Logits are computed transposed, [keys, rows]: sums and maxima of a query run over sublanes, and per-row numbers are
dense along lanes. Shapes: R rows (heads x queries of a block), C keys of a block, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from visor_jax.kernels.attention.base import MASKED_LOGIT
from visor_jax.kernels.attention.blocks import ALL, SOME

# Arguments of a kernel are references into memory, as Pallas passes them; indexing one reads or writes its block.
Ref = Any


class Sizes(NamedTuple):
    """Static sizes of a kernel."""

    group: int  # query heads that share a KV head
    queries: int  # of a block
    inner_blocks: int
    scale: float
    causal: bool


def forward_kernel(
    rows: Ref,
    cells: Ref,
    q_ids: Ref,
    kv_ids: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    out: Ref,
    log_sum: Ref,
    running_max: Ref,
    denominator: Ref,
    acc: Ref,
    *,
    sizes: Sizes,
) -> None:
    """Output and log-sum-exp of a block of queries, by a running softmax over the blocks of keys."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        running_max[...] = jnp.full_like(running_max, MASKED_LOGIT)
        denominator[...] = jnp.zeros_like(denominator)
        acc[...] = jnp.zeros_like(acc)

    def step(masked: bool) -> None:
        keys, values, allowed = load_keys(q_ids, kv_ids, k, v, sizes, masked=masked)
        logits = masked_logits(matrix(q), keys, allowed, sizes)
        new_max = jnp.maximum(running_max[...], jnp.max(logits, axis=0, keepdims=True))
        # Until a row sees a key, its maximum is MASKED_LOGIT and its sums are meaningless. Its first key scales them by
        # exp(MASKED_LOGIT - max) = 0; a row that never sees one is set to 0 at the end.
        weights = jnp.exp(logits - new_max)
        shrink = jnp.exp(running_max[...] - new_max)
        denominator[...] = denominator[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        acc[...] = acc[...] * shrink + product(values, weights.astype(values.dtype), 0, 0)  # [D,R]
        running_max[...] = new_max

    where_visible(cells, sizes, step)

    @pl.when(pl.program_id(3) == sizes.inner_blocks - 1)
    def _():
        query_valid = ~(running_max[...] <= MASKED_LOGIT / 2)  # NaN counts as valid: such a row has seen a key
        divisor = jnp.where(query_valid, denominator[...], 1)
        output = jnp.where(query_valid, acc[...] / divisor, 0).T  # [R,D]
        out[...] = output.astype(out.dtype).reshape(out.shape)
        # Plus infinity makes every recomputed weight of a row that sees nothing exactly 0.
        logs = jnp.where(query_valid, running_max[...] + jnp.log(divisor), jnp.inf)
        for g in range(sizes.group):
            log_sum[0, 0, g : g + 1, :] = logs[:, g * sizes.queries : (g + 1) * sizes.queries]


def grad_q_kernel(
    rows: Ref,
    cells: Ref,
    q_ids: Ref,
    kv_ids: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    grad: Ref,
    log_sum: Ref,
    delta: Ref,
    grad_q: Ref,
    acc: Ref,
    *,
    sizes: Sizes,
) -> None:
    """Gradient of a block of queries, summed over the blocks of keys."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def step(masked: bool) -> None:
        keys, values, allowed = load_keys(q_ids, kv_ids, k, v, sizes, masked=masked)
        _, grad_logits = recomputed(q, keys, values, grad, log_sum, delta, allowed, sizes)
        acc[...] += product(grad_logits.astype(keys.dtype), keys, 0, 0)  # [R,D]

    where_visible(cells, sizes, step)

    @pl.when(pl.program_id(3) == sizes.inner_blocks - 1)
    def _():
        grad_q[...] = (acc[...] * sizes.scale).astype(grad_q.dtype).reshape(grad_q.shape)


def grad_kv_kernel(
    rows: Ref,
    cells: Ref,
    q_ids: Ref,
    kv_ids: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    grad: Ref,
    log_sum: Ref,
    delta: Ref,
    grad_k: Ref,
    grad_v: Ref,
    acc_k: Ref,
    acc_v: Ref,
    *,
    sizes: Sizes,
) -> None:
    """Gradients of a block of keys and values, summed over the blocks of queries and the heads that share them."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    def step(masked: bool) -> None:
        keys, values, allowed = load_keys(q_ids, kv_ids, k, v, sizes, masked=masked)
        weights, grad_logits = recomputed(q, keys, values, grad, log_sum, delta, allowed, sizes)
        acc_v[...] += product(weights.astype(values.dtype), matrix(grad), 1, 0)  # [C,D]
        acc_k[...] += product(grad_logits.astype(keys.dtype), matrix(q), 1, 0)

    where_visible(cells, sizes, step)

    @pl.when(pl.program_id(3) == sizes.inner_blocks - 1)
    def _():
        grad_k[0, 0] = (acc_k[...] * sizes.scale).astype(grad_k.dtype)
        grad_v[0, 0] = acc_v[...].astype(grad_v.dtype)


def where_visible(cells: Ref, sizes: Sizes, step: Callable[[bool], None]) -> None:
    """Runs `step` (with masking or without) unless nothing is visible in this block."""
    row = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    kind = cells[row * sizes.inner_blocks + pl.program_id(3)] & 3
    pl.when(kind == SOME)(functools.partial(step, True))
    pl.when(kind == ALL)(functools.partial(step, False))


def load_keys(
    q_ids: Ref, kv_ids: Ref, k: Ref, v: Ref, sizes: Sizes, *, masked: bool
) -> tuple[Float[Array, "C D"], Float[Array, "C D"], Bool[Array, "C bq"] | None]:
    """Keys and values of the block, 0 where no query of the block sees them; and `allowed` if masked."""
    keys, values = k[0, 0], v[0, 0]
    if not masked:
        return keys, values, None
    columns = kv_ids[0].T  # [C,2]
    segments, positions = columns[:, 0:1], columns[:, 1:2]
    allowed = segments == q_ids[0, 0:1]
    if q_ids.shape[1] == 3:  # the mask has shared segments
        allowed |= segments == q_ids[0, 2:3]
    allowed &= segments != 0
    if sizes.causal:
        allowed &= positions <= q_ids[0, 1:2]
    # 0 * NaN is NaN: unused keys are replaced before the product.
    key_used = jnp.max(allowed.astype(jnp.float32), axis=1, keepdims=True) > 0
    return jnp.where(key_used, keys, jnp.zeros_like(keys)), jnp.where(key_used, values, jnp.zeros_like(values)), allowed


def masked_logits(
    rows: Float[Array, "R D"], keys: Float[Array, "C D"], allowed: Bool[Array, "C bq"] | None, sizes: Sizes
) -> Float[Array, "C R"]:
    """Scaled logits of every row against the keys, `MASKED_LOGIT` where a query may not see; heads are concatenated
    along the rows."""
    logits = product(keys, rows, 1, 1) * sizes.scale
    if allowed is None:
        return logits
    heads = jnp.split(logits, sizes.group, axis=1)
    return jnp.concatenate([jnp.where(allowed, x, MASKED_LOGIT) for x in heads], axis=1)


def recomputed(
    q: Ref,
    keys: Float[Array, "C D"],
    values: Float[Array, "C D"],
    grad: Ref,
    log_sum: Ref,
    delta: Ref,
    allowed: Bool[Array, "C bq"] | None,
    sizes: Sizes,
) -> tuple[Float[Array, "C R"], Float[Array, "C R"]]:
    """Weights and gradient of the unscaled logits, from the saved log-sum-exp."""
    logits = masked_logits(matrix(q), keys, allowed, sizes)
    weights = jnp.exp(logits - along_lanes(log_sum))
    grad_weights = product(values, matrix(grad), 1, 1)
    return weights, weights * (grad_weights - along_lanes(delta))


def matrix(x: Ref) -> Float[Array, "R D"]:
    """The block [1,1,G,bq,D] as rows."""
    return x[0, 0].reshape(-1, x.shape[-1])


def along_lanes(x: Ref) -> Float[Array, "1 R"]:
    """The block [1,1,G,bq] as one row."""
    return jnp.concatenate([x[0, 0, g : g + 1, :] for g in range(x.shape[2])], axis=1)


def product(
    x: Float[Array, "rows_x columns_x"], y: Float[Array, "rows_y columns_y"], x_axis: int, y_axis: int
) -> Float[Array, "M N"]:
    """Matrix product over the given axes, summed in float32; exact to float32 where the operands are."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
