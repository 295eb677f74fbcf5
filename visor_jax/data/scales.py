"""The further scales of "m3" in a training batch: one sample's tiles, laid out at every share of `reduction.scales`.

In: an `Architecture` with scales. Out: what of an example changes with the scale (`ScaleLayout`), and how many visual
positions a row needs at each of them. The arrays of a batch belong to `reduction.ratio`; those of the other scales are
beside them under the names that `row_shape.at_scale` gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.data.anyres import frame_tokens, stitched_tokens, taps, tile_tokens, video_taps
from visor_jax.data.row_shape import at_scale


class ScaleLayout(NamedTuple):
    """The arrays of an example that change with the scale, as of `collate.Example`."""

    visual_gather: np.ndarray
    visual_weights: np.ndarray
    visual_positions: np.ndarray
    text_positions: np.ndarray


class Scaled(Protocol):
    """An example at its further scales (`collate.Example`)."""

    @property
    def scales(self) -> tuple[ScaleLayout, ...]: ...


def shapes_at_scales(
    visual: int, architecture: Architecture, rows: Sequence[Sequence[Scaled]] = (), *, videos: bool = False
) -> list[tuple[int, int]]:
    """Returns visual positions and K of a row at each further scale.

    Args:
      visual: visual positions of a row at `reduction.ratio`.
      rows: the examples of a batch, whose K may be larger than that of pictures.
      videos: K is at least that of videos.
    """
    shapes = []
    for number, other in enumerate(architecture.other_scales):
        widest = (example.scales[number].visual_gather.shape[1] for examples in rows for example in examples)
        most_taps = max(taps(other), video_taps(other) if videos else 0, *widest)
        shapes.append((room_at_scale(visual, architecture, other), most_taps))
    return shapes


def place_at_scale(arrays: dict[str, np.ndarray], number: int, scale: ScaleLayout, row: int, text: slice) -> None:
    """Writes an example at one further scale into its row, behind what is there; unchanged if a batch has no scales.

    Args:
      arrays: of the batch; those at `reduction.ratio` hold the example already.
      number: of the scale.
      scale: its `visual_gather` counts the patches of the row's pool.
      text: places of the example's text.
    """
    if at_scale(number, "visual_gather") not in arrays:
        return
    of_scale = {name: arrays[at_scale(number, name)][row] for name in (*scale._fields, "visual_segments")}
    start = int(np.count_nonzero(of_scale["visual_segments"]))
    visual = slice(start, start + len(scale.visual_positions))
    of_scale["visual_gather"][visual, : scale.visual_gather.shape[1]] = scale.visual_gather
    of_scale["visual_weights"][visual, : scale.visual_weights.shape[1]] = scale.visual_weights
    of_scale["visual_positions"][visual] = scale.visual_positions
    of_scale["visual_segments"][visual] = arrays["text_segments"][row, text].max()
    of_scale["text_positions"][text] = scale.text_positions


def room_at_scale(visual: int, architecture: Architecture, other: Architecture) -> int:
    """Returns visual positions at scale `other` for whatever fits into `visual` of them at `reduction.ratio`."""
    return math.floor(visual * _most_tokens(architecture, other))


@lru_cache(maxsize=64)
def _most_tokens(architecture: Architecture, other: Architecture) -> Fraction:
    """Returns the largest quotient of a picture's or video's tokens at `other` and in `architecture`.

    Of pictures in crops, tokens change where a side of the unpadded map grows by a cell at either scale, so that
    fractions of the grid at which that happens stand for all sizes.
    """
    both = (other, architecture)
    tile, frame = ([tokens(arch) for arch in both] for tokens in (tile_tokens, frame_tokens))
    quotients = [
        Fraction(tile[0] + 1, tile[1] + 1),
        Fraction(frame[0] + 1, frame[1] + 1),  # the newline counts most in a video of one frame
        Fraction(*frame),  # and least in an endless one
    ]
    grids = architecture.anyres.pinpoints
    sides = {arch.vision.patches_per_side // arch.reduction.stride for arch in both}
    for height, width in grids:
        grid = height // architecture.vision.tile_size, width // architecture.vision.tile_size
        for axis in (0, 1):
            for shown in {Fraction(cell, side) for side in sides for cell in range(grid[axis] * side + 1)}:
                counts = [stitched_tokens(grid, axis, shown, arch) for arch in both]
                quotients.append(Fraction(tile[0] + counts[0], tile[1] + counts[1]))
    return max(quotients)
