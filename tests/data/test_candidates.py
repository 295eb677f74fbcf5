"""Candidates of reductions: how many tokens a layout keeps, which newlines remain, and what "m3" averages."""

from __future__ import annotations

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from visor_jax.architecture import AnyResArchitecture, Architecture, ReductionArchitecture, VisionArchitecture
from visor_jax.data import anyres
from visor_jax.data.collate import RowShape, encode_tokens, make_batch
from visor_jax.data.sheets import join
from visor_jax.testing import random_picture, tiny_architecture

SIDE = 6
VISION = VisionArchitecture(4 * SIDE, 4, 16, 24, num_layers=1, num_heads=2)
GRIDS = AnyResArchitecture(tuple((24 * h, 24 * w) for h in (1, 2, 3) for w in (1, 2, 3)), max_tiles=4)
SELECTING = ("divprune", "vispruner", "visionzip", "hired")


def arch_of(method: str, ratio: float = 0.25, **settings) -> Architecture:
    return dataclasses.replace(
        tiny_architecture(), vision=VISION, anyres=GRIDS, reduction=ReductionArchitecture(method, ratio, **settings)
    )


PLAIN = arch_of("none", 1.0)
SIZES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 90), st.integers(1, 90)),
        st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    ),
    max_size=3,
)


@pytest.mark.parametrize("method", SELECTING)
@hypothesis.given(sizes=SIZES, ratio=st.sampled_from([0.25, 0.5, 0.098, 0.9]))
@hypothesis.settings(max_examples=40)
def test_lengths_are_the_share_of_each_group_and_its_newlines(method: str, sizes, ratio: float) -> None:
    arch = arch_of(method, ratio)
    plain, layout = anyres.visual_layout(sizes, PLAIN), anyres.visual_layout(sizes, arch)
    num_images = sum(len(size) == 2 for size in sizes)
    assert layout.num_tiles == plain.num_tiles
    start, expected = 0, []
    for size, length in zip(sizes, plain.lengths, strict=True):
        tile = plain.gather[start : start + length, 0] // VISION.patches_per_tile
        start += length
        newlines = int((tile == plain.num_tiles).sum())
        of_tiles = np.unique(tile[tile < plain.num_tiles], return_counts=True)[1].tolist()
        groups = [sum(of_tiles)] if method == "hired" and len(size) == 2 else of_tiles
        groups = [sum(of_tiles) + newlines] if method == "divprune" else groups
        is_cut = len(size) == 2 and num_images == 1
        remains = method == "hired" or (method == "visionzip" and not is_cut)
        kept = sum(int(np.ceil(round(ratio * group, 9))) for group in groups) + newlines * remains
        assert kept == anyres.visual_token_count(size, arch, num_images if len(size) == 2 else 1)
        expected.append(kept)
    assert list(layout.lengths) == expected
    assert len(layout.gather) == len(layout.pictures) <= arch.reduction.candidates(sum(expected))
    assert set(np.unique(layout.pictures)) <= set(range(1, layout.num_tiles + 1))


def test_candidates_are_the_positions_of_the_plain_layout_without_dropped_newlines() -> None:
    plain = anyres.visual_layout([(48, 70)], PLAIN)
    is_newline = plain.gather[:, 0] == plain.num_tiles * VISION.patches_per_tile
    for method in SELECTING:
        layout = anyres.visual_layout([(48, 70)], arch_of(method))
        places = ~is_newline if method in ("vispruner", "visionzip") else slice(None)
        np.testing.assert_array_equal(layout.gather, plain.gather[places])
        np.testing.assert_array_equal(layout.weights, plain.weights[places])


def test_marks_count_for_the_crop_that_shows_the_patch_or_for_its_run() -> None:
    """A picture of 24 x 48 pixels on a grid of 1 x 2: the left half of the base tile is the first crop."""
    paper, code = (anyres.visual_layout([(24, 48)], arch_of("hired", marks=marks)) for marks in ("paper", "code"))
    base = slice(0, SIDE**2)
    by_column = np.where(np.arange(SIDE) < SIDE // 2, 2, 3)
    assert paper.marks[base].tolist() == np.tile(by_column, SIDE).tolist()
    assert code.marks[base].tolist() == [2] * (SIDE**2 // 2) + [3] * (SIDE**2 // 2)
    assert not paper.marks[SIDE**2 :].any() and not code.marks[SIDE**2 :].any()


def test_marks_follow_the_window_that_shows_the_picture() -> None:
    """A picture of 30 x 72 pixels in 2 x 3 crops: all crops show some of it, and the halves are as high as it is."""
    layout = anyres.visual_layout([(40, 72)], arch_of("hired"))
    marks = layout.marks[: SIDE**2].reshape(SIDE, SIDE)
    assert {2, 3, 4, 5, 6, 7} == set(marks.reshape(-1).tolist())
    assert (np.diff(marks, axis=0) >= 0).all() and (np.diff(marks, axis=1) >= 0).all()


@pytest.mark.parametrize("method", SELECTING)
def test_batches_have_room_for_candidates_and_count_kept_tokens(method: str) -> None:
    arch = arch_of(method)
    examples = [encode_tokens([5, 1, 6, 7], [random_picture(48, 60, seed)], 1, arch, id=str(seed)) for seed in range(3)]
    size = examples[0].size
    assert size.visual == len(examples[0].visual_positions) < len(examples[0].visual_gather) / 3
    assert examples[0].text_positions.tolist() == [0, size.visual + 1, size.visual + 2]
    shape = RowShape(3 * size.tiles, 2 * size.visual + 1, 8)
    arrays = make_batch([examples[:2], examples[2:]], shape, arch, 2).arrays
    assert arrays["visual_gather"].shape[:2] == arrays["visual_pictures"].shape == (2, shape.visual * 4)
    assert arrays["visual_segments"].shape == (2, shape.visual)
    count = len(examples[0].visual_gather)
    for row, place, tiles in ((0, 0, 0), (0, count, size.tiles), (1, 0, 2 * size.tiles)):
        found = arrays["visual_pictures"][row, place : place + count]
        np.testing.assert_array_equal(found, examples[0].visual_pictures + tiles)
        patches = arrays["visual_gather"][row, place : place + count, 0] // VISION.patches_per_tile
        assert set(patches) - {3 * size.tiles} == set(range(tiles, tiles + size.tiles))
    assert not arrays["visual_pictures"][0, 2 * count :].any()
    joined = join(examples[:2], arch)
    np.testing.assert_array_equal(joined.visual_pictures, arrays["visual_pictures"][0, : 2 * count])


@hypothesis.given(SIZES, st.sampled_from([1 / 4, 1 / 9, 1 / 36, 0.07]))
@hypothesis.settings(max_examples=40)
def test_m3_averages_windows_of_each_tile_before_stitching(sizes, ratio: float) -> None:
    """The layout on patches equals that of a model whose tiles have as many patches as there are windows."""
    arch = arch_of("m3", ratio)
    stride = arch.reduction.stride
    assert stride == int(np.sqrt(1 / ratio))
    coarse = dataclasses.replace(VISION, patch_size=VISION.patch_size * stride)
    cells = anyres.visual_layout(sizes, dataclasses.replace(PLAIN, vision=coarse))
    layout = anyres.visual_layout(sizes, arch)
    num_images = sum(len(size) == 2 for size in sizes)
    counts = [anyres.visual_token_count(size, arch, num_images if len(size) == 2 else 1) for size in sizes]
    assert layout.lengths == cells.lengths == tuple(counts)
    side = SIDE // stride
    features = np.random.default_rng(0).normal(size=(layout.num_tiles, SIDE, SIDE, 2))
    windows = features[:, : side * stride, : side * stride].reshape(-1, side, stride, side, stride, 2)
    pooled = windows.mean(axis=(2, 4)).reshape(-1, 2)
    newline = np.full((1, 2), 7.0)

    def tokens(of: anyres.Layout, values: np.ndarray) -> np.ndarray:
        return (np.concatenate([values, newline])[of.gather] * of.weights[..., None]).sum(axis=1)

    np.testing.assert_allclose(tokens(layout, features.reshape(-1, 2)), tokens(cells, pooled), atol=1e-5)
    assert layout.gather.shape[1] <= max(anyres.taps(arch), anyres.video_taps(arch))
