"""Sheets: which tile a small picture goes into, and samples of one row that share tiles."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.data.test_tiles import SMALL, picture
from visor_jax.data.collate import RowShape, encode_example, make_batch
from visor_jax.data.sample import Sample, Sheet, SkipSample, Turn
from visor_jax.data.sheets import assign_places, encode_record, join
from visor_jax.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("almanac")


def sample(number: int, rows: int, columns: int, origin: tuple[int, int] | None = (0, 0), turns: int = 1) -> Sample:
    asked = tuple(Turn(f"Which digit {n}?", str(n + number), f"task{n}") for n in range(turns))
    return Sample(f"s{number}", (picture(4 * rows, 4 * columns, number),), asked, "test", origin=origin)


@hypothesis.given(st.lists(st.integers(0, 16), min_size=1, max_size=30))
def test_pictures_go_into_the_first_tile_with_enough_places(small: list[int]) -> None:
    tiles = [1] * len(small)  # 0 patches: a picture of a whole tile
    places = assign_places(small, tiles, 16)
    used: dict[int, int] = {}
    for patches, place in zip(small, places, strict=True):
        open_tiles = {tile: count for tile, count in used.items() if count + patches <= 16}
        if patches and open_tiles:
            assert (place.tile, place.opened) == (min(open_tiles), 0)
        else:
            assert place.opened == 1 and place.tile not in used
        assert place.first == (used.get(place.tile, 0) if patches else 0)
        used[place.tile] = place.first + patches if patches else 16
        assert used[place.tile] <= 16
    assert {*used} == {*range(sum(place.opened for place in places))}


def test_a_sheet_is_one_example_with_a_segment_for_each_sample() -> None:
    samples = (
        sample(0, 2, 4, turns=2),
        sample(1, 3, 3, (1, 1)),
        sample(2, 16, 9, None),
        sample(3, 1, 4, (3, 0), turns=2),
    )
    sheet = encode_record(Sheet(samples), TOKENIZER, SMALL)
    alone = [encode_example(one, TOKENIZER, SMALL) for one in samples]
    assert sheet.size.tiles == 3, "8 + 4 patches share the first tile, 9 and a whole picture have their own"
    assert sheet.tile_segments is not None and sheet.visual_segments is not None and sheet.text_segments is not None
    assert sheet.tile_segments.tolist() == [[1] * 8 + [2] * 4 + [0] * 4, [1] * 9 + [0] * 7, [1] * 16]
    assert [id for id, _ in sheet.samples] == ["s0", "s1", "s2", "s3"]
    assert [content.tiles for _, content in sheet.samples] == [1, 1, 1, 0]
    assert sheet.tasks == ("task0", "task1", "task0", "task0", "task0", "task1")
    for number, one in enumerate(alone, start=1):
        text, visual = sheet.text_segments == number, sheet.visual_segments == number
        for name in ("text_tokens", "text_positions", "loss_mask"):
            np.testing.assert_array_equal(getattr(sheet, name)[text], getattr(one, name))
        np.testing.assert_array_equal(sheet.visual_positions[visual], one.visual_positions)
    assert sheet.turn_index.max() == 5 and sheet.turn_index[sheet.text_segments == 2].max() == 2


def test_rows_hold_sheets_beside_samples() -> None:
    sheet = encode_record(Sheet((sample(0, 2, 2, turns=2), sample(1, 1, 3))), TOKENIZER, SMALL)
    whole = encode_example(sample(2, 4, 4, None), TOKENIZER, SMALL)
    batch = make_batch([[whole, sheet], [sheet]], RowShape(2, 40, 120), SMALL)
    assert batch.ids == ["s2", "s0", "s1", "s0", "s1"]
    assert batch.tasks == [["task0", "task0", "task1", "task0"], ["task0", "task1", "task0"]]
    assert [content[:3] for content in batch.contents[0]] == [("test", 1, 17), ("test", 1, 5), ("test", 0, 4)]
    assert batch.arrays["text_segments"].max(axis=1).tolist() == [3, 2]
    assert batch.arrays["visual_segments"].max(axis=1).tolist() == [3, 2]
    assert batch.arrays["turn_index"].max(axis=1).tolist() == [3, 2]
    gather, segments = batch.arrays["visual_gather"][0, :, 0], batch.arrays["visual_segments"][0]
    assert gather[segments == 3].tolist() == [16 + 4, 16 + 5, 16 + 6, 32]


def test_a_sheet_that_does_not_fit_or_is_empty_is_skipped() -> None:
    sheet = Sheet((sample(0, 4, 3), sample(1, 4, 3)))
    with pytest.raises(SkipSample, match="too_long: s0: 2 tiles"):
        encode_record(sheet, TOKENIZER, SMALL, row_shape=RowShape(1, 60, 200))
    with pytest.raises(SkipSample, match="empty_sheet"):
        encode_record(Sheet(()), TOKENIZER, SMALL)
    with pytest.raises(SkipSample, match="small_picture"):
        encode_record(Sheet((sample(0, 4, 3), sample(1, 4, 3, (0, 2)))), TOKENIZER, SMALL)
    assert join([encode_example(sheet.samples[0], TOKENIZER, SMALL)], SMALL).size.tiles == 1
