"""Generation with one cache per kind of layer: prefill, then one token at a time (method.md section 3, "Decoding").

Text keys and values are kept for every layer. Visual ones are kept only where they are read again: in cross-attention
layers, and in self-attention layers that the budget has on. A new token never touches V itself. The budget is known
while tracing, so that a cache holds only the arrays that its budget needs; prefill runs in two programs, because the
policy reads the routing token between them: `prefill_prefix` up to the first optional layer, `prefill_rest` after it.

One sample per row (segment 1), prompts left-aligned and padded at the end; B rows, room for C text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.budget import LayerKind, Plan
from visor_jax.kernels import AttentionMask, attention
from visor_jax.kernels.precision import widened
from visor_jax.model.decoder import Record, cross_params, layer_params, run_layers
from visor_jax.model.decoders.qwen2 import finish_layer, project_qkv, rotary
from visor_jax.model.dropping.api import Dropped, run_dropping
from visor_jax.model.layers import Params, rms_norm
from visor_jax.model.policy import policy_logits
from visor_jax.model.super_block import KeysValues, cross_attention
from visor_jax.model.visor import Batch, embed, head, stream_of, with_routing_tokens


class Cache(NamedTuple):
    """Keys and values that later tokens read, in separate arrays per layer, so that adding a token copies nothing.

    `layers`: for every decoder layer [B, C, K, E] with room for C text tokens; in a self-attention layer [B, Nv + C, K,
    E], visual positions first. `cross`: for every cross-attention layer [B, Nv, Kc, E]. `lengths` [B] counts the text
    tokens stored, `positions` [B] is the next token's position id. `dropped`: of a plan whose layers drop visual
    tokens, what differs after each drop; the layers there have fewer visual positions.
    """

    layers: tuple[KeysValues, ...]
    cross: tuple[KeysValues, ...]
    visual_segments: Int[Array, "B Nv"]
    lengths: Int[Array, " B"]
    positions: Int[Array, " B"]
    dropped: tuple[Dropped, ...] = ()


class Prefix(NamedTuple):
    """The state at the entry of the first optional layer: V, T, and the first layers' keys and values by kind."""

    visual: Float[Array, "B Nv D"]
    text: Float[Array, "B Nt D"]
    recorded: dict[str, list[KeysValues]]


def recorder() -> tuple[dict[str, list[KeysValues]], Record]:
    """An empty record of keys and values by kind, and the function with which layers add to it."""
    recorded: dict[str, list[KeysValues]] = {kind.value: [] for kind in LayerKind}

    def record(kind: str, keys_values: KeysValues) -> None:
        recorded[kind].append(keys_values)

    return recorded, record


def prefill_prefix(
    params: Params, visual: Float[Array, "B Nv D"], batch: Batch, num_viable: int, arch: Architecture, *, routed: bool
) -> tuple[Prefix, Float[Array, "B M"] | None]:
    """The first layers, which every budget shares; with `routed`, also the policy's scores.

    `batch` holds prompts, with `routing_position` [B].
    """
    stream, text = stream_of(batch), embed(params, batch["text_tokens"])
    count = text.shape[1]
    if routed:
        text, stream = with_routing_tokens(params, text, stream, batch["routing_position"][:, None])
    recorded, record = recorder()
    visual, text = run_layers(
        params,
        visual,
        text,
        stream,
        [False] * arch.num_slots,
        arch,
        layers=arch.shared_layers,
        record=record,
    )
    recorded["text"] = [(keys[:, :count], values[:, :count]) for keys, values in recorded["text"]]
    scores = None
    if routed:
        scores = policy_logits(params["routing"], text[:, -1], num_viable, arch.text.rms_norm_eps)
    return Prefix(visual, text[:, :count], recorded), scores


def prefill_rest(
    params: Params, prefix: Prefix, batch: Batch, bits: Sequence[bool], capacity: int, arch: Architecture
) -> tuple[Float[Array, "B V"], Cache]:
    """The remaining layers: logits of the first new token, and the cache, with room for `capacity` text tokens."""
    recorded, record = recorder()
    for kind, held in prefix.recorded.items():
        recorded[kind].extend(held)
    stream = stream_of(batch)
    dropped: tuple[Dropped, ...] = ()
    if arch.dropping.active:
        _, text, dropped = run_dropping(
            params, prefix.visual, prefix.text, stream, arch, record=record, keep_visual=False
        )
    else:
        layers = range(arch.shared_layers.stop, arch.text.num_layers)
        _, text = run_layers(
            params, prefix.visual, prefix.text, stream, bits, arch, layers=layers, record=record, keep_visual=False
        )
    lengths = jnp.sum(batch["text_segments"] > 0, axis=1)
    last = jnp.take_along_axis(text, (lengths - 1)[:, None, None], axis=1)[:, 0]
    room = ((0, 0), (0, capacity - text.shape[1]), (0, 0), (0, 0))
    visual, layers = iter(recorded["self"]), []
    for kind, text_kv in zip(Plan.of(arch).under(bits), recorded["text"], strict=True):
        text_kv = jax.tree.map(lambda x: jnp.pad(x, room), text_kv)
        if kind is LayerKind.SELF:
            text_kv = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), next(visual), text_kv)
        layers.append(text_kv)
    crosses = tuple(recorded["cross"])
    cache = Cache(tuple(layers), crosses, stream.visual_segments, lengths, batch["routing_position"], dropped)
    return last_logits(params, last, arch), cache


def last_logits(params: Params, hidden: Float[Array, "B D"], arch: Architecture) -> Float[Array, "B V"]:
    """Logits of the final norm of `hidden`, float32 or wider."""
    hidden = rms_norm(params["norm"], hidden, arch.text.rms_norm_eps)
    return widened(hidden @ head(params))


def decode_step(
    params: Params, token: Int[Array, " B"], cache: Cache, bits: Sequence[bool], arch: Architecture
) -> tuple[Float[Array, "B V"], Cache]:
    """Appends one token to every row: returns the logits of the next token and the cache with this one."""
    x = embed(params, token[:, None])
    rows, room = jnp.arange(token.shape[0]), capacity(cache, bits, arch)
    held = jnp.arange(room)[None, :] <= cache.lengths[:, None]
    readings = (Dropped(cache.visual_segments, jnp.zeros_like(cache.positions)), *cache.dropped)  # before any drop
    ropes = [rotary((cache.positions - read.shift)[:, None], arch.text) for read in readings]
    visual_and_text = [jnp.concatenate([read.visual_segments > 0, held], axis=1) for read in readings]
    crosses, layers = iter(cache.cross), []
    for number, (kind, (keys, values)) in enumerate(zip(Plan.of(arch).under(bits), cache.layers, strict=True)):
        place, drops = arch.layers[number], arch.dropping.drops_before(number)
        layer = layer_params(params, place)
        if kind is LayerKind.CROSS:
            segments = jnp.ones_like(cache.positions)[:, None]
            x = cross_attention(
                cross_params(params, place), x, next(crosses), segments, cache.visual_segments, arch.text
            )
        query, key, value = project_qkv(layer, x, ropes[drops], arch.text)
        index = keys.shape[1] - room + cache.lengths
        keys, values = keys.at[rows, index].set(key[:, 0]), values.at[rows, index].set(value[:, 0])
        layers.append((keys, values))
        visible = visual_and_text[drops] if kind is LayerKind.SELF else held
        x = finish_layer(layer, x, attention(query, keys, values, mask=one_query_mask(visible)), arch.text)
    cache = cache._replace(layers=tuple(layers), lengths=cache.lengths + 1, positions=cache.positions + 1)
    return last_logits(params, x[:, 0], arch), cache


def capacity(cache: Cache, bits: Sequence[bool], arch: Architecture) -> int:
    """How many text tokens a cache has room for."""
    is_joint = Plan.of(arch).under(bits)[0] is LayerKind.SELF
    return cache.layers[0][0].shape[1] - (cache.visual_segments.shape[1] if is_joint else 0)


def grow_cache(cache: Cache, bits: Sequence[bool], arch: Architecture) -> Cache:
    """The cache with room for twice as many text tokens."""
    room = ((0, 0), (0, capacity(cache, bits, arch)), (0, 0), (0, 0))
    return cache._replace(layers=jax.tree.map(lambda x: jnp.pad(x, room), cache.layers))


def one_query_mask(visible: Bool[Array, "B T"]) -> AttentionMask:
    """One query per row that sees exactly the visible keys."""
    segments = visible.astype(jnp.int32)
    zeros = jnp.zeros_like(segments)
    return AttentionMask(zeros[:, :1], zeros, jnp.ones_like(segments[:, :1]), segments, None, False)
