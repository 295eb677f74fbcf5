"""Reductions that choose visual tokens by their values: the interface, and what the methods share.

Two parties divide the work. The data pipeline decides from layouts alone how many tokens a picture keeps, and gives the
kept tokens of each row consecutive places, position ids and segments, as if the picture had had no others
(`visor_jax.data.candidates`). A method decides on the device which candidates these are. So shapes never depend on
values, every later layer runs on Nv tokens instead of N, and nothing else in the model knows of a reduction.

Packing and "m3" average neighbors whatever their values are: they are layouts (`visor_jax.data.anyres`), not methods of
this folder. A method is one file with `READS`, the fields of `Pool` that it reads besides places, `MERGES`, whether it
merges features before the connector, and

    choose(pool: Pool, reduction: ReductionArchitecture, num_tiles: int, patches: int) -> Choice

on the candidates of one pool of tiles: R rows of N candidates, which read `num_tiles` tiles of `patches` patches. It
chooses exactly as many as the layout says, never padding, and has no gradient; the tokens that it chooses have theirs.
`visor_jax.model.reduction.api` reads the candidates, calls it for every pool, and takes what was chosen, in the order
of the row: raster order within the base tile and within the stitched map of the crops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

CENTER, NEWLINE = 1, 2  # turns of kept tokens after those of turn 0


class Pool(NamedTuple):
    """The candidates of the rows that share a pool of tiles. Fields that the method does not read are None.

    Attributes:
      tiles: int [R, N], 1 + the tile of a candidate in the pool; 0 at newlines and at padding.
      pictures: int [R, N], 1 + the first tile of its picture (`visor_jax.data.candidates`); 0 at padding.
      marks: int [R, N], 1 + the tile of the crop for which a patch of a base tile counts, or 0.
      tokens: float [R, N, D], V(0), after the connector.
      features: float [R, N, Dv], of the tower, before the connector.
      last, first: float [R, N], attention that a patch receives in the tower's last and first layer, mean over heads
        and queries. A candidate made of several patches has their weighted sum, as of features.
      keys: float [R, N, E], of the tower's last layer, mean over heads.
    """

    tiles: Int[Array, "R N"]
    pictures: Int[Array, "R N"]
    marks: Any = None
    tokens: Any = None
    features: Any = None
    last: Any = None
    first: Any = None
    keys: Any = None


class Choice(NamedTuple):
    """What a method chose.

    Attributes:
      kept: which candidates remain.
      turn: 0, `CENTER` or `NEWLINE`: in which order kept tokens of a base tile, or of the crops of a picture, follow
        each other; equal ones in the order of the row. None: in the order of the row.
      target: of methods that merge, the candidate of the pool (row * N + place) into which each one is merged; kept
        ones, and those that are dropped, name themselves.
    """

    kept: Bool[Array, "R N"]
    turn: Int[Array, "R N"] | None = None
    target: Int[Array, "R N"] | None = None


def rank_within(groups: Int[Array, " N"], scores: Float[Array, " N"], members: Bool[Array, " N"]) -> Int[Array, " N"]:
    """The rank of each member in its group by falling score, from 0; equal scores in order. Not members: N."""
    count = groups.shape[0]
    keys = (jnp.where(members, groups, jnp.iinfo(groups.dtype).max), -scores, jnp.arange(count, dtype=groups.dtype))
    ordered, _, places = jax.lax.sort(keys, num_keys=3)
    ranks = jnp.arange(count) - jnp.searchsorted(ordered, ordered)
    return jnp.where(members, jnp.zeros(count, groups.dtype).at[places].set(ranks.astype(groups.dtype)), count)


class Members(NamedTuple):
    """The candidates of each tile, in their order: their places in the pool, and which of the P places are used."""

    places: Int[Array, "n P"]
    valid: Bool[Array, "n P"]

    def of(self, values: Shaped[Array, "R N ..."]) -> Shaped[Array, "n P ..."]:
        """Values [R, N, ...] of candidates by tile: [n, P, ...]; those of unused places are arbitrary."""
        return values.reshape(-1, *values.shape[2:])[self.places]

    def spread(self, values: Shaped[Array, "n P"], fill: Shaped[Array, "R N"]) -> Shaped[Array, "R N"]:
        """Values [n, P] of tiles' candidates as [R, N], with those of `fill` [R, N] where a candidate has no tile."""
        places = jnp.where(self.valid, self.places, fill.size)
        return fill.reshape(-1).at[places].set(values.astype(fill.dtype), mode="drop").reshape(fill.shape)


def members_of(tiles: Int[Array, "R N"], num_tiles: int, patches: int) -> Members:
    """Sorts the candidates of a pool by tile; a tile has at most as many as it has patches."""
    flat = tiles.reshape(-1)
    order = jnp.argsort(jnp.where(flat > 0, flat, num_tiles + 1), stable=True)
    sizes = jnp.zeros(num_tiles + 1, tiles.dtype).at[flat].add(1, mode="drop")[1:]  # [n]
    starts = jnp.cumsum(sizes) - sizes
    inside = jnp.arange(patches, dtype=tiles.dtype)[None]
    places = order[jnp.minimum(starts[:, None] + inside, flat.size - 1)]
    return Members(places.astype(tiles.dtype), inside < sizes[:, None])


def unit_vectors(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors of length 1 in their directions; 0 remains 0."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1)
