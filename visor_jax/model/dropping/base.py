"""Dropping visual tokens between decoder layers: the interface, and what the methods share.

A method is one file with

    AFTER      whether it reads the attention of the layer that ran last, or that of the layer to come
    RENUMBERS  whether later layers count positions as if the dropped tokens had never been there
    raters(visual, text, stream) -> Raters

`raters` is called once, on the embeddings that enter the decoder. `visor_jax.model.dropping.api` computes the attention
that visual tokens receive from the raters, keeps as many of each sample as `DroppingArchitecture.counts` says (shapes
never depend on values), and runs the layers. Choosing has no gradient; the tokens that remain have theirs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.kernels import AttentionMask
from visor_jax.kernels.attention.base import MASKED_LOGIT
from visor_jax.kernels.precision import widened
from visor_jax.model.decoders.qwen2 import project_qk, rotary
from visor_jax.model.layers import Params
from visor_jax.model.stream import TokenStream
from visor_jax.model.super_block import joint_mask

CHUNK = 64  # queries whose attention weights are in memory at once


class Raters(NamedTuple):
    """How much the attention of each token counts: float, text [B, Nt] and visual [B, Nv]; None: visual tokens' not."""

    text: Any
    visual: Any = None


def prompt_tokens(stream: TokenStream) -> Bool[Array, "B Nt"]:
    """Text tokens before the first target of their sample."""
    targets, segments = stream.targets, stream.text_segments
    if targets is None:
        return segments > 0
    never = jnp.iinfo(stream.text_positions.dtype).max
    starts = jnp.where(targets, stream.text_positions, never)  # [B, Nt]
    same = segments[:, :, None] == segments[:, None]
    first = jnp.min(jnp.where(same, starts[:, None], never), axis=2)
    return (segments > 0) & (stream.text_positions < first)


def last_instruction_tokens(stream: TokenStream) -> Bool[Array, "B Nt"]:
    """The text token before each answer; of a sample without targets its last one."""
    segments, turns = stream.text_segments, stream.text_turns
    next_segment = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    last = (segments > 0) & (next_segment != segments)
    if stream.targets is None:
        return last
    follows = next_segment == segments
    if turns is not None:
        follows &= jnp.pad(turns[:, 1:], ((0, 0), (0, 1)), constant_values=-1) == turns
    before = jnp.pad(stream.targets[:, 1:], ((0, 0), (0, 1))) & follows & ~stream.targets & (segments > 0)
    has_targets = jnp.any((segments[:, :, None] == segments[:, None]) & stream.targets[:, None], axis=2)
    return jnp.where(has_targets, before, last)


def ratings(
    layer: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    raters: Raters,
    arch: Architecture,
) -> Float[Array, "B Nv"]:
    """The attention that visual tokens receive from the raters in `layer`, mean over heads, for its input [V; T]."""
    count = visual.shape[1]
    both = jax.lax.stop_gradient(jnp.concatenate([visual, text], axis=1))
    first = count if raters.visual is None else 0
    weights = raters.text if raters.visual is None else jnp.concatenate([raters.visual, raters.text], axis=1)
    mask = joint_mask(stream, arch, None)
    layer, rope = jax.lax.stop_gradient(layer), rotary(mask.kv_positions, arch.text)
    query, key = project_qk(layer, both, rope, arch.text, first)
    return received_attention(query, key, mask.map_queries(lambda x: x[:, first:]), weights)[:, :count]


def received_attention(
    query: Float[Array, "B Q H E"], key: Float[Array, "B N K E"], mask: AttentionMask, weights: Float[Array, "B Q"]
) -> Float[Array, "B N"]:
    """The attention that each key receives, mean over heads, summed over queries by their weights; float32 or wider."""
    batch, count, heads, size = query.shape
    groups = heads // key.shape[2]
    size_of_chunk = min(CHUNK, count)
    extra = -count % size_of_chunk

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)))

    query, key = padded(widened(query)), widened(key)
    query = query.reshape(batch, count + extra, key.shape[2], groups, size)
    weights, mask = padded(weights.astype(query.dtype)), mask.map_queries(padded)

    def add_chunk(total: Float[Array, "B N"], start: Int[Array, ""]) -> tuple[Float[Array, "B N"], None]:
        def chunk(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size_of_chunk, axis=1)

        allowed = mask.map_queries(chunk).as_array()[:, None, None]  # [B, 1, 1, Q, N]
        logits = jnp.einsum("BQKGE,BNKE->BKGQN", chunk(query), key) * size**-0.5
        shares = jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, logits, MASKED_LOGIT), axis=-1), 0)
        return total + jnp.einsum("BKGQN,BQ->BN", shares, chunk(weights)) / heads, None

    starts = jnp.arange(0, count + extra, size_of_chunk)
    return jax.lax.scan(add_chunk, jnp.zeros((batch, key.shape[1]), query.dtype), starts)[0]
