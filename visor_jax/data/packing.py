"""Which samples share a row, and which rows share a pool of tiles.

In: the sizes of the samples that wait, oldest first, and a `PoolShape`. Out: for each row of one pool the samples that
go into it. Everything here is arithmetic on sizes: no pixel and no token is read, nothing is random, and the result is
a pure function of its arguments.

A pool is what one device works on in one step: `rows` rows of the decoder, and one batch of tiles for the vision tower
from which all of these rows take their visual tokens. Three limits hold: visual positions and text tokens of each row,
and tiles of the whole pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from visor_jax.data.collate import RowShape

_VISUAL_STEPS = 552  # grid on which visual positions are counted while a row is filled: 16 positions at rows of 8,832
_MOST_TILES = 160  # tiles of one row that are considered
_SLACK = 0.015  # of a row's visual positions, given up for a number of tiles nearer to the row's share


@dataclass(frozen=True)
class PoolShape:
    """Capacity of one pool: `rows` rows of `visual` positions and `text` tokens each, `tiles` tiles together."""

    rows: int
    tiles: int
    visual: int
    text: int

    @property
    def largest(self) -> RowShape:
        """The largest sample that fits."""
        return RowShape(self.tiles, self.visual, self.text)


def fill_pool(sizes: Sequence[RowShape], shape: PoolShape) -> list[list[int]]:
    """Returns for each row of a pool the indices of the samples in it; samples that are in none wait on.

    Each row begins with the oldest sample that fits, so that none waits forever. The rest of the row is the set of
    samples that fills its visual positions best, with about the row's share of the tiles that are left (a knapsack
    with two weights). What still fits then, such as samples without pictures, is added in order of age.
    """
    waiting = list(range(len(sizes)))
    tiles_left = shape.tiles
    rows: list[list[int]] = []
    for row in range(shape.rows):
        room = RowShape(tiles_left, shape.visual, shape.text)
        chosen = _fill_row(sizes, waiting, room, tiles_left / (shape.rows - row))
        rows.append(chosen)
        waiting = [index for index in waiting if index not in chosen]
        tiles_left -= sum(sizes[index].tiles for index in chosen)
    for chosen in rows:
        used = sum((sizes[index] for index in chosen), RowShape(0, 0, 0))
        for index in list(waiting):
            room = RowShape(tiles_left, shape.visual - used.visual, shape.text - used.text)
            if room.holds(sizes[index]):
                chosen.append(index)
                waiting.remove(index)
                used += sizes[index]
                tiles_left -= sizes[index].tiles
    return rows


def _fill_row(sizes: Sequence[RowShape], waiting: Sequence[int], room: RowShape, share: float) -> list[int]:
    """Returns the samples of one row: the oldest that fits and the best company for it."""
    first = next((index for index in waiting if room.holds(sizes[index])), None)
    if first is None:
        return []
    size = sizes[first]
    room = RowShape(room.tiles - size.tiles, room.visual - size.visual, room.text - size.text)
    others = [index for index in waiting if index != first and sizes[index].visual and room.holds(sizes[index])]
    amounts = np.array([(sizes[i].visual, sizes[i].tiles, sizes[i].text) for i in others], np.int64).reshape(-1, 3)
    best = _best_subset(amounts, room, share - size.tiles)
    return [first, *(others[place] for place in best)]


def _best_subset(amounts: Int[np.ndarray, "n 3"], room: RowShape, share: float) -> list[int]:
    """Returns which of `amounts` (visual positions, tiles, text tokens) fill `room` best, with about `share` tiles.

    A table over (visual positions on a grid, tiles) holds the fewest text tokens of any subset with that sum; sizes are
    rounded up to the grid, so that no subset in it exceeds the room.
    """
    if not len(amounts):
        return []
    unit = -(-room.visual // _VISUAL_STEPS) or 1
    width, height = room.visual // unit, min(room.tiles, _MOST_TILES)
    text = np.full((width + 1, height + 1), room.text + 1, np.int64)
    text[0, 0] = 0
    taken = np.zeros((len(amounts), width + 1, height + 1), bool)
    for place, (visual, tiles, tokens) in enumerate(amounts):
        steps = -(-visual // unit)
        if steps > width or tiles > height:
            continue
        with_it = text[: width + 1 - steps, : height + 1 - tiles] + tokens
        better = with_it < text[steps:, tiles:]
        taken[place, steps:, tiles:] = better
        text[steps:, tiles:] = np.where(better, with_it, text[steps:, tiles:])
    return _read_back(amounts, taken, *_best_cell(text <= room.text, share), unit)


def _best_cell(reached: Bool[np.ndarray, "u t"], share: float) -> tuple[int, int]:
    """Returns the fullest sum that was reached, or one slightly less full whose tiles are nearer to `share`."""
    visual, tiles = np.nonzero(reached)
    enough = visual >= visual.max() - _SLACK * (len(reached) - 1)
    visual, tiles = visual[enough], tiles[enough]
    best = np.lexsort((-visual, np.abs(tiles - share)))[0]
    return int(visual[best]), int(tiles[best])


def _read_back(
    amounts: Int[np.ndarray, "n 3"], taken: Bool[np.ndarray, "n u t"], visual: int, tiles: int, unit: int
) -> list[int]:
    """Returns the subset that reached one cell of the table."""
    subset: list[int] = []
    for place in range(len(amounts) - 1, -1, -1):
        if taken[place, visual, tiles]:
            subset.append(place)
            visual -= -(-int(amounts[place, 0]) // unit)
            tiles -= int(amounts[place, 1])
    return subset[::-1]
