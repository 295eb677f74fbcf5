"""Pools of the tiles of single questions: V(0) of every row is that of one pool per row, and little is padding."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from tests.data.test_collate import IMAGE, PLAIN, TILED
from visor_jax.architecture import AnyResArchitecture, Architecture, ReductionArchitecture
from visor_jax.data.collate import RowShape, encode_tokens, make_batch
from visor_jax.data.tile_pools import Arrays, in_pools, tile_bucket, tiles_of_rows, tower_inputs
from visor_jax.model.visor import encode, init_params

pytestmark = pytest.mark.usefixtures("quick")
ARCHITECTURES = {
    "tiled": TILED,
    "packed": dataclasses.replace(TILED, anyres=dataclasses.replace(TILED.anyres, packing=2)),
    "standardized": dataclasses.replace(TILED, anyres=dataclasses.replace(TILED.anyres, standardize=True)),
    "small": dataclasses.replace(PLAIN, anyres=AnyResArchitecture(small_pictures=True)),
    **{
        method: dataclasses.replace(TILED, reduction=ReductionArchitecture(method, 0.5))
        for method in ("vispruner", "visionzip", "hired", "divprune")
    },
}
# Height and width of each row's picture: one tile, several of them, an empty row, the largest grid, text only.
SIZES = ((8, 8), (20, 9), None, (24, 24), (), (9, 23), (8, 16), (5, 31))


def batch_of(arch: Architecture) -> Arrays:
    """Returns a batch with one picture per row, and room for the largest one everywhere."""
    random, rows = np.random.default_rng(0), []
    for size in SIZES:
        origin = (0, 1) if size == (8, 8) and arch.anyres.small_pictures else None
        shape = (4, 4) if origin else size
        images = [random.integers(0, 256, (*shape, 3), dtype=np.uint8)] if shape else []
        tokens = [1, IMAGE, 2] if images else [1, 2]
        rows.append([] if size is None else [encode_tokens(tokens, images, IMAGE, arch, origin=origin)])
    return make_batch(rows, RowShape(12, 80, 4), arch).arrays


@pytest.mark.parametrize("num_pools", [1, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_visual_tokens_are_those_of_one_pool_per_row(name: str, num_pools: int) -> None:
    arch = ARCHITECTURES[name]
    params, arrays = init_params(arch, jax.random.key(0)), batch_of(arch)
    pooled = in_pools(arrays, num_pools, arch)
    counts = tiles_of_rows(arrays, arch)
    assert counts.tolist()[2] == counts.tolist()[4] == 0 < counts.max()
    most = counts.reshape(num_pools, -1).sum(axis=1).max()
    assert pooled["tiles"].shape[:2] == (num_pools, min(tile_bucket(int(most)), 12 * len(counts) // num_pools))
    assert {*pooled} == {*tower_inputs(arch), "visual_segments"}
    used = arrays["visual_segments"] > 0
    expected, actual = (
        np.asarray(jax.jit(encode, static_argnames="arch")(params, b, arch=arch)) for b in (arrays, pooled)
    )
    assert used.any() and np.ptp(expected[used]) > 0
    np.testing.assert_allclose(actual[used], expected[used], rtol=0, atol=2e-6)


@given(st.integers(1, 10**6))
def test_a_bucket_is_hardly_larger_than_what_it_holds(count: int) -> None:
    size = tile_bucket(count)
    assert count <= size < max(1.5 * count, 2)
    assert tile_bucket(size) == size, "buckets are few"


def test_no_tiles_at_all() -> None:
    assert tile_bucket(0) == 1
    text = make_batch([[encode_tokens([1, 2], [], IMAGE, TILED)]], RowShape(12, 80, 4), TILED).arrays
    assert in_pools(text, 1, TILED)["tiles"].shape[:2] == (1, 1)
