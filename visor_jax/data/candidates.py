"""Which visual positions a reduction chooses among, and how many of them it keeps; from layouts alone.

In: the features that make the positions of one picture or video (`visor_jax.data.anyres`), and an `Architecture` whose
reduction selects. Out: `Candidates`. How many tokens remain never depends on pixels, so that rows are filled and
programs compiled before a picture is read; which ones remain is chosen on the device (`visor_jax.model.reduction`).

A candidate belongs to the tile of its first feature. Of n tokens `ReductionArchitecture.kept(n)` remain, in each tile
("vispruner", "visionzip"), of the tiles of a picture together ("hired"), or of the picture with its newlines
("divprune"). As in the authors' code, newlines are dropped by "vispruner", and by "visionzip" where a picture has
crops; "divprune" chooses among them as among others; elsewhere they remain and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from visor_jax.architecture import Architecture


class Stitched(Protocol):
    """The map of a picture's crops in cells: its grid of crops, and the window of it that shows the picture."""

    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def top(self) -> int: ...
    @property
    def left(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class Candidates:
    """The candidates of one picture or video.

    Attributes:
        places: int [N], which positions of the layout without a reduction they are, in order.
        kept: tokens that remain.
        pictures: int32 [N], 1 + the first tile of the candidate's picture; of a video 1 + the frame's tile, except with
            "divprune", which chooses over all frames.
        marks: int32 [N], "hired": 1 + the tile of the crop for which a patch of the base tile counts; otherwise 0.
    """

    places: np.ndarray
    kept: int
    pictures: np.ndarray
    marks: np.ndarray


def candidates_of(
    gather: np.ndarray, tiles: range, newline: int, stitched: Stitched | None, architecture: Architecture
) -> Candidates:
    """Returns the candidates of a picture or video.

    Args:
        gather: [M, K], features of its positions without a reduction.
        tiles: its tiles.
        newline: index of the newline's feature.
        stitched: the map of its crops; None if it has none.
        architecture: its reduction selects.
    """
    reduction = architecture.reduction
    first = gather[:, 0].astype(np.int64)
    is_newline = first == newline
    drops = reduction.method == "vispruner" or (reduction.method == "visionzip" and stitched is not None)
    places = np.flatnonzero(~is_newline if drops else np.ones(len(gather), bool))
    first, is_newline = first[places], is_newline[places]
    of_tile = np.where(is_newline, tiles.stop - 1, first // architecture.vision.patches_per_tile)
    whole = stitched is not None or reduction.method == "divprune"
    pictures = (np.full_like(of_tile, tiles.start) if whole else of_tile) + 1
    groups = of_tile if reduction.method in ("vispruner", "visionzip") else pictures
    counted = np.ones(len(places), bool) if reduction.method == "divprune" else ~is_newline
    kept = sum(reduction.kept(int(size)) for size in np.unique(groups[counted], return_counts=True)[1])
    marks = np.zeros(len(places), np.int32)
    if stitched is not None and reduction.method == "hired":
        is_base = (of_tile == tiles.start) & ~is_newline
        crops = _crop_of_patch(stitched, architecture)
        marks[is_base] = crops[first[is_base] - tiles.start * len(crops)] + tiles.start + 2
    return Candidates(places, kept + int((~counted).sum()), pictures.astype(np.int32), marks)


def _crop_of_patch(stitched: Stitched, architecture: Architecture) -> np.ndarray:
    """Returns the crop [P] for which each patch of the base tile counts, row by row from 0.

    "paper": the crop that shows what the patch's center shows; the base tile is the picture stretched to one tile.
    "code": the authors' code divides the patches in their order into as many runs as there are crops.
    """
    side, (rows, columns) = architecture.vision.patches_per_side, stitched.grid
    if architecture.reduction.marks == "code":
        return np.arange(side**2) * (rows * columns) // side**2
    centers = (np.arange(side) + 0.5) / side
    row = np.clip((stitched.top + centers * stitched.height) // side, 0, rows - 1)
    column = np.clip((stitched.left + centers * stitched.width) // side, 0, columns - 1)
    return (row[:, None] * columns + column).astype(np.int64).reshape(-1)


def candidate_arrays(architecture: Architecture) -> tuple[str, ...]:
    """Returns the names of the arrays [N] that examples and batches have of candidates."""
    if not architecture.reduction.selects:
        return ()
    return ("visual_pictures", "visual_marks") if architecture.reduction.method == "hired" else ("visual_pictures",)


def moved(values: np.ndarray, tiles: int) -> np.ndarray:
    """Returns pictures or marks of an example whose tiles begin at `tiles` of a pool or a sheet; 0 remains 0."""
    return np.where(values > 0, values + tiles, 0)
