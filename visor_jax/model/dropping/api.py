"""Runs a dense plan whose later layers read fewer visual tokens (`model.dropping`, docs/reduction.md).

In: parameters, V(0), text embeddings and their `TokenStream`. Out: V and T after the last layer, and what caches need.
Layers run one after the other: after each drop the arrays of V are shorter.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.kernels.mesh import on_each_device, sample_axes
from visor_jax.model.decoder import Record, layer_params, unstack_layers
from visor_jax.model.dropping import fastv, pyramiddrop, sparsevlm
from visor_jax.model.dropping.base import Raters, ratings
from visor_jax.model.dropping.sparsevlm import Recycled, recycled
from visor_jax.model.layers import Params
from visor_jax.model.reduction.base import rank_within
from visor_jax.model.remat import Remat, layer_input, recomputed
from visor_jax.model.stream import TokenStream, with_order
from visor_jax.model.super_block import KeysValues, joint_layer

METHODS: dict[str, ModuleType] = {"fastv": fastv, "pyramiddrop": pyramiddrop, "sparsevlm": sparsevlm}


class Dropped(NamedTuple):
    """What the layers after a drop read: the segments of V, and by how much a new token's position is lower there."""

    visual_segments: Int[Array, "B Nv"]
    shift: Int[Array, " B"]


def ignore(kind: str, keys_values: KeysValues) -> None:
    """Records nothing."""


def run_dropping(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    arch: Architecture,
    *,
    record: Record = ignore,
    keep_visual: bool = True,
    remat: Remat = "none",
) -> tuple[Float[Array, "B Nv_end D"], Float[Array, "B Nt D"], tuple[Dropped, ...]]:
    """All layers of a dense plan; arguments as of `decoder.run_layers` and `decoder.forward`."""
    dropping, params = arch.dropping, unstack_layers(params)
    method = METHODS[dropping.method]
    raters = method.raters(visual, text, stream, dropping)
    raters = jax.tree.map(jax.lax.stop_gradient, raters)
    totals, width = sample_sizes(stream), visual.shape[1]
    stream, drops, before = with_order(stream), [], None
    for index in range(arch.text.num_layers):
        layer = layer_params(params, arch.layers[index])
        if index in dropping.layers:
            stage = dropping.layers.index(index)
            states = before if method.AFTER else (layer, visual, text)
            assert states is not None, "no drop before the first layer"
            scores = ratings(*states, stream, raters, arch)
            room = dropping.room(stage, width)
            kept = kept_tokens(stream, scores, dropping.counts(stage, totals).kept)
            extra = None
            if method is sparsevlm:
                extra = recycled(visual, scores, stream, stage, jnp.sum(totals, axis=1), room, dropping)
            visual, stream, raters = after_drop(
                visual, stream, raters, kept, extra, room.kept + room.clusters, renumber=method.RENUMBERS
            )
            shift = jnp.sum(totals - sample_sizes(stream), axis=1, dtype=totals.dtype)
            drops.append(Dropped(stream.visual_segments, shift if method.RENUMBERS else jnp.zeros_like(shift)))
        before = layer, visual, text
        visual, text = _layer(before, stream, arch, record, keep_visual or index < arch.text.num_layers - 1, remat)
    return visual, text, tuple(drops)


def _layer(
    states: tuple[Params, Array, Array],
    stream: TokenStream,
    arch: Architecture,
    record: Record,
    keep_visual: bool,
    remat: Remat,
) -> tuple[Array, Array]:
    def run(layer: Params, visual: Array, text: Array) -> tuple[Array, Array, KeysValues]:
        return joint_layer(layer, *layer_input((visual, text)), stream, arch, keep_visual=keep_visual)

    visual, text, both = recomputed(run, remat)(*states)
    count = states[1].shape[1]
    for kind, part in (("self", np.s_[:count]), ("text", np.s_[count:])):
        record(kind, jax.tree.map(lambda x, part=part: x[:, part], both))
    return visual, text


def sample_sizes(stream: TokenStream) -> Int[Array, "B S"]:
    """The number of visual tokens of each segment; that of padding, 0, counts as 0. A segment has a text token."""
    numbers = jnp.arange(stream.text_segments.shape[1] + 1)
    of_segment = stream.visual_segments[:, :, None] == numbers[None, None]
    return jnp.where(numbers == 0, 0, jnp.sum(of_segment, axis=1, dtype=jnp.int32))


def kept_tokens(stream: TokenStream, scores: Float[Array, "B Nv"], wanted: Int[Array, "B S"]) -> Bool[Array, "B Nv"]:
    """The `wanted` best visual tokens of each segment; of equal scores the first.

    Each device chooses in its own rows.
    """

    def of_rows(segments: Array, scores: Array, wanted: Array) -> Array:
        def of_row(segments: Array, scores: Array, wanted: Array) -> Array:
            return rank_within(segments, scores, segments > 0) < wanted[segments]

        return jax.vmap(of_row)(segments, scores, wanted)

    spec = PartitionSpec(sample_axes(scores.shape[0]))
    return on_each_device(of_rows, spec, spec)(stream.visual_segments, scores, wanted)


def after_drop(
    visual: Float[Array, "B Nv D"],
    stream: TokenStream,
    raters: Raters,
    kept: Bool[Array, "B Nv"],
    extra: Recycled | None,
    room: int,
    *,
    renumber: bool,
) -> tuple[Float[Array, "B Nv_next D"], TokenStream, Raters]:
    """The kept tokens in their order, then `extra` ones, in `room` places, padding last.

    `renumber` closes the gaps in position ids; `extra` tokens, of rows with one sample, stand behind the kept ones.
    """
    segments, positions, text_positions = stream.visual_segments, stream.visual_positions, stream.text_positions
    if renumber:
        gone = (segments > 0) & ~kept
        positions = positions - _gone_before(positions, segments, stream, gone)
        text_positions = text_positions - _gone_before(text_positions, stream.text_segments, stream, gone)
    if extra is not None:
        last = jnp.max(jnp.where(segments > 0, stream.visual_positions, -1), axis=1, keepdims=True)
        added = jnp.sum(extra.valid, axis=1, keepdims=True, dtype=text_positions.dtype)
        text_positions = text_positions + jnp.where(stream.text_positions > last, added, 0)
        first = last + 1 - jnp.sum((segments > 0) & ~kept, axis=1, keepdims=True, dtype=last.dtype)
        behind = first + jnp.arange(extra.valid.shape[1], dtype=first.dtype)[None]
        visual = jnp.concatenate([visual, extra.tokens], axis=1)
        positions = jnp.concatenate([positions, behind], axis=1)
        segments = jnp.concatenate([segments, extra.valid.astype(segments.dtype)], axis=1)
        kept = jnp.concatenate([kept, extra.valid], axis=1)
    order = jnp.argsort(~kept, axis=1, stable=True)[:, :room]

    def at_kept(x: Array) -> Array:
        places = order.reshape(*order.shape, *[1] * (x.ndim - 2))
        valid = jnp.take_along_axis(kept, order, axis=1).reshape(places.shape)
        return jnp.where(valid, jnp.take_along_axis(x, places, axis=1), 0)

    stream = stream._replace(
        visual_positions=at_kept(positions),
        visual_segments=at_kept(segments),
        text_positions=text_positions,
        order=None,
    )
    rated = raters._replace(visual=None if raters.visual is None else at_kept(raters.visual))
    return at_kept(visual), with_order(stream), rated


def _gone_before(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"], stream: TokenStream, gone: Bool[Array, "B Nv"]
) -> Int[Array, "B T"]:
    """How many dropped visual tokens of its segment stand before each token."""
    before = stream.visual_positions[:, None] < positions[:, :, None]
    same = stream.visual_segments[:, None] == segments[:, :, None]
    return jnp.sum(before & same & gone[:, None], axis=2, dtype=positions.dtype)
