"""Applies the reduction that the architecture names: from tiles to the visual tokens that the decoder reads.

In: parameters and a batch whose arrays name candidates (`visor_jax.data.candidates`). Out: V(0) [B, Nv, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.kernels.mesh import on_each_device, sample_axes
from visor_jax.kernels.precision import widened
from visor_jax.model.connector import connector, stitch
from visor_jax.model.encoders.siglip import tower, tower_with_attention
from visor_jax.model.layers import Params
from visor_jax.model.reduction import divprune, hired, visionzip, vispruner
from visor_jax.model.reduction.base import NEWLINE, Choice, Pool
from visor_jax.model.remat import Remat

METHODS: dict[str, ModuleType] = {
    "divprune": divprune, "vispruner": vispruner, "visionzip": visionzip, "hired": hired
}  # fmt: skip
OF_ATTENTION = ("last", "first", "keys")  # fields of a `Pool` that need the tower's attention


def reduced_tokens(
    params: Params, batch: Mapping[str, Any], arch: Architecture, *, remat: Remat = "none"
) -> Float[Array, "B Nv D"]:
    """The visual tokens that the reduction keeps; 0 at padding. Parameters and `remat` as of `visor.encode`."""
    method, fields = METHODS[arch.reduction.method], _fields_of(params, batch, arch, remat)
    places = places_of(batch, arch)
    choice = _choice(fields, places, batch, arch)
    order = order_of_kept(choice, places, batch["visual_segments"].shape[1])
    if method.MERGES:
        return merged_tokens(params, fields["features"], choice, order, places, batch)
    return at_kept(fields["tokens"], order, batch)


def kept_candidates(params: Params, batch: Mapping[str, Any], arch: Architecture) -> Bool[Array, "B N"]:
    """Which candidates of a batch the reduction keeps, newlines included."""
    return _choice(_fields_of(params, batch, arch, "none"), places_of(batch, arch), batch, arch).kept


def _fields_of(
    params: Params, batch: Mapping[str, Any], arch: Architecture, remat: Remat
) -> dict[str, Float[Array, "B N ..."]]:
    """What the method reads of the candidates, and what becomes of the kept ones: their tokens, or their features."""
    method = METHODS[arch.reduction.method]
    if any(name in method.READS for name in OF_ATTENTION):
        features, seen = tower_with_attention(
            params["vision"], batch, arch.vision, arch.anyres, remat=remat, with_first="first" in method.READS
        )
    else:
        features, seen = tower(params["vision"], batch, arch.vision, arch.anyres, remat=remat), None

    def at_candidates(values: Float[Array, "G n P C"]) -> Float[Array, "B N C"]:
        nothing = jnp.zeros(values.shape[-1], values.dtype)
        return stitch(values, nothing, batch["visual_gather"], batch["visual_weights"])

    fields = {}
    if "features" in method.READS or method.MERGES:
        fields["features"] = at_candidates(features)
    if not method.MERGES:
        tokens = connector(params["connector"], features)
        fields["tokens"] = stitch(tokens, params["image_newline"], batch["visual_gather"], batch["visual_weights"])
    for name in [name for name in OF_ATTENTION if name in method.READS]:
        values = getattr(seen, name)
        at = at_candidates(values.reshape(*features.shape[:3], -1))
        fields[name] = at.reshape(*at.shape[:2], *values.shape[3:])
    return fields


def _choice(
    fields: Mapping[str, Float[Array, "B N ..."]],
    places: Mapping[str, Int[Array, "B N"]],
    batch: Mapping[str, Any],
    arch: Architecture,
) -> Choice:
    method = METHODS[arch.reduction.method]
    read = {name: fields[name] for name in method.READS}
    return chosen(method, read, places, batch["tiles"].shape[:2], arch)


def places_of(batch: Mapping[str, Any], arch: Architecture) -> dict[str, Int[Array, "B N"]]:
    """The fields of `Pool` that say where candidates are."""
    pictures = jnp.asarray(batch["visual_pictures"])
    tile = jnp.asarray(batch["visual_gather"])[..., 0] // arch.vision.patches_per_tile
    is_patch = (pictures > 0) & (tile < batch["tiles"].shape[1])
    places = {"tiles": jnp.where(is_patch, tile + 1, 0), "pictures": pictures}
    return places | ({"marks": jnp.asarray(batch["visual_marks"])} if "visual_marks" in batch else {})


def chosen(
    method: ModuleType,
    fields: Mapping[str, Float[Array, "B N ..."]],
    places: Mapping[str, Int[Array, "B N"]],
    pools: tuple[int, int],
    arch: Architecture,
) -> Choice:
    """What a method chooses in each of `pools` (their number, tiles of one), as arrays [B, N].

    Each device chooses in its own pools.
    """
    num_pools, num_tiles = pools
    wide = {name: widened(jax.lax.stop_gradient(x)) for name, x in fields.items()}
    by_pool = {name: x.reshape(num_pools, -1, *x.shape[1:]) for name, x in {**places, **wide}.items()}

    def of_pools(by_pool: dict[str, Array]) -> Choice:
        def of_one(pool: dict[str, Array]) -> Choice:
            return method.choose(Pool(**pool), arch.reduction, num_tiles, arch.vision.patches_per_tile)

        return jax.vmap(of_one)(by_pool)

    spec = PartitionSpec(sample_axes(num_pools))
    choice = on_each_device(of_pools, spec, spec)(by_pool)
    return jax.tree.map(lambda x: x.reshape(places["tiles"].shape), choice)


def order_of_kept(choice: Choice, places: Mapping[str, Int[Array, "B N"]], count: int) -> Int[Array, "B Nv"]:
    """The candidates at the first `count` places of each row: kept ones in order, then any."""
    kept, block = choice.kept, jnp.zeros_like(places["tiles"])
    if choice.turn is not None:  # within a base tile, or the crops of a picture
        is_base = (places["tiles"] == 0) | (places["tiles"] == places["pictures"])
        part = 2 * places["pictures"] + is_base
        block = jnp.cumsum(jnp.diff(part, axis=1, prepend=part[:, :1]) != 0, axis=1, dtype=jnp.int32)
        block = block * (NEWLINE + 1) + choice.turn
    last = jnp.iinfo(block.dtype).max
    return jnp.argsort(jnp.where(kept, block, last), axis=1, stable=True)[:, :count]


def at_kept(
    values: Float[Array, "B N C"], order: Int[Array, "B Nv"], batch: Mapping[str, Any]
) -> Float[Array, "B Nv C"]:
    """Values [B, Nv, C] of kept candidates in order; 0 at padding."""
    kept = jnp.take_along_axis(values, order[..., None], axis=1)
    return jnp.where(jnp.asarray(batch["visual_segments"])[..., None] > 0, kept, 0)


def merged_tokens(
    params: Params,
    features: Float[Array, "B N Dv"],
    choice: Choice,
    order: Int[Array, "B Nv"],
    places: Mapping[str, Int[Array, "B N"]],
    batch: Mapping[str, Any],
) -> Float[Array, "B Nv D"]:
    """The kept tokens: features, plus the mean of those merged into each, through the connector; and newlines."""
    assert choice.target is not None, "a method with MERGES names targets"
    num_pools, size = batch["tiles"].shape[0], features.shape[-1]
    flat, target = features.reshape(num_pools, -1, size), choice.target.reshape(num_pools, -1)
    joins = target != jnp.arange(target.shape[1])[None]

    def add(values: Float[Array, "N C"], target: Int[Array, " N"], joins: Array) -> Float[Array, "N C"]:
        return jnp.zeros_like(values).at[target].add(jnp.where(joins[:, None], values, 0))

    counts = jax.vmap(add)(jnp.ones((*target.shape, 1), features.dtype), target, joins)
    merged = flat + jax.vmap(add)(flat, target, joins) / jnp.maximum(counts, 1)
    tokens = connector(params["connector"], at_kept(merged.reshape(features.shape), order, batch)[:, None])[:, 0]
    is_newline = jnp.take_along_axis(places["tiles"] == 0, order, axis=1)[..., None]
    tokens = jnp.where(is_newline, params["image_newline"].astype(tokens.dtype)[None, None], tokens)
    return jnp.where(jnp.asarray(batch["visual_segments"])[..., None] > 0, tokens, 0)
