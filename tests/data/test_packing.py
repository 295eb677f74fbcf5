"""Filling a pool's rows: limits hold, nobody waits forever, and the shares that the benchmark reports."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from visor_jax.data.collate import RowShape
from visor_jax.data.packing import PoolShape, fill_pool

SIZES = st.builds(RowShape, st.integers(0, 12), st.integers(0, 100), st.integers(1, 40))
SHAPES = st.builds(
    PoolShape, rows=st.integers(1, 4), tiles=st.integers(1, 20), visual=st.integers(1, 90), text=st.integers(1, 60)
)


@hypothesis.given(st.lists(SIZES, max_size=20), SHAPES)
@hypothesis.settings(max_examples=150, deadline=None)
def test_rows_stay_within_every_limit_and_no_sample_is_in_two(sizes: list[RowShape], shape: PoolShape) -> None:
    rows = fill_pool(sizes, shape)
    taken = [index for row in rows for index in row]
    assert len(rows) == shape.rows and len(set(taken)) == len(taken)
    totals = [sum((sizes[index] for index in row), RowShape(0, 0, 0)) for row in rows]
    assert sum(total.tiles for total in totals) <= shape.tiles
    assert all(total.visual <= shape.visual and total.text <= shape.text for total in totals)
    tiles_left = shape.tiles - sum(total.tiles for total in totals)
    for index in {*range(len(sizes))} - {*taken}:  # whatever still fitted was added
        assert not any(
            RowShape(tiles_left, shape.visual - total.visual, shape.text - total.text).holds(sizes[index])
            for total in totals
        )
    assert fill_pool(sizes, shape) == rows


@hypothesis.given(st.lists(SIZES, min_size=1, max_size=12), SHAPES)
@hypothesis.settings(max_examples=50, deadline=None)
def test_the_oldest_sample_that_fits_is_taken_first(sizes: list[RowShape], shape: PoolShape) -> None:
    fitting = [index for index, size in enumerate(sizes) if shape.largest.holds(size)]
    assert not fitting or fill_pool(sizes, shape)[0][0] == fitting[0]


def test_a_row_is_filled_by_the_best_company_not_by_the_first() -> None:
    sizes = [RowShape(1, visual, 1) for visual in (50, 30, 20, 45, 5)]
    assert [sorted(row) for row in fill_pool(sizes, PoolShape(1, 10, 100, 10))] in ([[0, 1, 2]], [[0, 3, 4]])


def test_tiles_are_shared_by_the_rows_of_a_pool() -> None:
    """One row holds all the tiles of a page, its neighbor the samples without pictures."""
    sizes = [RowShape(9, 50, 1), RowShape(0, 0, 8), RowShape(0, 0, 8), RowShape(3, 10, 1)]
    rows = fill_pool(sizes, PoolShape(rows=2, tiles=9, visual=60, text=10))
    assert sorted(map(sorted, rows)) == [[0, 2], [1]] or sorted(map(sorted, rows)) == [[0, 1], [2]]


def test_a_mixture_of_unequal_samples_fills_its_tightest_limit() -> None:
    rng = np.random.default_rng(0)
    tiles = rng.choice([0, 2, 5, 7, 31], 4000, p=[0.17, 0.23, 0.35, 0.15, 0.1])
    sizes = [RowShape(int(n), int(n > 0) * (729 + int(rng.integers(200, 6600) * n / 31)), 100) for n in tiles]
    shape, used = PoolShape(rows=4, tiles=100, visual=8832, text=4096), 0
    waiting = sizes[:64]
    upcoming = iter(sizes[64:])
    for _ in range(40):
        rows = fill_pool(waiting, shape)
        taken = {index for row in rows for index in row}
        used += sum(waiting[index].tiles for index in taken)
        waiting = [size for index, size in enumerate(waiting) if index not in taken]
        waiting += [next(upcoming) for _ in taken]
    assert used > 0.95 * 40 * shape.tiles
