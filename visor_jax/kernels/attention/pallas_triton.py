"""Attention as Pallas GPU kernels (Triton), forward and backward, that loop only over blocks with visible keys.

In and out: as `base.attention`, in float32, bfloat16 or float16, on NVIDIA GPUs from compute capability 8.0 on. One
program per block of queries of one head (output, gradient of q) or block of keys of one KV head (gradients of k and v).
Each reads how many blocks of the other side have work and which (`blocks.block_kinds`, compacted) and visits these.

With few queries (a decoding step) keys are split into chunks. The kernel treats each chunk as a separate sample; all
query heads of a KV head are rows of one block; the chunks' outputs are merged by their log-sum-exp.

Sums and softmax are in float32. The operands of half precision products are half precision, including the weights.
Arrays are read in their own layout, never transposed. Lengths are padded inside, head dims to a power of two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, Shaped

from visor_jax.kernels.attention.base import (
    AnyArray,
    ArrayOrShape,
    AttentionMask,
    named,
    named_heads,
    unfold,
    validated,
)
from visor_jax.kernels.attention.blocks import NOTHING, block_kinds, pad_mask
from visor_jax.kernels.attention.merge_partials import merge_partials
from visor_jax.kernels.attention.pallas_triton_kernels import Sizes, forward_kernel, grad_kv_kernel, grad_q_kernel

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
HEAD_DIMS = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block lengths in queries and in keys, powers of two of at least 16 on hardware; forward and backward.

    If all query heads of a KV head fit into one block, keys are split into chunks of at most `split`.
    """

    queries: int = 64
    keys: int = 64
    grad_queries: int = 32
    grad_keys: int = 32
    split: int = 256


def attention(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B Tq H D"]:
    """`base.attention` on a GPU; reverse-mode gradients only.

    Args:
      q, k, v, mask: as `base.attention`.
      tiles: block lengths; None takes the defaults of `Tiles`.
      interpret: run on any platform, as Pallas's `interpret`: slow, for tests.

    Raises:
      ValueError: an argument of the wrong shape or dtype, or one that the kernels do not serve; the message names it.
    """
    q, k, v, mask = validated(q, k, v, mask)
    if reason := refusal(q, k, mask):
        raise ValueError(f"pallas_gpu cannot serve: {reason}")
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    return _attention(q, k, v, mask, tiles or Tiles(), interpret)


def refusal(q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"], mask: AttentionMask) -> str | None:
    """Why these kernels cannot serve such arrays, or None where they can."""
    del k, mask
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}; it serves float32, bfloat16 and float16"
    if q.shape[3] > HEAD_DIMS[-1]:
        return f"q has head_dim {q.shape[3]}; it serves up to {HEAD_DIMS[-1]}"
    return None


def device_refusal() -> str | None:
    """Why these kernels cannot run on this machine's GPU; None where they can, or without a GPU."""
    if jax.default_backend() != "gpu":
        return None
    capability = float(getattr(jax.local_devices()[0], "compute_capability", "0"))
    return None if capability >= 8 else f"the GPU has compute capability {capability}; it runs from 8.0 on"


# --- the function and its gradient ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask, tiles: Tiles, interpret: bool) -> Array:
    return _forward(q, k, v, mask, tiles, interpret)[0]


def _forward(q: Array, k: Array, v: Array, mask: AttentionMask, tiles: Tiles, interpret: bool):
    few_queries = q.shape[1] * (q.shape[2] // k.shape[2]) <= tiles.queries and k.shape[1] > tiles.split
    out, log_sum = (_split if few_queries else _whole)(q, k, v, mask, tiles, interpret)
    out, log_sum = named_heads(out.astype(q.dtype)), named(log_sum)
    return out, (q, k, v, mask, out, log_sum)


def _whole(
    q: Array, k: Array, v: Array, mask: AttentionMask, tiles: Tiles, interpret: bool, dtype: DTypeLike | None = None
) -> tuple[Float[Array, "B Tq H D"], Float[Array, "B H Tq"]]:
    """Output in `dtype` or that of q, and the log-sum-exp of each row, plus infinity where nothing is seen."""
    call = Call.of(q, k, mask, tiles.queries, tiles.keys, interpret)
    rows = call.queries(q)
    batch, length, heads, _ = rows.shape
    out, log_sum = call.run(
        forward_kernel,
        call.work(by_keys=False),
        (*call.ids(), rows, call.keys(k), call.keys(v)),
        (jax.ShapeDtypeStruct(rows.shape, dtype or q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)),
        outer="queries",
    )
    return out[:, : q.shape[1], :, : q.shape[3]], log_sum[:, :, : q.shape[1]]


def _split(
    q: Array, k: Array, v: Array, mask: AttentionMask, tiles: Tiles, interpret: bool
) -> tuple[Float[Array, "B Tq H D"], Float[Array, "B H Tq"]]:
    """As `_whole` in float32, for few queries: one program per chunk of keys and KV head."""
    batch, q_length, num_heads, head_dim = q.shape
    kv_heads, chunk_size = k.shape[2], chunk_size_for(k.shape[1], tiles)
    group = num_heads // kv_heads
    mask, padding = pad_mask(mask, 1, chunk_size), -k.shape[1] % chunk_size
    num_chunks = mask.kv_segments.shape[1] // chunk_size

    def split_chunks(x: Shaped[Array, "B Tk ..."]) -> Shaped[Array, "BS C ..."]:
        return x.reshape(batch * num_chunks, chunk_size, *x.shape[2:])

    def repeat_per_chunk(x: Array) -> Array:
        return jnp.repeat(x, num_chunks, axis=0)

    rows = q.reshape(batch, q_length, kv_heads, group, head_dim).transpose(0, 3, 1, 2, 4)
    keys, values = (split_chunks(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))) for x in (k, v))
    chunk_mask = dataclasses.replace(
        mask.map_queries(lambda x: repeat_per_chunk(jnp.tile(x, (1, group)))),
        kv_positions=split_chunks(mask.kv_positions),
        kv_segments=split_chunks(mask.kv_segments),
    )
    rows = repeat_per_chunk(rows.reshape(batch, group * q_length, kv_heads, head_dim))
    tiles = dataclasses.replace(tiles, queries=min(tiles.queries, max(16, pl.next_power_of_2(rows.shape[1]))))
    outs, log_sums = _whole(rows, keys, values, chunk_mask, tiles, interpret, jnp.float32)
    outs = outs.swapaxes(1, 2).reshape(batch, num_chunks, kv_heads, group * q_length, head_dim)
    out, log_sum = merge_partials(outs, log_sums.reshape(outs.shape[:4]))
    return unfold(out, q.shape), log_sum.reshape(batch, num_heads, q_length)


def chunk_size_for(length: int, tiles: Tiles) -> int:
    """Keys per chunk: a multiple of `tiles.keys` up to `tiles.split`, or over half of it if that avoids padding."""
    max_blocks = max(1, tiles.split // tiles.keys)
    blocks = next((n for n in range(max_blocks, max_blocks // 2, -1) if length % (n * tiles.keys) == 0), max_blocks)
    return blocks * tiles.keys


def _backward(tiles: Tiles, interpret: bool, saved, grad: Array):
    q, k, v, mask, out, log_sum = saved
    call = Call.of(q, k, mask, tiles.grad_queries, tiles.grad_keys, interpret)
    # 0 * NaN is NaN: a query that sees nothing is replaced before it is multiplied.
    query_valid = (log_sum != jnp.inf).swapaxes(1, 2)[..., None]
    rows, grad_rows = (call.queries(jnp.where(query_valid, x, 0)) for x in (q, grad.astype(q.dtype)))
    delta = jnp.sum(grad_rows.astype(jnp.float32) * call.queries(out).astype(jnp.float32), axis=-1).swapaxes(1, 2)
    padding = call.mask.q_segments.shape[1] - q.shape[1]
    log_sum = jnp.pad(log_sum, ((0, 0), (0, 0), (0, padding)), constant_values=jnp.inf)
    arrays = (*call.ids(), rows, call.keys(k), call.keys(v), grad_rows, log_sum, delta)
    like_keys = jax.ShapeDtypeStruct(arrays[5].shape, k.dtype)
    (grad_q,) = call.run(
        grad_q_kernel, call.work(by_keys=False), arrays, (jax.ShapeDtypeStruct(rows.shape, q.dtype),), outer="queries"
    )
    grad_k, grad_v = call.run(grad_kv_kernel, call.work(by_keys=True), arrays, (like_keys, like_keys), outer="keys")
    return (
        grad_q[:, : q.shape[1], :, : q.shape[3]],
        *(x[:, : k.shape[1], :, : k.shape[3]] for x in (grad_k, grad_v)),
        jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask),  # integers and booleans have no gradient
    )


_attention.defvjp(_forward, _backward)


# --- layouts and the call ---------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """Shared by the kernels of one pass: the mask at padded lengths, block lengths, padding, and how to run."""

    mask: AttentionMask
    sizes: Sizes
    head_dim: int  # padded
    interpret: bool

    @classmethod
    def of(
        cls,
        q: Float[Array, "B Tq H D"],
        k: Float[Array, "B Tk K D"],
        mask: AttentionMask,
        queries: int,
        keys: int,
        interpret: bool,
    ) -> Call:
        sizes = Sizes(q.shape[2] // k.shape[2], queries, keys, q.shape[3] ** -0.5, mask.causal)
        head_dim = next(size for size in HEAD_DIMS if size >= q.shape[3])
        return cls(pad_mask(mask, queries, keys), sizes, head_dim, interpret)

    def queries(self, x: Float[Array, "B Tq H D"]) -> Float[Array, "B Tq_padded H D_padded"]:
        return self._padded(x, self.mask.q_segments.shape[1])

    def keys(self, x: Float[Array, "B Tk K D"]) -> Float[Array, "B Tk_padded K D_padded"]:
        return self._padded(x, self.mask.kv_segments.shape[1])

    def _padded(self, x: Array, length: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, self.head_dim - x.shape[3])))

    def ids(self) -> tuple[Int[Array, "..."], ...]:
        """Segments and positions of queries [B,Tq_padded] and of keys [B,Tk_padded].

        With shared segments, those of queries are [B,2,Tq_padded]: their own and the shared one.
        """
        mask, shared = self.mask, self.mask.q_shared_segments
        q_segments = mask.q_segments if shared is None else jnp.stack([mask.q_segments, shared], axis=1)
        return q_segments, mask.q_positions, mask.kv_segments, mask.kv_positions

    def work(self, *, by_keys: bool) -> Int[Array, "B n visits"]:
        """Per outer block: the count of inner blocks with work, then all inner blocks, those with work first."""
        kinds = block_kinds(self.mask, self.sizes.queries, self.sizes.keys)
        idle = (kinds.swapaxes(1, 2) if by_keys else kinds) == NOTHING
        order = jnp.argsort(idle, axis=2, stable=True).astype(jnp.int32)
        return jnp.concatenate([jnp.sum(~idle, axis=2, keepdims=True, dtype=jnp.int32), order], axis=2)

    def run(
        self,
        kernel: Callable[..., None],
        work: Int[Array, "B n visits"],
        arrays: tuple[Num[Array, "..."], ...],
        results: tuple[jax.ShapeDtypeStruct, ...],
        *,
        outer: str,
    ) -> Sequence[Num[Array, "..."]]:
        """One kernel over grid (outer block, head, sample); it loads its own blocks of `arrays`.

        `outer` is "queries" (the heads are query heads) or "keys" (KV heads, each with its group of query heads).
        """
        block = self.sizes.queries if outer == "queries" else self.sizes.keys
        kinds = ("ids", "ids", "ids", "ids", "q", "kv", "kv", "q", "q", "q")[: len(arrays)]
        return pl.pallas_call(
            functools.partial(kernel, sizes=self.sizes),
            out_shape=list(results),
            grid=(work.shape[1], results[0].shape[2], work.shape[0]),
            in_specs=[
                pl.BlockSpec((None, None, work.shape[2]), lambda i, h, b: (b, i, 0)),
                *(self.spec(kind, x.shape, outer) for kind, x in zip(kinds, arrays, strict=True)),
            ],
            out_specs=[
                pl.BlockSpec((None, block, None, x.shape[3]), lambda i, h, b: (b, i, h, 0))
                if x.ndim == 4
                else pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i))
                for x in results
            ],
            compiler_params=plgpu.CompilerParams(num_warps=4 if self.head_dim <= 64 else 8, num_stages=2),
            interpret=self.interpret,
            name=f"attention_{kernel.__name__}",
        )(work, *arrays)

    def spec(self, kind: str, shape: tuple[int, ...], outer: str) -> pl.BlockSpec:
        """The part of an array that a program can read, that of one sample: ids [B,L] or [B,2,L], rows [B,L,heads,D] or
        per-row numbers [B,heads,L].

        It reads its own head; a block of keys reads the group of query heads that share them, a block of queries the KV
        head that it shares.
        """
        if kind == "ids":
            return pl.BlockSpec((None, *shape[1:]), lambda i, h, b: (b, *[0] * (len(shape) - 1)))
        heads = self.sizes.group if (outer, kind) == ("keys", "q") else None
        shared = self.sizes.group if (outer, kind) == ("queries", "kv") else 1

        def head(h):
            return jax.lax.div(h, jnp.asarray(shared, jnp.result_type(h)))

        if len(shape) == 3:
            return pl.BlockSpec((None, heads, shape[2]), lambda i, h, b: (b, head(h), 0))
        return pl.BlockSpec((None, shape[1], heads, shape[3]), lambda i, h, b: (b, 0, head(h), 0))
