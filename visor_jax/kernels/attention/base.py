"""Attention by position and segment: the contract, its validation, and the plain XLA reference.

In: queries `q [B,Tq,H,D]`, keys and values `k, v [B,Tk,K,D]` (H a multiple of K: grouped-query attention) and an
`AttentionMask`. Out: `[B,Tq,H,D]` in `q.dtype`. Every implementation in this folder satisfies the contract of
`attention` below, and the tests run one list of cases against all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from visor_jax.kernels.precision import widened

# Replaces minus infinity: finite, so that a row in which everything is masked makes no NaN.
MASKED_LOGIT = -1e30

AnyArray = Array | np.ndarray  # JAX's and NumPy's arrays, which implementations take
ArrayOrShape = AnyArray | jax.ShapeDtypeStruct  # refusals and choices read shapes and dtypes only

T = TypeVar("T")
ATTENTION = "attention"  # name of results that a recomputing backward pass may keep (`visor_jax.model.remat`)

DTYPES = tuple(map(jnp.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which key a query may see, without an array of queries by keys.

    Query i of a sample may see its key j iff `kv_segments[j] != 0`, it equals `q_segments[i]` or
    `q_shared_segments[i]`, the sample is active and, when `causal`, `kv_positions[j] <= q_positions[i]`. Positions need
    not be sorted; segment 0 is padding.

    Attributes:
      q_positions, kv_positions: int [B,Tq], [B,Tk]. Read only when causal.
      q_segments, kv_segments: int [B,Tq], [B,Tk].
      active: bool [B], or None when every sample is active.
      causal: static; whether positions restrict which keys are seen.
      q_shared_segments: int [B,Tq], a second segment whose keys each query sees (0: no second one), or None when every
        query sees its own segment only.
    """

    q_positions: Int[Array, "B Tq"]
    kv_positions: Int[Array, "B Tk"]
    q_segments: Int[Array, "B Tq"]
    kv_segments: Int[Array, "B Tk"]
    active: Bool[Array, " B"] | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    q_shared_segments: Int[Array, "B Tq"] | None = None

    # JAX also builds masks of shapes, shardings and tangents: run-time checks of annotations skip the constructor.
    __no_type_check__: ClassVar[bool] = True

    def as_array(self) -> Bool[Array, "B Tq Tk"]:
        """The definition: True where a query may see a key."""
        allowed = self.q_segments[:, :, None] == self.kv_segments[:, None, :]
        if self.q_shared_segments is not None:
            allowed |= self.q_shared_segments[:, :, None] == self.kv_segments[:, None, :]
        allowed &= (self.kv_segments != 0)[:, None, :]
        if self.causal:
            allowed &= self.kv_positions[:, None, :] <= self.q_positions[:, :, None]
        if self.active is not None:
            allowed &= self.active[:, None, None]
        return allowed

    def map_queries(self, function: Callable[[Array], Array]) -> AttentionMask:
        """The mask with `function` applied to each array [B,Tq] of the queries."""
        shared = self.q_shared_segments
        return dataclasses.replace(
            self,
            q_positions=function(self.q_positions),
            q_segments=function(self.q_segments),
            q_shared_segments=None if shared is None else function(shared),
        )


def attention(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
) -> Float[Array, "B Tq H D"]:
    """Softmax attention with logits scaled by 1/sqrt(D): the reference, which keeps a [B,H,Tq,Tk] array.

    Products and softmax are accumulated in float32 (float64 for float64); on TPUs and GPUs XLA rounds float32 operands
    as `jax_default_matmul_precision` says, while the Pallas kernels use them at full precision. A query that may see
    nothing gets exactly 0 and gives exactly zero gradients. Unused rows (a query that sees nothing, a key that no query
    of its sample sees) may hold anything, NaN included: they reach no output and no gradient. Logits must lie well
    within `MASKED_LOGIT` and its negative.

    Raises:
      ValueError: an argument of the wrong shape or dtype; the message names it.
    """
    q, k, v, mask = validated(q, k, v, mask)
    allowed = mask.as_array()
    query_valid, key_used = jnp.any(allowed, axis=2), jnp.any(allowed, axis=1)
    # 0 * NaN is NaN: unused rows are replaced before the product, not after.
    rows = fold(jnp.where(query_valid[:, :, None, None], q, 0), k.shape[2]) * q.shape[3] ** -0.5  # [B,K,G*Tq,D]
    k, v = (heads_first(jnp.where(key_used[:, :, None, None], x, 0)) for x in (k, v))  # [B,K,Tk,D]

    logits = mask_logits(jnp.einsum("BKRD,BKSD->BKRS", rows, k), allowed)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=MASKED_LOGIT)))
    # Dividing after the product touches [Tq,D] numbers where dividing the weights would touch [Tq,Tk].
    out = jnp.einsum("BKRS,BKSD->BKRD", weights, v) / jnp.sum(weights, axis=-1, keepdims=True)
    return named(jnp.where(query_valid[:, :, None, None], unfold(out, q.shape), 0).astype(q.dtype))


def named(results: T) -> T:
    """An implementation's results that its backward pass reads, under the name `ATTENTION`."""
    return jax.tree.map(lambda x: checkpoint_name(x, ATTENTION), results)


def named_heads(out: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """An implementation's output, under the name `ATTENTION`, kept as [B, T, H * D].

    A TPU pads the last axis of what is kept to 128: heads of 72 would take 1.8 times their bytes.
    """
    merged = out.reshape(*out.shape[:2], out.shape[2] * out.shape[3])
    return named(merged).reshape(out.shape)


def fold(x: Float[Array, "B T H D"], num_kv_heads: int) -> Float[Array, "B K R D"]:
    """Widened queries; the G query heads of each KV head become rows of one matrix."""
    batch, length, num_heads, head_dim = x.shape
    group = num_heads // num_kv_heads
    grouped = widened(x).reshape(batch, length, num_kv_heads, group, head_dim)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, group * length, head_dim)


def unfold(x: Float[Array, "B K R D"], shape: tuple[int, ...]) -> Float[Array, "B T H D"]:
    """The inverse of `fold`; `shape` is (B, T, H, D)."""
    batch, length, num_heads, head_dim = shape
    grouped = x.reshape(batch, x.shape[1], num_heads // x.shape[1], length, head_dim)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(shape)


def heads_first(x: Float[Array, "B S K D"]) -> Float[Array, "B K S D"]:
    """Widened keys or values as matrices, one per KV head."""
    return widened(x).swapaxes(1, 2)


def mask_logits(logits: Float[Array, "B K R S"], allowed: Bool[Array, "B T S"]) -> Float[Array, "B K R S"]:
    """`MASKED_LOGIT` wherever the query may not see the key, in every head."""
    batch, kv_heads, num_rows, keys = logits.shape
    length = allowed.shape[1]
    grouped = logits.reshape(batch, kv_heads, num_rows // max(length, 1), length, keys)
    return jnp.where(allowed[:, None, None], grouped, MASKED_LOGIT).reshape(logits.shape)


def validated(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    mask: AttentionMask,
) -> tuple[Float[Array, "B Tq H D"], Float[Array, "B Tk K D"], Float[Array, "B Tk K D"], AttentionMask]:
    """The arguments of every implementation, checked, as JAX's arrays.

    Raises:
      ValueError: an argument of the wrong shape or dtype; the message names it.
    """
    if not isinstance(mask, AttentionMask):
        raise ValueError(f"mask must be an AttentionMask, got {type(mask).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not hasattr(x, "shape"):
            raise ValueError(f"{name} must be an array, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes [batch, length, heads, head_dim], got shape {x.shape}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be floating point ({', '.join(map(str, DTYPES))}), got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    batch, q_length, num_heads, head_dim = q.shape
    if head_dim == 0:
        raise ValueError(f"q must have a head_dim of at least 1, got shape {q.shape}")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must share batch and head_dim with q {q.shape}, got {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {k.shape}, got {v.shape}")
    if k.shape[2] == 0 or num_heads % k.shape[2]:
        raise ValueError(f"q has {num_heads} heads, which is no multiple of the {k.shape[2]} heads of k")

    for name in ("q_positions", "q_segments", *(("q_shared_segments",) if mask.q_shared_segments is not None else ())):
        _validate_integers(name, getattr(mask, name), (batch, q_length))
    for name, length in (("kv_positions", k.shape[1]), ("kv_segments", k.shape[1])):
        _validate_integers(name, getattr(mask, name), (batch, length))
    if mask.active is not None:
        if not hasattr(mask.active, "shape"):
            raise ValueError(f"mask.active must be an array, got {type(mask.active).__name__}")
        if mask.active.dtype != jnp.bool_:
            raise ValueError(f"mask.active must be boolean, got {mask.active.dtype}")
        if mask.active.shape != (batch,):
            raise ValueError(f"mask.active must have shape {(batch,)}, got {mask.active.shape}")
    return jax.tree.map(jnp.asarray, (q, k, v, mask))  # NumPy's arrays cannot be indexed by tracers


def _validate_integers(name: str, x: Any, shape: tuple[int, int]) -> None:
    if not hasattr(x, "shape"):
        raise ValueError(f"mask.{name} must be an array, got {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"mask.{name} must be integers, got {x.dtype}")
    if not jnp.can_cast(x.dtype, jnp.int32):  # kernels compare int32
        raise ValueError(f"mask.{name} must be int32 or narrower, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"mask.{name} must have shape {shape}, got {x.shape}")
