"""AnyRes equals transformers': tiles pixel by pixel, token counts, and the packing of features."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel, image_size_to_num_patches

from visor_jax.architecture import (
    AnyResArchitecture,
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.data import anyres
from visor_jax.errors import RequestError

TEXT = TextArchitecture(16, 8, 8, 3, 1, 1, 8)


def make_architecture(tile: int, patch: int, grid: int, max_tiles: int = 9) -> Architecture:
    """Pinpoints are all grids from 1x1 to `grid` x `grid`; 0 means none."""
    sides = range(1, grid + 1)
    return Architecture(
        text=TEXT,
        vision=VisionArchitecture(tile, patch, 8, 8, 1, 1),
        cross=CrossAttentionArchitecture(1),
        policy=PolicyArchitecture(8),
        anyres=AnyResArchitecture(tuple((r * tile, c * tile) for r in sides for c in sides), max_tiles=max_tiles),
    )


REAL = make_architecture(384, 14, 6)  # LLaVA-OneVision
SMALL = make_architecture(12, 4, 6, max_tiles=4)
EXTREMES = [(20_000, 1), (1, 20_000), (2600, 2600)]
ODD_SIZES = [(1, 1), (1, 2000), (2000, 1), (384, 384), (383, 385), (480, 640), (1080, 1920), (768, 2304), (37, 911)]


def random_sizes(count: int, seed: int, low: int = 1, high: int = 2600) -> list[tuple[int, int]]:
    """Heights and widths, small and large ones equally often."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(low), np.log(high), (count, 2))).astype(int)
    return [(int(height), int(width)) for height, width in sizes]


def random_image(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def reference_tiles(images: list[np.ndarray], architecture: Architecture) -> np.ndarray:
    """transformers' tiles before rescaling and normalization, [n, S, S, 3]."""
    tile = architecture.vision.tile_size
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in architecture.anyres.pinpoints],
        image_mean=list(architecture.anyres.image_mean),
        do_rescale=False,
        do_normalize=False,
    )
    nested: Any = [[Image.fromarray(image) for image in images]]  # one list per prompt
    values = processor.preprocess(nested)["pixel_values"]
    return np.concatenate([np.moveaxis(np.asarray(value), 1, -1) for value in values])


@pytest.mark.parametrize("size", ODD_SIZES)
def test_tiles_equal_transformers_at_the_real_size(size: tuple[int, int]) -> None:
    image = random_image(size)
    expected = reference_tiles([image], REAL)
    tiles = anyres.cut_tiles([image], REAL)
    assert tiles.dtype == np.uint8
    np.testing.assert_array_equal(tiles, expected)
    assert len(tiles) == anyres.tile_count(size, REAL) == anyres.visual_layout((size,), REAL).num_tiles


@pytest.mark.parametrize(
    ("architecture", "high"),
    [(SMALL, 300), pytest.param(REAL, 2600, marks=pytest.mark.slow)],
    ids=["small", "real"],
)
def test_tiles_equal_transformers_on_random_sizes(architecture: Architecture, high: int) -> None:
    for seed, size in enumerate([*EXTREMES, *random_sizes(300, seed=1, high=high)]):
        image = random_image(size, seed)
        actual, expected = anyres.cut_tiles([image], architecture), reference_tiles([image], architecture)
        np.testing.assert_array_equal(actual, expected, err_msg=str(size))


def test_frames_of_a_video_are_pooled_to_196_tokens() -> None:
    sizes = [(32, 480, 640), (480, 640)]
    assert [anyres.tile_count(size, REAL) for size in sizes] == [32, 5]
    assert [anyres.visual_token_count(size, REAL) for size in sizes] == [32 * 196 + 1, 2929]
    layout = anyres.visual_layout(sizes, REAL)
    assert (layout.num_tiles, layout.lengths) == (37, (32 * 196 + 1, 2929))  # also tiled with a video
    video = random_image((3, 40, 30))
    tiles = anyres.cut_tiles([video, random_image((20, 50))], SMALL)
    assert len(tiles) == 3 + anyres.tile_count((20, 50), SMALL)
    np.testing.assert_array_equal(tiles[1], reference_tiles([video[1]], SMALL)[0])  # stretched, like a base tile


def test_several_images_are_padded_to_one_tile_each() -> None:
    architecture = dataclasses.replace(
        SMALL, anyres=dataclasses.replace(SMALL.anyres, image_mean=(0.481, 0.457, 0.408))
    )
    for seed, sizes in enumerate(
        [
            [(5, 9), (40, 40)],
            [(1, 300), (300, 1), (7, 12)],
            *([size, (30, 20)] for size in random_sizes(30, 2, high=300)),
        ]
    ):
        images = [random_image(size, seed) for size in sizes]
        np.testing.assert_array_equal(anyres.cut_tiles(images, architecture), reference_tiles(images, architecture))
        layout = anyres.visual_layout(tuple(sizes), architecture)
        assert layout.num_tiles == len(images) and layout.lengths == (10,) * len(images)


def test_padding_in_bands_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [random_image((50, 301)), random_image((301, 50))]
    whole = anyres.cut_tiles(images, SMALL)
    monkeypatch.setattr(anyres, "_PAD_CHUNK_PIXELS", 1000)
    np.testing.assert_array_equal(anyres.cut_tiles(images, SMALL), whole)


def test_a_long_thin_picture_among_several_needs_no_square_in_memory() -> None:
    thin = random_image((1, 20_000))
    assert anyres.cut_tiles([thin, thin], SMALL).shape == (2, 12, 12, 3)


def test_without_pinpoints_every_picture_is_one_stretched_tile() -> None:
    architecture = make_architecture(12, 4, 0)
    image = random_image((24, 60))
    tiles = anyres.cut_tiles([image], architecture)
    np.testing.assert_array_equal(tiles[0], reference_tiles([image], SMALL)[0])  # the stretched base tile
    layout = anyres.visual_layout(((24, 60),), architecture)
    assert layout.gather[:, 0].tolist() == list(range(10)) and layout.weights.tolist() == [[1.0]] * 10
    assert anyres.visual_token_count((24, 60), architecture) == 10 and anyres.taps(architecture) == 1


def hf_count(size: tuple[int, int], architecture: Architecture) -> int:
    """Returns the count of LlavaOnevisionProcessor, without the tokenizer that its constructor requires."""
    tile = architecture.vision.tile_size
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.__dict__.update(
        num_image_tokens=architecture.vision.patches_per_tile,
        vision_aspect_ratio=f"anyres_max_{architecture.anyres.max_tiles}",
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(p) for p in architecture.anyres.pinpoints]),
    )
    return processor._get_number_of_features(size[0], size[1], tile, tile)


@pytest.mark.parametrize("architecture", [REAL, SMALL], ids=["real", "small"])
def test_token_counts_equal_transformers(architecture: Architecture) -> None:
    sides = range(1, 2601, 25)  # 10,816 sizes
    sizes = [(height, width) for height in sides for width in sides] + random_sizes(500, seed=3) + ODD_SIZES + EXTREMES
    pinpoints = [list(pinpoint) for pinpoint in architecture.anyres.pinpoints]
    for size in sizes:
        assert anyres.visual_token_count(size, architecture) == hf_count(size, architecture), size
        assert anyres.tile_count(size, architecture) == image_size_to_num_patches(
            size, pinpoints, architecture.vision.tile_size
        )


def test_known_sizes() -> None:
    published = {(384, 384): (2, 1485), (480, 640): (5, 2929), (1080, 1920): (16, 7269), (2200, 1700): (31, 7353)}
    for size, (tiles, tokens) in published.items():
        assert (anyres.tile_count(size, REAL), anyres.visual_token_count(size, REAL)) == (tiles, tokens)
    assert anyres.visual_token_count((480, 640), REAL, num_images=2) == 730
    assert anyres.tile_count((480, 640), REAL, num_images=2) == 1


def reference_features(features: torch.Tensor, size: tuple[int, int], architecture: Architecture) -> torch.Tensor:
    """Returns transformers' packing of one picture's features [n, patches, D]; the newline is a row of 100s."""
    config = SimpleNamespace(
        vision_config=SimpleNamespace(
            image_size=architecture.vision.tile_size, patch_size=architecture.vision.patch_size
        ),
        image_grid_pinpoints=[list(pinpoint) for pinpoint in architecture.anyres.pinpoints],
    )
    model: Any = SimpleNamespace(config=config)  # all attributes that the method reads of its model
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model,
        [features],
        torch.tensor([size]),
        torch.full((features.shape[-1],), 100.0),
        f"anyres_max_{architecture.anyres.max_tiles}",
    )
    return packed[0]


@pytest.mark.parametrize("architecture", [REAL, SMALL], ids=["real", "small"])
def test_layout_gathers_what_transformers_packs(architecture: Architecture) -> None:
    count = 12 if architecture is REAL else 150
    shrunk = 0
    for seed, size in enumerate([*random_sizes(count, seed=4), (1080, 1920), (2200, 1700), (2600, 2600)]):
        layout = anyres.visual_layout((size,), architecture)
        assert len(layout.gather) == anyres.visual_token_count(size, architecture) == sum(layout.lengths)
        features = np.random.default_rng(seed).normal(size=(layout.num_tiles, architecture.vision.patches_per_tile, 2))
        features = features.astype(np.float32)
        table = np.concatenate([features.reshape(-1, 2), np.full((1, 2), 100, np.float32)])
        slots = (table[layout.gather] * layout.weights[..., None]).sum(axis=1)
        expected = reference_features(torch.from_numpy(features), size, architecture).numpy()
        np.testing.assert_allclose(slots, expected, atol=3e-6, err_msg=str(size))
        assert layout.gather.shape[1] in (1, anyres.taps(architecture))
        shrunk += layout.gather.shape[1] == 4
    assert shrunk > 2


def test_unshrunk_layout_has_one_tap_of_weight_one() -> None:
    layout = anyres.visual_layout(((480, 640),), REAL)
    assert layout.gather.shape == (2929, 1) and (layout.weights == 1).all()
    assert layout.gather.dtype == np.int32 and layout.weights.dtype == np.float32


@hypothesis.given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=4))
@hypothesis.settings(max_examples=60, deadline=None)
def test_layouts_are_sound(sizes: list[tuple[int, int]]) -> None:
    layout = anyres.visual_layout(tuple(sizes), SMALL)
    newline = layout.num_tiles * SMALL.vision.patches_per_tile
    counts = tuple(anyres.visual_token_count(size, SMALL, len(sizes)) for size in sizes)
    assert layout.lengths == counts and len(layout.gather) == len(layout.weights) == sum(counts)
    assert layout.num_tiles == sum(anyres.tile_count(size, SMALL, len(sizes)) for size in sizes)
    assert ((layout.gather >= 0) & (layout.gather <= newline)).all()
    np.testing.assert_allclose(layout.weights.sum(axis=1), 1, atol=1e-6)
    is_newline = (layout.gather == newline).any(axis=1)
    assert (layout.weights[is_newline, 0] == 1).all()


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=4),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([SMALL, make_architecture(12, 4, 0)]),
)
def test_no_pictures_have_more_tokens_than_the_most(sizes, packing: int, architecture: Architecture) -> None:
    packed = dataclasses.replace(architecture, anyres=dataclasses.replace(architecture.anyres, packing=packing))
    counts = [anyres.visual_token_count(size, packed, len(sizes)) for size in sizes]
    assert sum(counts) <= anyres.most_visual_tokens(packed, len(sizes))


def test_some_picture_nearly_has_the_most_tokens() -> None:
    sides = range(384, 2400, 96)
    found = max(anyres.visual_token_count((height, width), REAL) for height in sides for width in sides)
    most = anyres.most_visual_tokens(REAL)
    assert found <= most <= 1.02 * found and anyres.most_visual_tokens(REAL, 3) == 3 * 730


def test_pinpoints_must_be_whole_tiles() -> None:
    architecture = dataclasses.replace(SMALL, anyres=AnyResArchitecture(((12, 13),)))
    with pytest.raises(RequestError, match=r"model\.anyres\.pinpoints"):
        anyres.visual_token_count((10, 10), architecture)


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=3),
    st.sampled_from([(2, (1, 2)), (4, (2, 2))]),
    st.sampled_from([SMALL, make_architecture(12, 4, 0)]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_packing_averages_neighbors_before_the_newlines(sizes, packing, architecture) -> None:
    count, window = packing
    packed = dataclasses.replace(architecture, anyres=dataclasses.replace(architecture.anyres, packing=count))
    plain, layout = anyres.visual_layout(sizes, architecture), anyres.visual_layout(sizes, packed)
    assert layout.lengths == tuple(anyres.visual_token_count(size, packed, len(sizes)) for size in sizes)
    assert layout.num_tiles == plain.num_tiles and layout.gather.shape[1] <= anyres.taps(packed)
    features = np.random.default_rng(0).normal(size=(plain.num_tiles * architecture.vision.patches_per_tile + 1, 2))

    def slots(of: anyres.Layout) -> np.ndarray:
        return (features[of.gather] * of.weights[..., None]).sum(axis=1)

    def pooled(rows: np.ndarray, width: int) -> np.ndarray:
        """Returns torch's mean over windows, partial at the edges, of a map given row by row."""
        there = torch.from_numpy(rows.reshape(-1, width, 2)).permute(2, 0, 1)[None]
        mean = torch.nn.functional.avg_pool2d(there, window, ceil_mode=True, count_include_pad=False)
        return mean[0].permute(1, 2, 0).numpy()

    expected, start, newline = [], 0, features[-1:]
    side = architecture.vision.patches_per_side
    for length in plain.lengths:  # one tile, then one newline or the rows of the stitched map
        end = start + side**2
        expected.append(pooled(slots(plain)[start:end], side).reshape(-1, 2))
        rest = slots(plain)[end : start + length]
        ends = np.flatnonzero((plain.gather[end : start + length] == len(features) - 1).any(axis=1))
        width = ends[0] + 1
        if width > 1:
            stitched = pooled(rest.reshape(-1, width, 2)[:, :-1], width - 1)
            rest = np.concatenate([stitched, np.repeat(newline[None], len(stitched), axis=0)], axis=1)
        expected.append(rest.reshape(-1, 2))
        start += length
    np.testing.assert_allclose(slots(layout), np.concatenate(expected), atol=1e-6)


@pytest.mark.parametrize("packing", [1, 2, 4])
def test_a_map_whose_rows_all_were_padding_leaves_the_whole_tile(packing) -> None:
    """A strip of 1 x 6 pixels on one tile of four patches: the picture is lower than a patch."""
    tiled = make_architecture(8, 4, 3, max_tiles=2)
    tiled = dataclasses.replace(tiled, anyres=dataclasses.replace(tiled.anyres, packing=packing))
    layout = anyres.visual_layout([(1, 6)], tiled)
    assert layout.lengths == (4 // packing,) == (anyres.visual_token_count((1, 6), tiled),)
