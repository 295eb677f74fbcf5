"""The three kinds of layer of a super-block, as functions of V, T and their positions (docs/method.md, section 3).

In: parameters of a layer, visual tokens V [B, Nv, D], text tokens T [B, Nt, D], their `TokenStream`. Out: V and T after
the layer, and its keys and values for caches. The text-only layer and the joint one are the pretrained layer over T or
[V; T]; cross-attention is new and declared here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture, TextArchitecture
from visor_jax.kernels import AttentionMask, attention
from visor_jax.model.decoders.qwen2 import qwen2_layer, rotary
from visor_jax.model.layers import QKV, Linear, Params, RMSNorm, for_each, linear, merge_heads, rms_norm, split_heads
from visor_jax.model.stream import TokenStream, sort_by_position, text_codes, unsort, visual_codes

KeysValues = tuple[Float[Array, "B _T _K E"], Float[Array, "B _T _K E"]]


# --- declarations -----------------------------------------------------------------------------------------------------


class CrossAttention(nnx.Module):
    """The new layer through which text reads visual tokens: norms, projections, gate, conditional position."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        text, cross = arch.text, arch.cross
        heads, kv = text.num_heads * text.head_dim, cross.num_kv_heads * text.head_dim
        self.text_norm = RMSNorm(text.hidden_size)
        self.visual_norm = RMSNorm(text.hidden_size)
        self.q_proj = Linear(text.hidden_size, heads, bias=True, rngs=rngs)
        self.k_proj = Linear(text.hidden_size, kv, bias=True, rngs=rngs)
        self.v_proj = Linear(text.hidden_size, kv, bias=True, rngs=rngs)
        self.o_proj = Linear(heads, text.hidden_size, gain=text.residual_init, rngs=rngs)
        self.gate = nnx.Param(jnp.asarray(0.0 if cross.init == "zero" else cross.gate_init, jnp.float32))
        self.conditional_position = ConditionalPosition(cross.kernel_size, text.hidden_size)


class ConditionalPosition(nnx.Module):
    """Depthwise kernel [taps, D] over the visual sequence; starts at zero, so that nothing is added at first."""

    def __init__(self, taps: int, size: int):
        self.kernel = nnx.Param(jnp.zeros((taps, size), jnp.float32))


# --- the three kinds --------------------------------------------------------------------------------------------------


def text_layer(
    params: Params, text: Float[Array, "B Nt D"], stream: TokenStream, arch: TextArchitecture
) -> tuple[Float[Array, "B Nt D"], KeysValues]:
    """T = TL(T): the pretrained layer over the text alone, and its keys and values."""
    rope = rotary(stream.text_positions, arch)
    return qwen2_layer(params, text, rope, text_mask(stream), arch)


def text_mask(stream: TokenStream) -> AttentionMask:
    """The causal mask of T alone."""
    positions, codes = stream.text_positions, text_codes(stream)
    return AttentionMask(positions, positions, codes.queries, codes.keys, None, True, codes.shared)


def joint_layer(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    arch: Architecture,
    active: Bool[Array, " B"] | None = None,
    *,
    keep_visual: bool = True,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"], KeysValues]:
    """[V; T] = TL([V; T]); also the layer's keys and values [B, Nv + Nt, K, E].

    `active` [B] marks the samples whose slot is on: for the others V does not change and T sees text alone, exactly
    as in `text_layer`. Without `keep_visual` the layer reads V but does not update it: for the last layer that reads V.
    """
    count = visual.shape[1]
    both, mask = jnp.concatenate([visual, text], axis=1), joint_mask(stream, arch, active)
    if not keep_visual:
        text_queries = mask.map_queries(lambda x: x[:, count:])
        text, keys_values = qwen2_layer(
            params, both, rotary(mask.kv_positions, arch.text), text_queries, arch.text, count
        )
        return visual, text, keys_values
    order = stream.order
    if order is not None:
        both, mask = jax.tree.map(lambda x: sort_by_position(x, order), (both, mask))
    outputs = qwen2_layer(params, both, rotary(mask.kv_positions, arch.text), mask, arch.text)
    if order is not None:
        outputs = jax.tree.map(lambda x: unsort(x, order), outputs)
    both, keys_values = outputs
    changed = both[:, :count]
    if active is not None:
        changed = jnp.where(active[:, None, None], changed, visual)
    return changed, both[:, count:], keys_values


def joint_mask(stream: TokenStream, arch: Architecture, active: Bool[Array, " B"] | None) -> AttentionMask:
    """The mask of [V; T]; V of an inactive sample is padding."""
    segments = stream.visual_segments if active is None else jnp.where(active[:, None], stream.visual_segments, 0)
    ends = image_ends(stream.visual_positions, segments) if arch.bidirectional_vision else stream.visual_positions

    visual, text = visual_codes(stream, segments), text_codes(stream)

    def both(visual: Array, text: Array) -> Array:
        return jnp.concatenate([visual, text], axis=1)

    return AttentionMask(
        q_positions=both(ends, stream.text_positions),
        kv_positions=both(stream.visual_positions, stream.text_positions),
        q_segments=both(visual, text.queries),
        kv_segments=both(visual, text.keys),
        q_shared_segments=None if text.shared is None else both(visual, text.shared),
    )


def image_ends(positions: Int[Array, "B Nv"], segments: Int[Array, "B Nv"]) -> Int[Array, "B Nv"]:
    """The last position of each visual token's contiguous run: how far it sees under bidirectional attention."""
    breaks = (positions[:, 1:] != positions[:, :-1] + 1) | (segments[:, 1:] != segments[:, :-1])
    is_end = jnp.pad(breaks, ((0, 0), (0, 1)), constant_values=True)
    index = jnp.where(is_end, jnp.arange(positions.shape[1]), positions.shape[1])
    return jnp.take_along_axis(positions, jax.lax.cummin(index, axis=1, reverse=True), axis=1)


def conditional_position(
    params: Params, visual: Float[Array, "B Nv D"], segments: Int[Array, "B Nv"]
) -> Float[Array, "B Nv D"]:
    """V + depthwise convolution of V over the visual sequence; no tap reaches into another segment or padding."""
    kernel = params["kernel"]
    reach = kernel.shape[0] // 2
    padded = jnp.pad(visual, ((0, 0), (reach, reach), (0, 0)))
    padded_segments = jnp.pad(segments, ((0, 0), (reach, reach)))
    length = visual.shape[1]
    total = visual
    for tap in range(kernel.shape[0]):
        same = (padded_segments[:, tap : tap + length] == segments) & (segments > 0)
        total = total + jnp.where(same[..., None], padded[:, tap : tap + length], 0) * for_each(visual, kernel[tap])
    return total


def cross_keys_values(
    params: Params, visual: Float[Array, "B Nv D"], segments: Int[Array, "B Nv"], arch: TextArchitecture
) -> KeysValues:
    """Keys and values [B, Nv, K, E] of V for one cross-attention layer, without rotary positions."""
    visual = conditional_position(params["conditional_position"], visual, segments)
    visual = rms_norm(params["visual_norm"], visual, arch.rms_norm_eps)
    key, value = (split_heads(linear(params[name], visual), arch.head_dim) for name in QKV[1:])
    return key, value


def cross_queries(
    params: Params,
    text: Float[Array, "B Nt D"],
    text_segments: Int[Array, "B Nt"],
    visual_segments: Int[Array, "B Nv"],
    arch: TextArchitecture,
) -> tuple[Float[Array, "B Nt H E"], AttentionMask]:
    """Queries of one cross-attention layer, and their mask: a text token may see every visual token of its segment."""
    query = split_heads(linear(params["q_proj"], rms_norm(params["text_norm"], text, arch.rms_norm_eps)), arch.head_dim)
    return query, AttentionMask(
        jnp.zeros_like(text_segments), jnp.zeros_like(visual_segments), text_segments, visual_segments, None, False
    )


def cross_attention(
    params: Params,
    text: Float[Array, "B Nt D"],
    keys_values: KeysValues,
    text_segments: Int[Array, "B Nt"],
    visual_segments: Int[Array, "B Nv"],
    arch: TextArchitecture,
) -> Float[Array, "B Nt D"]:
    """T + gate * CrossAttn(T, V): every text token may read every visual token of its segment."""
    query, mask = cross_queries(params, text, text_segments, visual_segments, arch)
    read = linear(params["o_proj"], merge_heads(attention(query, *keys_values, mask=mask)))
    return text + jnp.tanh(params["gate"]).astype(text.dtype) * read


def cross_layer(
    cross: Params,
    layer: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    arch: TextArchitecture,
) -> tuple[Float[Array, "B Nt D"], KeysValues, KeysValues]:
    """T = TL(T + CrossAttn(T, V)); also the layer's text keys and values and its visual ones."""
    visual_kv = cross_keys_values(cross, visual, stream.visual_segments, arch)
    text = cross_attention(cross, text, visual_kv, stream.text_segments, stream.visual_segments, arch)
    text, text_kv = text_layer(layer, text, stream, arch)
    return text, text_kv, visual_kv
