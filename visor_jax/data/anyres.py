"""AnyRes: cuts pictures into tiles, and maps tile features to visual tokens.

In: pictures as uint8 [H, W, 3] arrays and videos as [F, H, W, 3], or only their (height, width) and (frames, height,
width), and an `Architecture`. Out: tiles for the vision tower, and a `Layout` that says which features make each visual
position. All counts of tiles and tokens (preprocessing, the model's shapes, `visor plan`) come from `_shape` and
`_frame_side` below, so they agree.

The arithmetic is LLaVA-OneVision's as transformers implements it (`LlavaOnevisionImageProcessorPil`,
`LlavaOnevisionModel.pack_image_features`, `apply_pooling`), rounding included:

- One picture in a prompt: the base tile is the picture stretched to one tile. The crops are the picture resized
  bicubically into the best pinpoint (aspect kept, `ceil`), centered on black, cut row by row. The crops' features are
  stitched, unpadded, and shrunk bilinearly if there are more than 1.1^2 * `max_tiles` tiles of them; each row ends in
  a newline.
- Several pictures in a prompt: each is padded to a square in the mean color and becomes one tile and one newline.
- A video: each frame is stretched to one tile, its map shrunk bilinearly to half a side; one newline ends the video.
- No pinpoints configured (not in transformers): each picture is one stretched tile and one newline.
- `anyres.packing` 2 or 4 (not in transformers): one position replaces 1 x 2 or 2 x 2 neighbors of a map, fewer at its
  right and lower edge; newlines are added after that. It is their mean, or the map shrunk bilinearly to that size, or
  ("shuffle") it takes the features of each neighbor; there is nothing past an edge.
- Reduction "m3" (not in transformers): each tile is a map of means of s x s patches, without the rows and columns that
  remain; all of the above applies to these maps.
- Reductions that choose tokens by their values: positions are candidates, and lengths count what is kept of them
  (`visor_jax.data.candidates`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image

from visor_jax.architecture import Architecture
from visor_jax.data.candidates import Candidates, candidates_of
from visor_jax.data.feature_maps import bilinear_taps, flattened, joined, packed, packed_size
from visor_jax.errors import RequestError

Size = tuple[int, int]  # (height, width)
AnySize = tuple[int, ...]  # (height, width) of a picture, or (frames, height, width) of a video

_SHRINK_ABOVE = 1.1  # linear factor over `max_tiles` tiles above which the stitched map is shrunk
_PAD_CHUNK_PIXELS = 1 << 24  # a padded square is resized in bands of at most this many pixels


@dataclass(frozen=True)
class Layout:
    """The features that make each visual position of one sample.

    Feature index `num_tiles * patches_per_tile` is the newline; smaller ones count patches of all tiles in order.

    Attributes:
        num_tiles: tiles of all pictures and frames.
        lengths: visual positions of each picture or video that the decoder reads; they sum to Nv.
        gather: int32 [N, K], feature indices; N is Nv, or the number of candidates of which a reduction keeps Nv; K is
            `packing`, times 4 if a map was shrunk, times s^2 of "m3".
        weights: float32 [N, K]; a visual position is the weighted sum of its K features. With packing "shuffle" feature
            k belongs to neighbor k modulo `packing`, whose weighted sum is taken `packing` times.
        pictures, marks: int32 [N], of candidates (`visor_jax.data.candidates`); otherwise None.
    """

    num_tiles: int
    lengths: tuple[int, ...]
    gather: np.ndarray
    weights: np.ndarray
    pictures: np.ndarray | None = None
    marks: np.ndarray | None = None


@dataclass(frozen=True)
class Shape:
    """A tiled picture in cells of the stitched map: the unpadded window, and its size after shrinking."""

    grid: tuple[int, int]  # rows and columns of crops
    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int

    @property
    def shrunk(self) -> bool:
        return (self.height, self.width) != (self.out_height, self.out_width)


def best_pinpoint(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Returns the pinpoint with the largest effective resolution for a picture; ties: least waste, then the first."""
    height, width = size
    best, best_key = pinpoints[0], (-1, 0.0)
    for candidate_height, candidate_width in pinpoints:
        scale = min(candidate_width / width, candidate_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        key = (effective, effective - candidate_width * candidate_height)
        if key > best_key:
            best, best_key = (candidate_height, candidate_width), key
    return best


def _is_tiled(num_images: int, architecture: Architecture) -> bool:
    return num_images == 1 and bool(architecture.anyres.pinpoints)


def _is_video(size: AnySize) -> bool:
    return len(size) == 3


def _cells_per_side(architecture: Architecture) -> int:
    """Returns the rows (and columns) of a tile's map: patches, or the windows of patches that "m3" averages."""
    return architecture.vision.patches_per_side // architecture.reduction.stride


def _patches(tile: np.ndarray | int, y: np.ndarray, x: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Returns the feature indices [..., s^2] of the patches of a tile's cells (y, x) [...]."""
    vision, stride = architecture.vision, architecture.reduction.stride
    rows, columns = np.divmod(np.arange(stride**2), stride)
    inside = (y[..., None] * stride + rows) * vision.patches_per_side + x[..., None] * stride + columns
    return np.asarray(tile)[..., None] * vision.patches_per_tile + inside


def _frame_side(architecture: Architecture) -> int:
    """Returns the rows (and columns) of features of one video frame after shrinking."""
    return -(-_cells_per_side(architecture) // 2)


def _shape(size: Size, architecture: Architecture) -> Shape:
    """Returns the shape of a tiled picture; the order of multiplications is transformers', for the same rounding."""
    tile, side = architecture.vision.tile_size, _cells_per_side(architecture)
    pinpoint_height, pinpoint_width = best_pinpoint(size, architecture.anyres.pinpoints)
    if pinpoint_height % tile or pinpoint_width % tile:
        raise RequestError(
            f"model.anyres.pinpoints: {pinpoint_height}x{pinpoint_width} pixels is not a multiple of tiles of {tile}"
        )
    rows, columns = pinpoint_height // tile, pinpoint_width // tile
    height, width = rows * side, columns * side
    top = left = 0
    if size[1] / size[0] > width / height:
        top = (height - int(round(size[0] * (width / size[1]), 7))) // 2
    else:
        left = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    height, width = height - 2 * top, width - 2 * left
    return Shape((rows, columns), top, left, height, width, *_shrunk((height, width), architecture))


def _shrunk(size: Size, architecture: Architecture) -> Size:
    """Returns the size of a stitched map after it was shrunk to about `max_tiles` tiles, if it is much larger."""
    height, width = size
    ratio = math.sqrt(height * width / (architecture.anyres.max_tiles * _cells_per_side(architecture) ** 2))
    return (int(height // ratio), int(width // ratio)) if ratio > _SHRINK_ABOVE else size


def tile_count(size: AnySize, architecture: Architecture, num_images: int = 1) -> int:
    """Returns the tiles of a picture or video of this size; `num_images` counts the prompt's pictures, not videos."""
    if _is_video(size):
        return size[0]
    if not _is_tiled(num_images, architecture):
        return 1
    rows, columns = _shape((size[0], size[1]), architecture).grid
    return 1 + rows * columns


def visual_token_count(size: AnySize, architecture: Architecture, num_images: int = 1) -> int:
    """Returns the visual tokens of a picture or video of this size, newlines included; arguments as `tile_count`.

    With a reduction these are the tokens that the decoder reads.
    """
    if architecture.reduction.selects:
        others = () if _is_video(size) else ((1, 1),) * (num_images - 1)
        return visual_layout((size, *others), architecture).lengths[0]
    if _is_video(size):
        return size[0] * frame_tokens(architecture) + 1
    if not _is_tiled(num_images, architecture):
        return tile_tokens(architecture) + 1
    shape = _shape((size[0], size[1]), architecture)
    rows, columns = packed_size((shape.out_height, shape.out_width), architecture.anyres)
    return tile_tokens(architecture) + rows * (columns + 1)


def whole_token_count(sizes: Sequence[AnySize], architecture: Architecture) -> int:
    """Returns the visual tokens of one sample's pictures and videos without packing and reduction."""
    num_images = sum(not _is_video(size) for size in sizes)
    return sum(visual_token_count(size, architecture.whole, num_images) for size in sizes)


@functools.lru_cache(maxsize=64)
def most_visual_tokens(architecture: Architecture, num_images: int = 1) -> int:
    """Returns the most visual tokens that `num_images` pictures of any sizes can have, newlines included.

    It is an upper limit for a reduction that chooses tokens: what this leaves out counts too.
    """
    if not _is_tiled(num_images, architecture):
        return num_images * (tile_tokens(architecture) + 1)
    tile, side = architecture.vision.tile_size, _cells_per_side(architecture)
    grids = {(height // tile, width // tile) for height, width in architecture.anyres.pinpoints}
    maps = (
        stitched_tokens(grid, axis, Fraction(shown, side), architecture)
        for grid in grids
        for axis in (0, 1)
        for shown in range(1, grid[axis] * side + 1)
    )
    return tile_tokens(architecture) + max(maps)


def tile_tokens(architecture: Architecture) -> int:
    """Returns the visual tokens of one whole tile, without newlines."""
    side = _cells_per_side(architecture)
    return math.prod(packed_size((side, side), architecture.anyres))


def frame_tokens(architecture: Architecture) -> int:
    """Returns the visual tokens of one video frame, without the newline that ends the video."""
    side = _frame_side(architecture)
    return math.prod(packed_size((side, side), architecture.anyres))


def stitched_tokens(grid: Size, axis: int, shown: Fraction, architecture: Architecture) -> int:
    """Returns the visual tokens of the map of all crops, newlines included.

    Args:
        grid: rows and columns of crops.
        axis: 0 or 1, the side of the map that has padding.
        shown: how many crops long the picture is along that side.
    """
    side = _cells_per_side(architecture)
    size = [rows * side for rows in grid]
    size[axis] -= 2 * ((size[axis] - int(shown * side)) // 2)
    rows, columns = packed_size(_shrunk((size[0], size[1]), architecture), architecture.anyres)
    return rows * (columns + 1)


def taps(architecture: Architecture) -> int:
    """Returns the largest K of any layout of pictures: `packing` or s^2, times 4 if some pinpoint may be shrunk."""
    tile = architecture.vision.tile_size
    limit = _SHRINK_ABOVE**2 * architecture.anyres.max_tiles * tile**2
    shrinks = any(height * width > limit for height, width in architecture.anyres.pinpoints)
    return (4 if shrinks else 1) * architecture.anyres.packing * architecture.reduction.stride**2


def video_taps(architecture: Architecture) -> int:
    """Returns the K of a layout of videos: each position of a frame is shrunk bilinearly out of four."""
    return 4 * architecture.anyres.packing * architecture.reduction.stride**2


def visual_layout(sizes: Sequence[Sequence[int]], architecture: Architecture) -> Layout:
    """Returns the layout of one sample's pictures and videos, in order.

    Args:
        sizes: (height, width) of each picture, (frames, height, width) of each video; may be empty.
        architecture: only `vision`, `anyres` and `reduction` are read.

    Returns:
        A `Layout` whose arrays are read-only, since layouts are cached.
    """
    return _cached_layout(tuple(tuple(int(n) for n in size) for size in sizes), architecture)


@functools.lru_cache(maxsize=64)
def _cached_layout(sizes: tuple[AnySize, ...], architecture: Architecture) -> Layout:
    num_images = sum(not _is_video(size) for size in sizes)
    counts = [tile_count(size, architecture, num_images) for size in sizes]
    num_tiles = sum(counts)
    newline = num_tiles * architecture.vision.patches_per_tile
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    candidates: list[Candidates] = []
    for size, count, end in zip(sizes, counts, np.cumsum(counts), strict=True):
        tiles, shape = range(end - count, end), None
        if not _is_video(size) and _is_tiled(num_images, architecture):
            shape = _shape((size[0], size[1]), architecture)
            piece = _tiled_positions(shape, tiles.start, architecture, newline)
        else:
            of_tile = _one_frame if _is_video(size) else _one_tile
            maps = [flattened(*of_tile(tile, architecture)) for tile in tiles]
            piece = joined([*maps, (np.array([[newline]]), np.ones((1, 1)))])
        if architecture.reduction.selects:
            candidates.append(candidates_of(piece[0], tiles, newline, shape, architecture))
            piece = piece[0][candidates[-1].places], piece[1][candidates[-1].places]
        pieces.append(piece)
    lengths = tuple(found.kept for found in candidates) or tuple(len(gather) for gather, _ in pieces)
    gather, weights = joined([(np.zeros((0, 1)), np.zeros((0, 1))), *pieces])
    arrays = [gather.astype(np.int32), weights.astype(np.float32)]
    if architecture.reduction.selects:
        nothing = np.zeros(0, np.int32)
        arrays += [np.concatenate([nothing, *(getattr(x, name) for x in candidates)]) for name in ("pictures", "marks")]
    for array in arrays:
        array.flags.writeable = False
    return Layout(num_tiles, lengths, *arrays)


@functools.lru_cache(maxsize=256)
def small_layout(height: int, width: int, architecture: Architecture) -> Layout:
    """Returns the layout of a picture of `height` x `width` patches at the first places of one tile; read-only."""
    gather = np.arange(height * width).reshape(height, width, 1)
    positions = flattened(*packed(gather, np.ones(gather.shape, np.float32), architecture.anyres))
    newline = (np.array([[architecture.vision.patches_per_tile]]), np.ones((1, 1)))
    gather, weights = joined([positions, newline])
    gather, weights = gather.astype(np.int32), weights.astype(np.float32)
    gather.flags.writeable = weights.flags.writeable = False
    return Layout(1, (len(gather),), gather, weights)


def _tiled_positions(
    shape: Shape, first: int, architecture: Architecture, newline: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns gather and weights, each [Nv, K], of one tiled picture whose base is tile `first`."""
    side = _cells_per_side(architecture)
    if shape.shrunk:
        row_index, row_weight = bilinear_taps(shape.height, shape.out_height)  # [h, 2]
        column_index, column_weight = bilinear_taps(shape.width, shape.out_width)  # [w, 2]
    else:
        row_index, row_weight = np.arange(shape.height)[:, None], np.ones((shape.height, 1), np.float32)
        column_index, column_weight = np.arange(shape.width)[:, None], np.ones((shape.width, 1), np.float32)
    y = row_index[:, None, :, None] + shape.top  # [h, 1, kh, 1]
    x = column_index[None, :, None, :] + shape.left  # [1, w, 1, kw]
    tile = first + 1 + (y // side) * shape.grid[1] + x // side
    y, x = np.broadcast_arrays(y % side, x % side)
    gather = _patches(tile, y, x, architecture)  # [h, w, kh, kw, s^2]
    weights = row_weight[:, None, :, None] * column_weight[None, :, None, :]
    gather, weights = packed(*_means(gather, weights, (shape.out_height, shape.out_width)), architecture.anyres)
    newlines = np.zeros((len(gather), 1, gather.shape[2]))
    newline_weights = newlines.copy()
    newline_weights[..., 0] = 1
    gather = np.concatenate([gather, newlines + newline], axis=1)
    weights = np.concatenate([weights, newline_weights], axis=1)
    return joined([flattened(*_one_tile(first, architecture)), flattened(gather, weights)])


def _one_tile(index: int, architecture: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """Returns gather and weights, each [h, w, K], of the packed map of one whole tile."""
    side = _cells_per_side(architecture)
    y, x = np.indices((side, side))
    gather = _patches(index, y, x, architecture)
    return packed(*_means(gather, np.ones((side, side), np.float32), (side, side)), architecture.anyres)


def _means(gather: np.ndarray, weights: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Returns gather and weights [h, w, K] of cells that are the means of s^2 patches each.

    Args:
        gather: [h, w, ..., s^2].
        weights: [h, w, ...], of the cells.
        size: (h, w).
    """
    count = math.prod(gather.shape[2:])
    weights = np.repeat(weights[..., None] / np.float32(gather.shape[-1]), gather.shape[-1], axis=-1)
    return gather.reshape(*size, count), weights.reshape(*size, count)


def _one_frame(index: int, architecture: Architecture) -> tuple[np.ndarray, np.ndarray]:
    """Returns gather and weights, each [h, w, K], of one video frame, shrunk bilinearly to half a side."""
    side, small = _cells_per_side(architecture), _frame_side(architecture)
    taps, weight = bilinear_taps(side, small)  # [small, 2]
    y, x = np.broadcast_arrays(taps[:, None, :, None], taps[None, :, None, :])
    weights = weight[:, None, :, None] * weight[None, :, None, :]
    return packed(*_means(_patches(index, y, x, architecture), weights, (small, small)), architecture.anyres)


def cut_tiles(images: Sequence[np.ndarray], architecture: Architecture) -> np.ndarray:
    """Cuts one sample's pictures and videos into tiles, in the order of `visual_layout`.

    Args:
        images: uint8 [H, W, 3] or [F, H, W, 3] each.
        architecture: only `vision` and `anyres` are read.

    Returns:
        uint8 [n, S, S, 3], S = `vision.tile_size`, not normalized; n may be 0.
    """
    tile = architecture.vision.tile_size
    tiles: list[np.ndarray] = []
    num_images = sum(image.ndim == 3 for image in images)
    for image in images:
        if image.ndim == 4:
            tiles.extend(_resize(frame, (tile, tile)) for frame in image)
        elif _is_tiled(num_images, architecture):
            tiles.append(_resize(image, (tile, tile)))
            tiles.extend(_crops(image, architecture))
        elif architecture.anyres.pinpoints:
            tiles.append(_squared(image, architecture))
        else:
            tiles.append(_resize(image, (tile, tile)))
    return np.stack(tiles) if tiles else np.zeros((0, tile, tile, 3), np.uint8)


def _resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to (height, width) with Pillow's bicubic filter."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _crops(image: np.ndarray, architecture: Architecture) -> list[np.ndarray]:
    """Resizes the picture into its best pinpoint, centers it on black and cuts it row by row."""
    tile = architecture.vision.tile_size
    height, width = best_pinpoint(image.shape[:2], architecture.anyres.pinpoints)
    scale_height, scale_width = height / image.shape[0], width / image.shape[1]
    if scale_width < scale_height:
        new_size = (min(math.ceil(image.shape[0] * scale_width), height), width)
    else:
        new_size = (height, min(math.ceil(image.shape[1] * scale_height), width))
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new_size[0]) // 2, (width - new_size[1]) // 2
    canvas[top : top + new_size[0], left : left + new_size[1]] = _resize(image, new_size)
    return [
        canvas[row : row + tile, column : column + tile]
        for row in range(0, height, tile)
        for column in range(0, width, tile)
    ]


def _squared(image: np.ndarray, architecture: Architecture) -> np.ndarray:
    """Pads the picture to a square in the mean color and resizes it to one tile.

    Pillow resizes along rows, rounds to uint8, then resizes along columns. Two separate passes, the first in bands,
    give the same pixels without holding the square of a 1 x 20,000 picture in memory.
    """
    tile = architecture.vision.tile_size
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    background = np.array([int(mean * 255) for mean in architecture.anyres.image_mean], np.uint8)
    narrow = np.empty((side, tile, 3), np.uint8)  # the square after the pass along rows
    narrow[:] = background
    band = max(1, _PAD_CHUNK_PIXELS // side)
    for start in range(0, height, band):
        rows = image[start : start + band]
        padded = np.empty((len(rows), side, 3), np.uint8)
        padded[:] = background
        padded[:, left : left + width] = rows
        narrow[top + start : top + start + len(rows)] = _resize(padded, (len(rows), tile))
    return _resize(narrow, (tile, tile))
