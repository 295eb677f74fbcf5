"""The tower's input: small pictures in their tile, and the statistics of standardized pictures."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from visor_jax.architecture import AnyResArchitecture, Architecture, VisionArchitecture
from visor_jax.data.collate import RowShape, encode_prompt, encode_tokens, make_batch
from visor_jax.data.sample import SkipSample
from visor_jax.data.tiles import cells, make_tiles, statistics
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError
from visor_jax.testing.models import TINY

IMAGE = 63
SMALL = dataclasses.replace(  # tiles of 4 x 4 patches of 4 pixels
    TINY,
    vision=VisionArchitecture(16, 4, 16, 24, 1, 2),
    anyres=AnyResArchitecture(small_pictures=True, standardize=True),
)


def with_anyres(arch: Architecture, **fields: object) -> Architecture:
    return dataclasses.replace(arch, anyres=dataclasses.replace(arch.anyres, **fields))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@hypothesis.given(data=st.data())
def test_a_small_picture_keeps_its_patches_and_has_the_positions_of_its_window(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    origin = data.draw(st.integers(0, 4 - rows)), data.draw(st.integers(0, 4 - columns))
    image = picture(4 * rows, 4 * columns, seed=rows + 5 * columns)
    arrays = make_tiles([image], SMALL, origin)
    used = arrays["tile_segments"][0] > 0
    assert used.tolist() == [True] * (rows * columns) + [False] * (16 - rows * columns)
    for place, position in enumerate(arrays["tile_positions"][0][used]):
        row, column = np.array(divmod(position, 4)) - origin
        expected = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(cells(arrays["tiles"][0], SMALL)[divmod(place, 4)], expected)
    example = encode_tokens([1, IMAGE, 2], [image], IMAGE, SMALL, origin=origin)
    assert example.size == RowShape(1, rows * columns + 1, 2)
    assert example.visual_gather[:, 0].tolist() == [*range(rows * columns), 16]
    assert example.text_positions.tolist() == [0, rows * columns + 2]


@pytest.mark.parametrize(
    ("size", "origin", "message"),
    [
        ((6, 8), (0, 0), "6x8 pixels: expected multiples of patches of 4"),
        ((8, 8), (3, 0), "exceed the tile's grid of 4x4"),
        ((8, 8), (0, -1), "exceed the tile's grid of 4x4"),
        ((20, 4), (0, 0), "exceed the tile's grid of 4x4"),
        ((0, 8), (0, 0), "0x8 pixels"),
    ],
)
def test_what_does_not_fit_its_tile_is_skipped(size: tuple[int, int], origin: tuple[int, int], message: str) -> None:
    with pytest.raises(SkipSample, match=f"small_picture: .*{message}"):
        encode_tokens([1, IMAGE, 2], [picture(*size)], IMAGE, SMALL, origin=origin)


def test_an_origin_belongs_to_one_picture_of_a_run_with_small_pictures() -> None:
    for images in ([picture(4, 4)] * 2, [picture(4, 4)[None]]):
        with pytest.raises(SkipSample, match="belongs to one picture"):
            encode_tokens([1, *[IMAGE] * len(images), 2], images, IMAGE, SMALL, origin=(0, 0))
    with pytest.raises(RequestError, match=r"data\.small_pictures=False"):
        encode_prompt([picture(4, 4)], "What?", load_tokenizer("almanac"), TINY, origin=(0, 0))


def test_whole_pictures_fill_whole_tiles() -> None:
    batch = make_batch([[encode_tokens([1, IMAGE], [picture(9, 5)], IMAGE, SMALL)], []], RowShape(2, 20, 4), SMALL)
    assert batch.arrays["tile_positions"][0, 0].tolist() == [*range(16)]
    assert batch.arrays["tile_segments"][0].tolist() == [[1] * 16, [0] * 16]
    assert not batch.arrays["tile_scales"][0, 1].any() and not batch.arrays["tile_segments"][1].any()
    plain = make_batch([[]], RowShape(2, 20, 4), with_anyres(SMALL, small_pictures=False, standardize=False))
    assert {*batch.arrays} - {*plain.arrays} == {"tile_positions", "tile_segments", "tile_means", "tile_scales"}


# --- standardization --------------------------------------------------------------------------------------------------


@hypothesis.given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40))
def test_statistics_are_those_of_all_values(data: st.DataObject, height: int, width: int) -> None:
    low = data.draw(st.integers(0, 255))
    high = data.draw(st.integers(low, 255))
    image = np.random.default_rng(height).integers(low, high + 1, (height, width, 3), dtype=np.uint8)
    mean, scale = statistics(image)
    floor = 1 / math.sqrt(image.size)
    assert mean == pytest.approx(image.mean(dtype=np.float64), rel=1e-14)
    assert scale == pytest.approx(1 / max(image.std(dtype=np.float64), floor), rel=1e-9)


def test_a_uniform_picture_has_the_least_deviation() -> None:
    assert statistics(np.full((4, 4, 3), 200, np.uint8)) == (200.0, pytest.approx(math.sqrt(48)))


def test_tiles_have_the_statistics_of_their_pictures_first_tile_and_frames_their_own() -> None:
    arch = with_anyres(TINY, standardize=True)
    image = picture(16, 16)
    image[:8] = 7  # the crops differ
    arrays = make_tiles([image], arch)
    assert len(arrays["tiles"]) == 5
    mean, scale = np.array(statistics(arrays["tiles"][0]), np.float32)
    assert (arrays["tile_means"] == mean).all() and (arrays["tile_scales"] == scale).all()
    assert "tile_segments" not in arrays
    video = np.stack([picture(8, 8, seed) for seed in range(3)])
    arrays = make_tiles([video, image], arch)
    assert len(arrays["tiles"]) == 8
    means = [statistics(tile)[0] for tile in arrays["tiles"][:4]]
    np.testing.assert_array_equal(arrays["tile_means"][:4, 0], np.array(means, np.float32))
    assert (arrays["tile_means"][4:] == arrays["tile_means"][3]).all(), "the picture's own tiles"
