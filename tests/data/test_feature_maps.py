"""Packing of a map's neighbors: means, bilinear interpolation, and channels side by side."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from visor_jax.architecture import AnyResArchitecture
from visor_jax.data.feature_maps import PACKED, joined, packed, packed_size

SIDE = st.integers(1, 13)


def tokens(features: np.ndarray, packing: int, kind: str) -> np.ndarray:
    """The packed map [h, w, D] of features [H, W, D]; of "shuffle" [h, w, packing * D]."""
    height, width, size = features.shape
    gather = np.arange(height * width).reshape(height, width, 1)
    found, weights = packed(
        gather, np.ones(gather.shape, np.float32), AnyResArchitecture((), 9, packing=packing, packing_kind=kind)
    )
    taps = features.reshape(-1, size)[found] * weights[..., None]
    if kind == "shuffle":
        return packing * taps.reshape(*taps.shape[:2], -1)
    return taps.sum(axis=2)


@hypothesis.given(SIDE, SIDE, st.sampled_from([2, 4]))
@hypothesis.settings(max_examples=30)
def test_shuffled_channels_are_those_of_the_neighbors(height: int, width: int, packing: int) -> None:
    rows, columns = PACKED[packing]
    features = np.random.default_rng(0).normal(size=(height, width, 3))
    h, w = packed_size((height, width), AnyResArchitecture(packing=packing))
    expected = np.zeros((h, w, packing * 3))
    for y, x in np.ndindex(height, width):
        neighbor = (y % rows) * columns + x % columns
        expected[y // rows, x // columns, 3 * neighbor : 3 * neighbor + 3] = features[y, x]
    np.testing.assert_allclose(tokens(features, packing, "shuffle"), expected, atol=1e-6)


@hypothesis.given(SIDE, SIDE, st.sampled_from([2, 4]))
@hypothesis.settings(max_examples=30)
def test_bilinear_packing_is_torchs_interpolation(height: int, width: int, packing: int) -> None:
    torch = pytest.importorskip("torch")
    features = np.random.default_rng(0).normal(size=(height, width, 3)).astype(np.float32)
    size = packed_size((height, width), AnyResArchitecture(packing=packing))
    image = torch.from_numpy(features).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(image, size=size, mode="bilinear")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(tokens(features, packing, "bilinear"), expected, atol=1e-5)


def test_bilinear_packing_of_even_sides_is_the_mean() -> None:
    features = np.random.default_rng(0).normal(size=(6, 8, 3))
    for packing in (2, 4):
        np.testing.assert_allclose(tokens(features, packing, "bilinear"), tokens(features, packing, "mean"), atol=1e-6)


def test_taps_that_join_adds_belong_to_every_neighbor_alike() -> None:
    """A map shrunk from four features each beside one that is not: tap k belongs to neighbor k modulo 2."""
    anyres = AnyResArchitecture(packing=2, packing_kind="shuffle")
    wide = packed(np.arange(16).reshape(1, 4, 4), np.full((1, 4, 4), 0.25, np.float32), anyres)
    plain = packed(np.arange(4).reshape(1, 4, 1), np.ones((1, 4, 1), np.float32), anyres)
    gather, weights = joined([(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])) for x, y in (plain, wide)])
    assert gather.shape == (4, 8)
    assert gather[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and weights[0].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert gather[2].tolist() == [0, 4, 1, 5, 2, 6, 3, 7] and weights[2].tolist() == [0.125] * 8
