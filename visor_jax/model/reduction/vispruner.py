"""VisPruner (Zhang et al., ICCV 2025): keeps the patches of a tile that attention favors, and the least alike others.

A part of the kept tokens (`important_share`) is chosen by the attention that patches receive in the tower's last layer.
The others, in the order of attention, lose duplicates in rounds: every second one is compared with those between
(cosine of the tower's features), and the up to eight with the most similar partner go; the remaining ones, by falling
similarity, are put before their partners for the next round. The authors' code expects an even number of tokens in each
round; of an odd number the last one is compared as well, which SigLIP's 729 patches need. A round never drops more than
it compares.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import ReductionArchitecture
from visor_jax.model.reduction.base import Choice, Pool, members_of, unit_vectors

READS = ("features", "last")
MERGES = False
ROUND = 8  # tokens that a round drops at most


def choose(pool: Pool, reduction: ReductionArchitecture, num_tiles: int, patches: int) -> Choice:
    """See `visor_jax.model.reduction.base`."""
    members = members_of(pool.tiles, num_tiles, patches)
    of_tile = jax.vmap(lambda features, scores, valid: choose_tile(features, scores, valid, reduction))
    kept = of_tile(members.of(pool.features), members.of(pool.last), members.valid)
    return Choice(members.spread(kept, jnp.zeros(pool.tiles.shape, bool)))


def choose_tile(
    features: Float[Array, "P Dv"],
    scores: Float[Array, " P"],
    valid: Bool[Array, " P"],
    reduction: ReductionArchitecture,
) -> Bool[Array, " P"]:
    """Which patches of a tile remain."""
    count = len(valid)
    size = jnp.sum(valid, dtype=jnp.int32)
    total = reduction.kept(size)
    important = reduction.important(total)
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True).astype(jnp.int32)
    rest = jnp.take(order, jnp.arange(count) + important, mode="clip")  # its first size - important ones count
    left = jnp.where(total > important, size - important, 0)
    rest, left = without_duplicates(rest, left, total - important, unit_vectors(features))
    kept = jnp.zeros(count, bool).at[jnp.where(jnp.arange(count) < important, order, count)].set(True, mode="drop")
    return kept.at[jnp.where(jnp.arange(count) < left, rest, count)].set(True, mode="drop")


def without_duplicates(
    items: Int[Array, " P"], left: Int[Array, ""], wanted: Int[Array, ""], directions: Float[Array, "P Dv"]
) -> tuple[Int[Array, " P"], Int[Array, ""]]:
    """Drops duplicates among the first `left` items, tokens of these directions, until `wanted` of them are left."""
    similarity = directions @ directions.T
    evens, odds = jnp.arange(len(items))[0::2], jnp.arange(len(items))[1::2]

    def one_round(state: tuple[Int[Array, " P"], Int[Array, ""]]) -> tuple[Int[Array, " P"], Int[Array, ""]]:
        items, left = state
        compared = (left + 1) // 2
        dropped = jnp.minimum(jnp.minimum(ROUND, left - wanted), compared)
        pairs = similarity[items[evens][:, None], items[odds][None]]
        nearest = jnp.max(pairs, axis=1, where=(odds < left)[None], initial=-jnp.inf)
        by_similarity = jnp.argsort(jnp.where(evens < left, -nearest, jnp.inf), stable=True)
        place = jnp.arange(len(items))
        survivor = items[evens][jnp.take(by_similarity, place + dropped, mode="clip")]
        partner = jnp.take(items[odds], place - (compared - dropped), mode="clip")
        return jnp.where(place < compared - dropped, survivor, partner), left - dropped

    return jax.lax.while_loop(lambda state: state[1] > wanted, one_round, (items, left))
