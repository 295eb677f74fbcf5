"""The tower's input: tiles, and for each patch of a tile its position, its picture and the statistics of its pixels.

In: pictures and an `Architecture`. Out: arrays by name; a batch has them with a leading axis of pools.

- Every run has `tiles`, uint8 [n, S, S, 3]. A tile is a grid of cells of one patch each; the cells row by row are its
  *places* 0..P-1.
- `data.small_pictures` adds `tile_positions` and `tile_segments`, int32 [n, P]. A picture to which its source gives an
  origin keeps its size: its patches lie row by row in neighboring places of one tile, with the position embeddings of
  its window and a segment of its own, so that patches of other pictures in the tile are not seen. Segment 0: unused.
- `model.anyres.standardize` adds `tile_means` and `tile_scales`, float32 [n, P]: the tower reads (value - mean) * scale
  of each pixel (0..255). Both are those of the picture that the place belongs to: of a picture in several tiles
  those of its first tile, which shows all of it, of a video those of each frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.data import anyres
from visor_jax.data.anyres import Layout
from visor_jax.data.sample import SkipSample

Origin = tuple[int, int]  # row and column in the tile's grid of patches
Arrays = dict[str, np.ndarray]


def tile_shapes(num_tiles: int, architecture: Architecture) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of every array of `num_tiles` tiles."""
    vision, places = architecture.vision, (num_tiles, architecture.vision.patches_per_tile)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "tiles": ((num_tiles, vision.tile_size, vision.tile_size, 3), np.uint8)
    }
    if architecture.anyres.small_pictures:
        shapes |= {"tile_positions": (places, np.int32), "tile_segments": (places, np.int32)}
    if architecture.anyres.standardize:
        shapes |= {"tile_means": (places, np.float32), "tile_scales": (places, np.float32)}
    return shapes


def layout_of(sizes: Sequence[Sequence[int]], architecture: Architecture, origin: Origin | None = None) -> Layout:
    """Returns the layout of one sample's pictures and videos, by their sizes; the first place of a small one is 0.

    Raises:
        SkipSample: "small_picture": there is an origin, and the picture does not fit its tile from there.
    """
    if origin is None:
        return anyres.visual_layout(sizes, architecture)
    return anyres.small_layout(*_grid(sizes, origin, architecture), architecture)


def make_tiles(images: Sequence[np.ndarray], architecture: Architecture, origin: Origin | None = None) -> Arrays:
    """Returns the arrays of one sample's pictures and videos, in the order of `layout_of`.

    Args:
        images: uint8 [H, W, 3] or [F, H, W, 3] each.
        architecture: only `vision` and `anyres` are read.
        origin: where the one picture stands in its tile; None: pictures fill whole tiles.

    Raises:
        SkipSample: as `layout_of`.
    """
    if origin is not None:
        return _small(images, architecture, origin)
    tiles = anyres.cut_tiles(images, architecture)
    arrays, places = {"tiles": tiles}, (len(tiles), architecture.vision.patches_per_tile)
    if architecture.anyres.small_pictures:
        arrays["tile_positions"] = np.broadcast_to(np.arange(places[1], dtype=np.int32), places)
        arrays["tile_segments"] = np.ones(places, np.int32)
    if architecture.anyres.standardize:
        values = np.array(_of_pictures(tiles, images, architecture), np.float32).reshape(-1, 2, 1)
        arrays["tile_means"], arrays["tile_scales"] = (np.broadcast_to(values[:, i], places) for i in range(2))
    return arrays


def statistics(pixels: np.ndarray) -> tuple[float, float]:
    """Returns mean and inverse deviation over all values of a picture, uint8.

    Sums are exact and the rest is rounded once per operation, so the result is the same on every machine. The deviation
    is at least 1 / sqrt(number of values), as in the per-image standardization of TensorFlow, in units of pixel values.
    """
    values = pixels.reshape(-1).astype(np.float64)
    count, total, squares = values.size, int(values.sum()), int(values @ values)
    deviation = math.sqrt(count * squares - total * total) / count
    return total / count, 1 / max(deviation, 1 / math.sqrt(count))


def _of_pictures(
    tiles: np.ndarray, images: Sequence[np.ndarray], architecture: Architecture
) -> list[tuple[float, float]]:
    """Returns the statistics for each tile: of its picture's first tile, or of the frame itself."""
    num_images = sum(image.ndim == 3 for image in images)
    found: list[tuple[float, float]] = []
    for image in images:
        count, start = anyres.tile_count(image.shape[:-1], architecture, num_images), len(found)
        if image.ndim == 4:
            found += [statistics(tiles[start + frame]) for frame in range(count)]
        else:
            found += [statistics(tiles[start])] * count
    return found


# --- small pictures ---------------------------------------------------------------------------------------------------


def cells(tiles: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Returns a view of tiles [..., S, S, 3] as grids of patches [..., side, side, p, p, 3]."""
    side, patch = architecture.vision.patches_per_side, architecture.vision.patch_size
    inside = tiles[..., : side * patch, : side * patch, :]
    return inside.reshape(*tiles.shape[:-3], side, patch, side, patch, 3).swapaxes(-4, -3)


def place_patches(tile: np.ndarray, first: int, patches: np.ndarray, architecture: Architecture) -> None:
    """Writes patches [m, p, p, 3] to the places `first`, `first` + 1, ... of a tile [S, S, 3]."""
    rows, columns = np.divmod(np.arange(first, first + len(patches)), architecture.vision.patches_per_side)
    cells(tile, architecture)[rows, columns] = patches


def patches_at(tile: np.ndarray, count: int, architecture: Architecture) -> np.ndarray:
    """Returns the patches at the first `count` places of a tile [S, S, 3]: uint8 [count, p, p, 3]."""
    rows, columns = np.divmod(np.arange(count), architecture.vision.patches_per_side)
    return cells(tile, architecture)[rows, columns]


def _small(images: Sequence[np.ndarray], architecture: Architecture, origin: Origin) -> Arrays:
    """Returns the arrays of a small picture, at the first places of one tile."""
    height, width = _grid([image.shape[:-1] for image in images], origin, architecture)
    vision, (image,), count = architecture.vision, images, height * width
    side, patch = vision.patches_per_side, vision.patch_size
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in tile_shapes(1, architecture).items()}
    patches = image.reshape(height, patch, width, patch, 3).swapaxes(1, 2).reshape(count, patch, patch, 3)
    place_patches(arrays["tiles"][0], 0, patches, architecture)
    window = (origin[0] + np.arange(height)[:, None]) * side + origin[1] + np.arange(width)
    arrays["tile_positions"][0, :count] = window.reshape(-1)
    arrays["tile_segments"][0, :count] = 1
    if architecture.anyres.standardize:
        arrays["tile_means"][0, :count], arrays["tile_scales"][0, :count] = statistics(image)
    return arrays


def _grid(sizes: Sequence[Sequence[int]], origin: Origin, architecture: Architecture) -> tuple[int, int]:
    """Returns rows and columns of a small picture's patches.

    Raises:
        SkipSample: "small_picture".
    """
    side, patch = architecture.vision.patches_per_side, architecture.vision.patch_size
    if len(sizes) != 1 or len(sizes[0]) != 2:
        raise SkipSample(
            "small_picture", f"an origin belongs to one picture; the sample has sizes {[*map(tuple, sizes)]}"
        )
    (height, width), (row, column) = sizes[0], origin
    if height % patch or width % patch or not height or not width:
        raise SkipSample("small_picture", f"{height}x{width} pixels: expected multiples of patches of {patch}")
    rows, columns = height // patch, width // patch
    if min(row, column) < 0 or row + rows > side or column + columns > side:
        raise SkipSample(
            "small_picture", f"{rows}x{columns} patches from {origin} exceed the tile's grid of {side}x{side}"
        )
    return rows, columns
