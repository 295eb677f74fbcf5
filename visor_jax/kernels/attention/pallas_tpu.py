"""Attention as Pallas TPU kernels, forward and backward, that neither fetch nor compute fully masked blocks.

In and out: as `base.attention`, in float32 or bfloat16. Three kernels over a grid (batch, KV head, block, block): the
output, the gradient of q, and the gradients of k and v. Prefetched scalars (`blocks.visits`) say which blocks have
work; over other blocks index maps do not move. The query heads of one KV head are rows of one matrix product, and
logits are computed transposed, [keys, rows]: sums and maxima of a query run over sublanes, and per-row numbers are
dense along lanes.

Sums and softmax are in float32. The operands of bfloat16 products are bfloat16, including the weights, as the matrix
unit takes them; float32 products are exact. Lengths and head dims are padded inside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from visor_jax.kernels.attention.base import AnyArray, ArrayOrShape, AttentionMask, named, named_heads, validated
from visor_jax.kernels.attention.blocks import Visits, block_kinds, pad_mask, visits
from visor_jax.kernels.attention.pallas_tpu_kernels import Sizes, forward_kernel, grad_kv_kernel, grad_q_kernel

LANES = 128
ROWS = 1024  # target for one matrix product: queries of a block times the heads that share its keys
KEYS = 512
HEAD_DIMS = (64, 128, 256)  # other head dims are padded to the next of these
MAX_CELLS = 128 * 1024  # pairs of blocks in the table, four bytes each, in scalar memory
MAX_HEADS = 16  # that share a KV head: their logits for 128 queries must fit


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block lengths, in queries and in keys. Multiples of 128 on hardware; any length when interpreted."""

    queries: int
    keys: int


Interpret = bool | pltpu.InterpretParams


def attention(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> Float[Array, "B Tq H D"]:
    """`base.attention` on a TPU; reverse-mode gradients only.

    Args:
      q, k, v, mask: as `base.attention`.
      tiles: block lengths; None takes `default_tiles`.
      interpret: run on any platform, as Pallas's `interpret`: slow, for tests.

    Raises:
      ValueError: an argument of the wrong shape or dtype, or one that the kernels do not serve; the message names it.
    """
    q, k, v, mask = validated(q, k, v, mask)
    tiles = tiles or default_tiles(q.shape[1], k.shape[1], q.shape[2] // k.shape[2])
    if reason := refusal(q, k, mask, tiles):
        raise ValueError(f"pallas_tpu cannot serve: {reason}")
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    return _attention(q, k, v, mask, tiles, interpret)


def refusal(
    q: Float[ArrayOrShape, "B Tq H D"],
    k: Float[ArrayOrShape, "B Tk K D"],
    mask: AttentionMask,
    tiles: Tiles | None = None,
) -> str | None:
    """Why these kernels cannot serve such arrays, or None where they can."""
    del mask
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}; it serves float32 and bfloat16"
    if q.shape[3] > HEAD_DIMS[-1]:
        return f"q has head_dim {q.shape[3]}; it serves up to {HEAD_DIMS[-1]}"
    group = q.shape[2] // k.shape[2]
    if group > MAX_HEADS:
        return f"{group} query heads share a KV head; it serves up to {MAX_HEADS}"
    tiles = tiles or default_tiles(q.shape[1], k.shape[1], group)
    cells = q.shape[0] * -(-q.shape[1] // tiles.queries) * -(-k.shape[1] // tiles.keys)
    if cells > MAX_CELLS:
        return f"{cells} pairs of blocks; its table in scalar memory holds {MAX_CELLS}: split the batch"
    return None


def default_tiles(q_length: int, kv_length: int, group: int) -> Tiles:
    """Equal blocks of at most about `ROWS` rows and `KEYS` keys: those that cover an array hold little padding."""

    def equal(length: int, most: int) -> int:
        blocks = max(-(-length // most), 1)
        return max(-(-length // (blocks * LANES)) * LANES, LANES)

    rows = max(ROWS // group // LANES * LANES, LANES)
    return Tiles(equal(q_length, rows), equal(kv_length, KEYS))


# --- the function and its gradient ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask, tiles: Tiles, interpret: Interpret) -> Array:
    return _forward(q, k, v, mask, tiles, interpret)[0]


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask, tiles: Tiles, interpret: Interpret):
    call = Call.of(q, k, mask, tiles, interpret)
    kinds = block_kinds(call.mask, tiles.queries, tiles.keys)
    operands = (call.q_layout(q), call.kv_layout(k), call.kv_layout(v))
    out, log_sum = call.run(
        forward_kernel,
        visits(kinds),
        operands,
        inner="keys",
        results=("q", "row"),
        dtypes=(q.dtype, jnp.float32),
        scratch=[(1, call.rows), (1, call.rows), (call.head_dim, call.rows)],
    )
    out, log_sum = named_heads(call.from_q_layout(out, q.shape)), named(log_sum)
    return out, (q, k, v, mask, out, log_sum)


def _backward(tiles: Tiles, interpret: Interpret, saved, grad: Array):
    q, k, v, mask, out, log_sum = saved
    call = Call.of(q, k, mask, tiles, interpret)
    kinds = block_kinds(call.mask, tiles.queries, tiles.keys)
    # 0 * NaN is NaN: a query that sees nothing is replaced before it is multiplied.
    query_valid = (log_sum != jnp.inf)[..., None]
    rows, grad_rows = (jnp.where(query_valid, call.q_layout(x), 0) for x in (q, grad.astype(q.dtype)))
    delta = jnp.sum(grad_rows.astype(jnp.float32) * call.q_layout(out).astype(jnp.float32), axis=-1)
    operands = (rows, call.kv_layout(k), call.kv_layout(v), grad_rows, log_sum, delta)
    keys_shape = (call.tiles.keys, call.head_dim)
    (grad_q,) = call.run(
        grad_q_kernel,
        visits(kinds),
        operands,
        inner="keys",
        results=("q",),
        dtypes=(q.dtype,),
        scratch=[(call.rows, call.head_dim)],
    )
    grad_k, grad_v = call.run(
        grad_kv_kernel,
        visits(kinds.swapaxes(1, 2)),
        operands,
        inner="queries",
        results=("kv", "kv"),
        dtypes=(k.dtype, v.dtype),
        scratch=[keys_shape, keys_shape],
    )
    return (
        call.from_q_layout(grad_q, q.shape),
        call.from_kv_layout(grad_k, k.shape),
        call.from_kv_layout(grad_v, v.shape),
        jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask),  # integers and booleans have no gradient
    )


_attention.defvjp(_forward, _backward)


# --- layouts and the call ---------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """Shared by the three kernels of one call: padded sizes, the mask at these sizes, layouts, and how to run."""

    batch: int
    kv_heads: int
    group: int  # query heads that share a KV head
    q_blocks: int
    kv_blocks: int
    head_dim: int  # padded
    scale: float
    mask: AttentionMask
    tiles: Tiles
    interpret: Interpret

    @classmethod
    def of(
        cls,
        q: Float[Array, "B Tq H D"],
        k: Float[Array, "B Tk K D"],
        mask: AttentionMask,
        tiles: Tiles,
        interpret: Interpret,
    ) -> Call:
        batch, _, num_heads, head_dim = q.shape
        mask = pad_mask(mask, tiles.queries, tiles.keys)
        return cls(
            batch,
            k.shape[2],
            num_heads // k.shape[2],
            mask.q_segments.shape[1] // tiles.queries,
            mask.kv_segments.shape[1] // tiles.keys,
            next(size for size in HEAD_DIMS if size >= head_dim),
            head_dim**-0.5,
            mask,
            tiles,
            interpret,
        )

    @property
    def rows(self) -> int:
        return self.group * self.tiles.queries

    def q_layout(self, x: Float[Array, "B Tq H D"]) -> Float[Array, "B K G Tq_padded D_padded"]:
        batch, length, num_heads, head_dim = x.shape
        more = (self.q_blocks * self.tiles.queries - length, self.head_dim - head_dim)
        x = jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1])))
        x = x.reshape(batch, x.shape[1], self.kv_heads, num_heads // self.kv_heads, self.head_dim)
        return x.transpose(0, 2, 3, 1, 4)

    def from_q_layout(
        self, x: Float[Array, "B K G Tq_padded D_padded"], shape: tuple[int, ...]
    ) -> Float[Array, "B Tq H D"]:
        batch, length, num_heads, head_dim = shape
        return x[:, :, :, :length, :head_dim].transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)

    def kv_layout(self, x: Float[Array, "B Tk K D"]) -> Float[Array, "B K Tk_padded D_padded"]:
        more = (self.kv_blocks * self.tiles.keys - x.shape[1], self.head_dim - x.shape[3])
        return jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1]))).swapaxes(1, 2)

    def from_kv_layout(
        self, x: Float[Array, "B K Tk_padded D_padded"], shape: tuple[int, ...]
    ) -> Float[Array, "B Tk K D"]:
        return x[:, :, : shape[1], : shape[3]].swapaxes(1, 2)

    def run(
        self,
        kernel: Callable[..., None],
        order: Visits,
        operands: tuple[Num[Array, "..."], ...],
        *,
        inner: str,
        results: tuple[str, ...],
        dtypes: tuple[Any, ...],
        scratch: list[tuple[int, int]],
    ) -> Sequence[Num[Array, "..."]]:
        """One kernel over grid (batch, KV head, outer block, inner block); `inner` is "keys" or "queries".

        Its arguments: ids of queries and keys, `operands` in the order q, k, v, grad, log_sum, delta, the results.
        """
        by_keys = inner == "keys"
        outer_blocks, inner_blocks = (self.q_blocks, self.kv_blocks)[:: 1 if by_keys else -1]
        inputs = ("q ids", "kv ids", "q", "kv", "kv", "q", "row", "row")[: 2 + len(operands)]
        specs = [self.spec(kind, inner_blocks, by_keys=by_keys) for kind in inputs]
        shapes = {"q": operands[0].shape, "kv": operands[1].shape, "row": operands[0].shape[:-1]}
        sizes = Sizes(self.group, self.tiles.queries, inner_blocks, self.scale, self.mask.causal)
        pairs = self.batch * self.kv_heads * self.rows * self.q_blocks * self.kv_blocks * self.tiles.keys
        products = 2 + (len(operands) > 3) * (1 if by_keys else 2)
        return pl.pallas_call(
            functools.partial(kernel, sizes=sizes),
            out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in zip(results, dtypes, strict=True)],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.batch, self.kv_heads, outer_blocks, inner_blocks),
                in_specs=specs,
                out_specs=[self.spec(kind, inner_blocks, by_keys=by_keys, result=True) for kind in results],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * self.head_dim,
                transcendentals=pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in operands),
            ),
            interpret=self.interpret,
            name=f"attention_{kernel.__name__}",
        )(*order, *self.ids(), *operands)

    @property
    def q_ids(self) -> tuple[Int[Array, "B Tq_padded"], ...]:
        """Segments and positions of queries, and their shared segments if the mask has them."""
        mask, shared = self.mask, self.mask.q_shared_segments
        return (mask.q_segments, mask.q_positions, *(() if shared is None else (shared,)))

    def ids(self) -> tuple[Int[Array, "B q_ids Tq_padded"], Int[Array, "B 2 Tk_padded"]]:
        """`q_ids` of queries [B,2 or 3,Tq_padded]; segments and positions of keys [B,2,Tk_padded]."""
        return jnp.stack(self.q_ids, 1), jnp.stack([self.mask.kv_segments, self.mask.kv_positions], 1)

    def spec(self, kind: str, inner_blocks: int, *, by_keys: bool, result: bool = False) -> pl.BlockSpec:
        """The block of one argument. Inputs keep their block over steps without work; results move at every step."""

        def outer(b, i, j, rows, cells):
            del j, cells
            return i if result else rows[b * pl.num_programs(2) + i]

        def inner(b, i, j, rows, cells):
            del rows
            return cells[(b * pl.num_programs(2) + i) * inner_blocks + j] >> 2

        of_queries, of_keys = (outer, inner) if by_keys else (inner, outer)
        queries, keys = self.tiles.queries, self.tiles.keys
        shape, index = {
            "q ids": ((1, len(self.q_ids), queries), lambda b, h, *x: (b, 0, of_queries(b, *x))),
            "kv ids": ((1, 2, keys), lambda b, h, *x: (b, 0, of_keys(b, *x))),
            "q": ((1, 1, self.group, queries, self.head_dim), lambda b, h, *x: (b, h, 0, of_queries(b, *x), 0)),
            "row": ((1, 1, self.group, queries), lambda b, h, *x: (b, h, 0, of_queries(b, *x))),
            "kv": ((1, 1, keys, self.head_dim), lambda b, h, *x: (b, h, of_keys(b, *x), 0)),
        }[kind]
        return pl.BlockSpec(shape, index)
