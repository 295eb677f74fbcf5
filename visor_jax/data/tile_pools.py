"""Moves the tiles of a batch of single questions into pools that are hardly larger than what the batch holds.

In: arrays of a batch with one pool per row, each with room for the largest pictures of all questions. Out: the inputs
of the vision tower with one pool for neighboring rows. The mean picture of LLaVA-OneVision's mixture has 6 tiles and
the largest one 37, so the tower would otherwise read mostly padding. Pools come in few sizes (`tile_bucket`), because
each size is a compiled program.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from visor_jax.architecture import Architecture
from visor_jax.data.candidates import candidate_arrays, moved
from visor_jax.data.tiles import tile_shapes

Arrays = Mapping[str, np.ndarray]


def tower_inputs(arch: Architecture) -> tuple[str, ...]:
    """Returns the names of a batch's arrays that V(0) is computed from, and nothing else is.

    A reduction also reads `visual_segments`.
    """
    return (*tile_shapes(0, arch), "visual_gather", "visual_weights", *candidate_arrays(arch))


def without_tower_inputs(arrays: Arrays, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns the arrays that are read after V(0) is computed."""
    read = tower_inputs(arch)
    return {name: x for name, x in arrays.items() if name not in read}


def tile_bucket(count: int) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `count`."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def tiles_of_rows(arrays: Arrays, arch: Architecture) -> Int[np.ndarray, " B"]:
    """Returns how many tiles each row reads, of a batch with one pool per row. Black tiles count, padding does not."""
    gather, patches = arrays["visual_gather"], arch.vision.patches_per_tile
    of_tiles = (arrays["visual_weights"] > 0) & (gather < arrays["tiles"].shape[1] * patches)
    return np.where(of_tiles, gather // patches + 1, 0).max(axis=(1, 2))


def in_pools(arrays: Arrays, num_pools: int, arch: Architecture) -> dict[str, np.ndarray]:
    """Returns the arrays that `model.visor.encode` reads, with `num_pools` pools instead of one per row.

    V(0) of every row remains the same.

    Args:
      arrays: of a batch with one pool per row; `num_pools` divides its rows.
      num_pools: the number of devices that share the rows.
      arch: of the model.
    """
    num_rows, room = arrays["tiles"].shape[:2]
    rows_per_pool, counts = num_rows // num_pools, tiles_of_rows(arrays, arch)
    size = min(tile_bucket(int(counts.reshape(num_pools, -1).sum(axis=1).max())), rows_per_pool * room)
    names = (*tower_inputs(arch), "visual_segments")
    pooled = {name: np.array(arrays[name]) for name in names if name not in tile_shapes(0, arch)}
    for name, (shape, dtype) in tile_shapes(size, arch).items():
        pooled[name] = np.zeros((num_pools, *shape), dtype)
    for row, count in enumerate(counts):
        pool, place = divmod(row, rows_per_pool)
        before = int(counts[row - place : row].sum())
        for name in tile_shapes(0, arch):
            pooled[name][pool, before : before + count] = arrays[name][row, :count]
        pooled["visual_gather"][row] = moved_gather(
            arrays["visual_gather"][row], (room, before, size), arch.vision.patches_per_tile
        )
        for name in candidate_arrays(arch):
            pooled[name][row] = moved(arrays[name][row], before)
    return pooled


def moved_gather(gather: np.ndarray, tiles: tuple[int, int, int], patches: int) -> np.ndarray:
    """Returns feature indices of tiles that are now in a pool; the newline's index is the one behind all tiles.

    Args:
      gather: indices among the tiles where they were.
      tiles: how many tiles there were, how many precede them in the pool, and how many the pool has.
      patches: of a tile.
    """
    there, before, pool = tiles
    return np.where(gather == there * patches, pool * patches, gather + before * patches).astype(gather.dtype)
