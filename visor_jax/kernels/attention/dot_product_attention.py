"""Attention by cuDNN, splash and tokamax, under the contract of `base.attention`.

In and out: as `base.attention`. They are baselines to compare with; cuDNN is the default on GPUs where it can serve.
cuDNN gets lengths and "causal", and skips masked blocks, when these describe the whole mask, which is checked at run
time. Otherwise it gets the mask as an array of queries by keys, as tokamax always does, and skips nothing; splash gets
segments. `*_refusal` returns why an implementation cannot serve.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float, Int, Shaped

from visor_jax.kernels.attention.base import ATTENTION, AnyArray, ArrayOrShape, AttentionMask, validated
from visor_jax.kernels.attention.blocks import pad_mask
from visor_jax.kernels.precision import widened

HALVES = (jnp.bfloat16, jnp.float16)
SPLASH_BLOCK = 128  # splash's blocks divide the lengths, which are padded to multiples of this

Dense = Callable[[Array, Array, Array, Array], Array]  # (q, k, v, allowed [B,1,Tq,Tk]) -> [B,Tq,H,D]


def cudnn(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """cuDNN's fused attention; raises ValueError where `cudnn_refusal` has a reason."""
    if reason := cudnn_refusal(q, k, mask):
        raise ValueError(f"cudnn cannot serve: {reason}")
    return with_lengths(functools.partial(fused, implementation="cudnn"), *pad_to_even(q, k, v, mask))[:, : q.shape[1]]


def cudnn_refusal(
    q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"], mask: AttentionMask
) -> str | None:
    """Why cuDNN cannot serve the arguments; None if it can."""
    del mask
    if q.dtype not in HALVES:
        return f"q has dtype {q.dtype}; it serves bfloat16 and float16"
    if q.shape[3] > 128 or q.shape[3] % 8:
        return f"q has head_dim {q.shape[3]}; it serves multiples of 8 up to 128"
    return None


def pad_to_even(
    q: Float[AnyArray, "B Tq H D"], k: Float[AnyArray, "B Tk K D"], v: Float[AnyArray, "B Tk K D"], mask: AttentionMask
) -> tuple[Float[Array, "B _ H D"], Float[Array, "B _ K D"], Float[Array, "B _ K D"], AttentionMask]:
    """Pads odd lengths by one token: cuDNN's backward pass with a mask requires even lengths."""

    def padded(x: Shaped[AnyArray, "B T ..."]) -> Array:
        return jnp.pad(x, [(0, x.shape[1] % 2 if axis == 1 else 0) for axis in range(x.ndim)])

    mask = dataclasses.replace(
        mask.map_queries(padded), kv_positions=padded(mask.kv_positions), kv_segments=padded(mask.kv_segments)
    )
    return padded(q), padded(k), padded(v), mask


def fused(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    allowed: Bool[Array, "..."] | None = None,
    *,
    implementation: Any,
    **kwargs: Any,
) -> Float[Array, "B Tq H D"]:
    """`jax.nn.dot_product_attention`, by "cudnn" or, for tests without a GPU, "xla"."""
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation=implementation, **kwargs)


def tokamax(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """tokamax's choice for the platform; raises ValueError where `tokamax_refusal` has a reason."""
    if reason := tokamax_refusal(q, k, mask):
        raise ValueError(f"tokamax cannot serve: {reason}")
    library = importlib.import_module("tokamax")
    if not flags.FLAGS.is_parsed():  # it reads absl's flags, which few programs parse
        flags.FLAGS.mark_as_parsed()
    return with_dense_mask(lambda q, k, v, allowed: library.dot_product_attention(q, k, v, mask=allowed), q, k, v, mask)


def tokamax_refusal(
    q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"], mask: AttentionMask
) -> str | None:
    """Why tokamax cannot serve the arguments; None if it can."""
    del q, k, mask
    if importlib.util.find_spec("tokamax") is None:
        return "the package tokamax is not installed: pip install tokamax"
    return None


class Lengths(NamedTuple):
    """Number of real queries and keys of each sample, and whether these (with "causal") describe the whole mask."""

    queries: Int[Array, " B"]
    keys: Int[Array, " B"]
    suffice: Bool[Array, ""]


def lengths_of(mask: AttentionMask) -> Lengths:
    """The lengths of a mask.

    They suffice if real tokens come first and share one segment and, for a causal mask, queries and keys have the same
    rising positions; never for a mask with shared segments.
    """
    on = True if mask.active is None else mask.active[:, None]
    q, kv = (jnp.where(on, x, 0) for x in (mask.q_segments, mask.kv_segments))
    queries, keys = (jnp.sum(x != 0, axis=1, dtype=jnp.int32) for x in (q, kv))
    q_leads, kv_leads = (jnp.arange(x.shape[1])[None] < n[:, None] for x, n in ((q, queries), (kv, keys)))
    segment = jnp.max(kv, axis=1, keepdims=True, initial=0)
    suffice = jnp.all(q == jnp.where(q_leads, segment, 0)) & jnp.all(kv == jnp.where(kv_leads, segment, 0))
    if mask.q_shared_segments is not None or (mask.causal and q.shape != kv.shape):
        suffice = jnp.array(False)
    elif mask.causal:
        rises = mask.kv_positions[:, 1:] > mask.kv_positions[:, :-1]
        same = mask.q_positions == mask.kv_positions
        read = kv_leads | q_leads  # a query's position counts too, past the last key
        suffice &= jnp.all(rises | ~read[:, 1:]) & jnp.all(same | ~q_leads)
    return Lengths(queries, keys, suffice)


def with_lengths(
    run: Callable[..., Array],
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """Runs a function that takes lengths, or the dense mask where lengths do not suffice; keeps `base.attention`'s
    contract."""
    q, k, v, mask = validated(q, k, v, mask)
    lengths = lengths_of(mask)

    def short(q: Array, k: Array, v: Array) -> Float[Array, "B Tq H D"]:
        query_valid = (jnp.arange(q.shape[1])[None] < lengths.queries[:, None]) & (lengths.keys > 0)[:, None]
        last = jnp.minimum(lengths.keys, lengths.queries) if mask.causal else lengths.keys
        key_used = (jnp.arange(k.shape[1])[None] < last[:, None]) & (lengths.queries > 0)[:, None]
        query_valid, key_used = query_valid[..., None, None], key_used[..., None, None]
        kwargs = {"query_seq_lengths": lengths.queries, "key_value_seq_lengths": lengths.keys}
        kwargs = {name: jnp.maximum(x, 1) for name, x in kwargs.items()}  # a softmax over no key is NaN
        out = run(
            *(jnp.where(*x, 0) for x in ((query_valid, q), (key_used, k), (key_used, v))),
            is_causal=mask.causal,
            **kwargs,
        )
        return jnp.where(query_valid, out, 0)

    def whole(q: Array, k: Array, v: Array) -> Float[Array, "B Tq H D"]:
        return with_dense_mask(run, q, k, v, mask)

    return jax.lax.cond(lengths.suffice, short, whole, q, k, v)


def with_dense_mask(
    run: Dense,
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """Runs a function that takes an array of queries by keys; keeps `base.attention`'s contract on zeros and NaN."""
    q, k, v, mask = validated(q, k, v, mask)
    allowed = mask.as_array()
    query_valid, key_used = (jnp.any(allowed, axis=axis)[..., None, None] for axis in (2, 1))
    q, k, v = jnp.where(query_valid, q, 0), jnp.where(key_used, k, 0), jnp.where(key_used, v, 0)
    # A softmax over no key is NaN: such a query attends to every key instead, and its output is replaced by 0.
    allowed = allowed | ~query_valid[..., 0]
    return jnp.where(query_valid, run(q, k, v, allowed[:, None]), 0)


def splash(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
    interpret: bool = False,
) -> Float[Array, "B Tq H D"]:
    """Splash attention by segments; raises ValueError where `splash_refusal` has a reason.

    Splash does not scale logits: queries are scaled first, which rounds them to their dtype once more than elsewhere.
    """
    q, k, v, mask = validated(q, k, v, mask)
    if reason := splash_refusal(q, k, mask):
        raise ValueError(f"splash cannot serve: {reason}")
    allowed = mask.as_array()
    query_valid, key_used = (jnp.any(allowed, axis=axis)[..., None, None] for axis in (2, 1))
    mask = pad_mask(mask, SPLASH_BLOCK, SPLASH_BLOCK)
    lengths = (mask.q_segments.shape[1], mask.kv_segments.shape[1])

    def pad_heads_first(x: Array, length: int) -> Float[Array, "B H T D"]:
        padding = (length - x.shape[1], -x.shape[3] % SPLASH_BLOCK)
        return jnp.pad(x, ((0, 0), (0, padding[0]), (0, 0), (0, padding[1]))).swapaxes(1, 2)

    scaled = (widened(jnp.where(query_valid, q, 0)) * q.shape[3] ** -0.5).astype(q.dtype)
    keys, values = (pad_heads_first(jnp.where(key_used, x, 0), lengths[1]) for x in (k, v))
    heads = splash_attention.MultiHeadMask([splash_attention.FullMask(lengths) for _ in range(q.shape[2])])
    kernel = splash_attention.make_splash_mha_single_device(
        heads, interpret=interpret, residual_checkpoint_name=ATTENTION
    )
    # In splash segment 0 matches itself; outputs of padding queries are dropped, so that they give no gradient.
    ids = splash_attention.SegmentIds(mask.q_segments, mask.kv_segments)
    out = jnp.asarray(jax.vmap(kernel)(pad_heads_first(scaled, lengths[0]), keys, values, segment_ids=ids))
    return jnp.where(query_valid, out.swapaxes(1, 2)[:, : q.shape[1], :, : q.shape[3]], 0).astype(q.dtype)


def splash_refusal(
    q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"], mask: AttentionMask
) -> str | None:
    """Why splash cannot serve the arguments; None if it can."""
    if mask.causal:
        return "the mask is causal by positions that are known at run time only; its masks are fixed ahead"
    if mask.q_shared_segments is not None:
        return "the mask has shared segments; it takes one segment per query"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}; it serves float32 and bfloat16"
    if 0 in (q.size, k.size):
        return f"q has shape {q.shape} and k {k.shape}; it serves no empty arrays"
    return None
