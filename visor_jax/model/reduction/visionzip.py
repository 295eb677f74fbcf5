"""VisionZip (Yang et al., CVPR 2025): keeps the patches of a tile that attention favors, and merges the others.

The dominant ones receive the most attention in the tower's last layer. Of the others, in their order, every s-th is a
center; each one that is none joins the center with the most similar key (cosine of the last layer's keys, mean over
heads). A contextual token is its center plus the mean of those that joined it, of the tower's features: the connector
runs on kept tokens only. Contextual tokens follow the dominant ones of their base tile, or of the crops of their
picture. Newlines after rows of crops are dropped, the newline of a picture of a single tile stays last.

`contextual_share` divides the kept tokens, to the nearest number. SigLIP has no class token; the authors' code for CLIP
ranks by its attention and keeps it as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import ReductionArchitecture
from visor_jax.model.reduction.base import CENTER, NEWLINE, Choice, Pool, members_of, rank_within, unit_vectors

READS = ("last", "keys")
MERGES = True


def choose(pool: Pool, reduction: ReductionArchitecture, num_tiles: int, patches: int) -> Choice:
    """See `visor_jax.model.reduction.base`."""
    members = members_of(pool.tiles, num_tiles, patches)
    of_tile = jax.vmap(lambda keys, scores, valid: choose_tile(keys, scores, valid, reduction))
    kept, is_center, target = of_tile(members.of(pool.keys), members.of(pool.last), members.valid)
    target = jnp.take_along_axis(members.places, target, axis=1)  # from places in tiles to places in the pool
    is_newline = (pool.pictures > 0) & (pool.tiles == 0)
    turn = jnp.where(is_newline, NEWLINE, members.spread(jnp.where(is_center, CENTER, 0), jnp.zeros_like(pool.tiles)))
    itself = jnp.arange(pool.tiles.size, dtype=pool.tiles.dtype).reshape(pool.tiles.shape)
    return Choice(members.spread(kept, is_newline), turn, members.spread(target, itself))


def choose_tile(
    keys: Float[Array, "P E"], scores: Float[Array, " P"], valid: Bool[Array, " P"], reduction: ReductionArchitecture
) -> tuple[Bool[Array, " P"], Bool[Array, " P"], Int[Array, " P"]]:
    """Which patches of a tile remain, which of these are centers, and the patch that each one joins or is."""
    count = len(valid)
    size = jnp.sum(valid, dtype=jnp.int32)
    total = reduction.kept(size)
    contextual = reduction.contextual(total)
    dominant = rank_within(jnp.zeros(count, jnp.int32), scores, valid) < total - contextual
    rest = valid & ~dominant
    place = jnp.cumsum(rest, dtype=jnp.int32) - 1  # among the rest
    step = jnp.maximum(size - (total - contextual), 1) // jnp.maximum(contextual, 1)
    is_center = rest & (place % step == 0) & (place // step < contextual)

    most = reduction.contextual(reduction.kept(count))  # a whole tile has the most
    centers = jnp.argsort(~is_center, stable=True)[:most]
    directions = unit_vectors(keys)
    similarity = jnp.where((jnp.arange(most) < contextual)[None], directions @ directions[centers].T, -jnp.inf)
    itself = jnp.arange(count)
    if most == 0:
        return dominant, is_center, itself
    joins = rest & ~is_center & (contextual > 0)
    return dominant | is_center, is_center, jnp.where(joins, centers[jnp.argmax(similarity, axis=1)], itself)
