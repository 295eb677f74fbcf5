"""HiRED (Arif et al., AAAI 2025): keeps patches that attention favors; crops that show more may keep more.

Of a picture's kept tokens the base tile has the share `base_share`, those of its patches that receive the most
attention in the tower's last layer. The 1 - `base_share` of the base tile's patches that receive the most attention in
the first layer are marked; a crop's part of the other kept tokens is that of the marks that count for it
(`visor_jax.data.candidates`), at most its size. What rounding down leaves goes to the most attended patches of the
crops that are not chosen yet, so that the number does not depend on values; the authors' code leaves it. A tile without
crops keeps its most attended patches. Newlines remain, as in the authors' packing of rows of crops.

SigLIP has no class token: attention is that which a patch receives, mean over heads and queries.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import ReductionArchitecture
from visor_jax.model.reduction.base import Choice, Pool, rank_within

READS = ("last", "first")
MERGES = False


def choose(pool: Pool, reduction: ReductionArchitecture, num_tiles: int, patches: int) -> Choice:
    """See `visor_jax.model.reduction.base`."""
    flat = (x.reshape(-1) for x in (pool.tiles, pool.pictures, pool.marks, pool.last, pool.first))
    kept = choose_patches(*flat, reduction=reduction, num_tiles=num_tiles, patches=patches)
    is_newline = (pool.pictures > 0) & (pool.tiles == 0)
    return Choice(kept.reshape(pool.tiles.shape) | is_newline)


def choose_patches(
    tiles: Int[Array, " N"],
    pictures: Int[Array, " N"],
    marks: Int[Array, " N"],
    last: Float[Array, " N"],
    first: Float[Array, " N"],
    *,
    reduction: ReductionArchitecture,
    num_tiles: int,
    patches: int,
) -> Bool[Array, " N"]:
    """Which candidates of all pictures of a pool remain, newlines aside; arguments as the fields of `Pool`."""

    def sums(where: Int[Array, " N"], counted: Bool[Array, " N"]) -> Int[Array, " n"]:
        """How many are counted for each tile, or for each picture at its first tile; [0] is for none."""
        return jnp.zeros(num_tiles + 1, jnp.int32).at[where].add(counted.astype(jnp.int32), mode="drop")

    is_base, is_crop = (tiles > 0) & (tiles == pictures), (tiles > 0) & (tiles != pictures)
    of_crops = sums(pictures, is_crop)
    total = reduction.kept(sums(pictures, is_base) + of_crops)  # [n + 1], as all below
    base = jnp.clip(jnp.where(of_crops > 0, reduction.of_base(total), total), total - of_crops)
    base = jnp.minimum(base, sums(pictures, is_base))

    marked = rank_within(pictures, first, is_base) < reduction.marked(patches)
    of_crop, of_picture = sums(marks, marked & is_base), sums(pictures, marked & is_base)
    picture_of = jnp.zeros(num_tiles + 1, jnp.int32).at[tiles].max(pictures)  # of each tile
    share = (total - base)[picture_of] * of_crop // jnp.maximum(of_picture[picture_of], 1)
    quota = jnp.minimum(share, sums(tiles, is_crop))

    chosen = is_crop & (rank_within(tiles, last, is_crop) < quota[tiles])
    others = is_crop & ~chosen
    rest = (total - base) - sums(pictures, chosen)
    chosen |= others & (rank_within(pictures, last, others) < rest[pictures])
    return chosen | (is_base & (rank_within(pictures, last, is_base) < base[pictures]))
