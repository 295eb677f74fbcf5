"""Buckets hold their prompts, waste little, and are few; batches group similar questions, each exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.data.anyres import tile_count, visual_token_count
from visor_jax.data.collate import RowShape
from visor_jax.generate.buckets import (
    MAX_ROWS,
    MIN_VISUAL,
    TILES,
    batch_bucket,
    batches,
    bucket,
    cache_bucket,
    joined,
    row_bucket,
)

row_shapes = st.builds(RowShape, st.integers(0, 40), st.integers(0, 9000), st.integers(1, 3000))


@given(size=row_shapes)
def test_a_bucket_holds_its_prompt_and_little_more(size: RowShape) -> None:
    row_shape = row_bucket(size)
    assert row_shape.holds(size) and row_shape.tiles >= 1 and row_shape.visual >= 1
    assert row_shape.tiles <= max(1.25 * size.tiles, size.tiles + 1)
    assert row_shape.visual <= max(1.125 * size.visual, size.visual + MIN_VISUAL)
    assert row_bucket(row_shape) == row_shape, "a bucket's bucket is itself"


def test_buckets_are_few_and_the_largest_picture_has_its_own() -> None:
    assert [bucket(size, 8) for size in (0, 1, 8, 9, 128, 129, 256, 257, 7353)] == [
        8,
        8,
        8,
        16,
        128,
        144,
        256,
        288,
        7680,
    ]
    assert len({row_bucket(RowShape(1, size, 1)).visual for size in range(1, 8833)}) < 70
    assert row_bucket(RowShape(37, 8765, 60)) == RowShape(37, 8832, 64), "by contract: 37 tiles, 8,832 visual positions"
    assert row_bucket(RowShape(37, 8833, 60)).visual > 8832


def test_no_anyres_grid_wastes_more_than_a_quarter_of_the_tower() -> None:
    for rows in range(1, 7):
        for columns in range(1, 7):
            tiles = 1 + rows * columns
            assert min(capacity for capacity in TILES if capacity >= tiles) <= 1.25 * tiles


@given(tokens=st.integers(1, 10_000))
def test_capacities_and_rows_are_powers_of_two(tokens: int) -> None:
    for size in (cache_bucket(tokens), batch_bucket(tokens)):
        assert size >= tokens and size & (size - 1) == 0
    assert cache_bucket(tokens) < max(2 * tokens, 65)


@given(sizes=st.lists(row_shapes.map(row_bucket), min_size=1, max_size=40))
def test_batches_hold_every_question_once_with_similar_ones(sizes: list[RowShape]) -> None:
    groups = batches(sizes)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        batch_shape = joined([sizes[index] for index in group])
        assert len(group) <= MAX_ROWS
        for index in group:
            assert batch_shape.visual <= 2 * max(sizes[index].visual, 128)
            assert batch_shape.text <= 2 * max(sizes[index].text, 128)


def test_similar_questions_share_batches() -> None:
    assert [len(group) for group in batches([RowShape(1, 40, 32)] * 19)] == [8, 8, 3]
    assert sorted(map(len, batches([RowShape(2, 1536, 32)] * 3 + [RowShape(31, 7680, 32)] * 2))) == [2, 3]


def test_real_pictures_fit_their_buckets() -> None:
    arch = testing.tiny_architecture(3)
    for size in ((8, 8), (16, 16), (5, 40), (40, 5)):
        row_shape = RowShape(tile_count(size, arch), visual_token_count(size, arch), 9)
        assert row_bucket(row_shape).holds(row_shape)
