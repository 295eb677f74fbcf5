"""DivPrune (Alvar et al., CVPR 2025): keeps the tokens of a picture that are least alike.

Distance is 1 - cosine of tokens after the connector. The first token is the one farthest from its nearest neighbor;
each further one is the one farthest from its nearest chosen token (max-min), over all tokens of the picture, newlines
among them. Unlike the authors' code it never chooses a token twice, which there happens once only copies of chosen
tokens remain, and it keeps the share rounded up, not to the nearest number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import ReductionArchitecture
from visor_jax.model.reduction.base import Choice, Pool, unit_vectors

READS = ("tokens",)
MERGES = False
BLOCK = 256  # tokens whose distances to all others are in memory at once


def choose(pool: Pool, reduction: ReductionArchitecture, num_tiles: int, patches: int) -> Choice:
    """See `visor_jax.model.reduction.base`."""
    del num_tiles, patches
    return Choice(
        jax.vmap(lambda tokens, pictures: choose_row(tokens, pictures, reduction))(pool.tokens, pool.pictures)
    )


def choose_row(
    tokens: Float[Array, "N D"], pictures: Int[Array, " N"], reduction: ReductionArchitecture
) -> Bool[Array, " N"]:
    """Which tokens of one row remain; `pictures` is the same number within a picture, and 0 at padding."""
    count, used = len(pictures), pictures > 0
    begins = used & (pictures != jnp.concatenate([jnp.zeros(1, pictures.dtype), pictures[:-1]]))
    ordinal = jnp.where(used, jnp.cumsum(begins), 0)  # 1, 2, ... in the order of the row
    sizes = jnp.zeros(count + 1, pictures.dtype).at[ordinal].add(1).at[0].set(0)
    ends = jnp.cumsum(reduction.kept(sizes))
    directions = unit_vectors(tokens)
    alone = nearest_distances(directions, ordinal)

    def step(
        slot: Int[Array, ""], state: tuple[Bool[Array, " N"], Float[Array, " N"]]
    ) -> tuple[Bool[Array, " N"], Float[Array, " N"]]:
        kept, nearest = state
        picture = jnp.searchsorted(ends, slot, side="right")
        is_first = slot == ends[picture - 1]
        own = ordinal == picture
        best = jnp.argmax(jnp.where(own & ~kept, jnp.where(is_first, alone, nearest), -jnp.inf))
        distances = 1 - directions @ directions[best]
        return kept.at[best].set(True), jnp.where(own, jnp.minimum(nearest, distances), nearest)

    start = jnp.zeros(count, bool), jnp.full(count, jnp.inf, directions.dtype)
    return jax.lax.fori_loop(0, ends[-1], step, start)[0]


def nearest_distances(directions: Float[Array, "N D"], ordinal: Int[Array, " N"]) -> Float[Array, " N"]:
    """The distance of each token to the nearest other one of its picture; infinite if there is none."""
    count = len(ordinal)
    block = min(BLOCK, count)
    places = jnp.arange(-(-count // block) * block).reshape(-1, block)

    def of_block(own: Int[Array, " block"]) -> Float[Array, " block"]:
        inside = jnp.minimum(own, count - 1)
        distances = 1 - directions[inside] @ directions.T
        others = (ordinal[inside][:, None] == ordinal[None]) & (inside[:, None] != jnp.arange(count)[None])
        return jnp.min(jnp.where(others, distances, jnp.inf), axis=1)

    return jax.lax.map(of_block, places).reshape(-1)[:count]
