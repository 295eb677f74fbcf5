"""The further scales of a training batch: the arrays of each are those of a model that has this scale alone."""

from __future__ import annotations

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture, Architecture, ReductionArchitecture, VisionArchitecture
from visor_jax.data import anyres
from visor_jax.data.collate import RowShape, make_batch
from visor_jax.data.row_shape import at_scale
from visor_jax.data.scales import room_at_scale

VISION = VisionArchitecture(20, 4, 16, 24, num_layers=1, num_heads=2)
GRIDS = tuple((20 * rows, 20 * columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
ARRAYS = ("visual_gather", "visual_weights", "visual_positions", "visual_segments", "text_positions")


def arch_of(ratio: float, grids=GRIDS, max_tiles: int = 2) -> Architecture:
    reduction = ReductionArchitecture("m3", ratio, scales=(1, 1 / 4, 1 / 25))
    return testing.tiny_architecture(3, vision=VISION, anyres=AnyResArchitecture(grids, max_tiles), reduction=reduction)


SIDE = st.integers(12, 130)
SIZES = st.one_of(
    st.tuples(SIDE, SIDE).map(lambda size: (size,)),  # one picture in crops
    st.lists(st.tuples(SIDE, SIDE), min_size=2, max_size=3).map(tuple),
    st.tuples(st.integers(1, 5), SIDE, SIDE).map(lambda size: (size,)),  # a video
)


@hypothesis.given(SIZES, st.sampled_from([1, 1 / 4, 1 / 25]), st.sampled_from([(), GRIDS]), st.integers(2, 4))
@hypothesis.settings(max_examples=40)
def test_a_row_has_room_at_every_scale_for_what_fits_at_the_ratio(sizes, ratio: float, grids, max_tiles: int) -> None:
    arch = arch_of(ratio, grids, max_tiles)
    assert [other.reduction.ratio for other in arch.other_scales] == [x for x in (1, 1 / 4, 1 / 25) if x != ratio]
    count = sum(anyres.visual_layout(sizes, arch).lengths)
    for other in arch.other_scales:
        assert sum(anyres.visual_layout(sizes, other).lengths) <= room_at_scale(count, arch, other)


def test_room_is_that_of_pictures_or_of_videos_whichever_is_more() -> None:
    arch = arch_of(1, ())
    pictures, videos = (3 * (4 + 1), 3 * (1 + 1)), (78 * (1 + 1) // (9 + 1), 78 * (1 + 1) // (9 + 1))
    expected = [max(pair) for pair in zip(pictures, videos, strict=True)]
    assert [room_at_scale(3 * (25 + 1), arch, other) for other in arch.other_scales] == expected


@pytest.mark.parametrize("ratio", [1, 1 / 25])
def test_arrays_of_a_scale_are_those_of_a_model_that_has_it_alone(ratio: float) -> None:
    arch = arch_of(ratio)

    def rows(arch: Architecture):
        one = testing.random_example(arch, (3, 4), size=(20, 33), seed=1)
        shrunk = testing.random_example(arch, (2, 3), size=(60, 52), seed=2)
        two = testing.random_example(arch, (2, 2, 3), size=(20, 20), seed=3)
        return [[two, testing.random_example(arch, (7,), seed=4), one], [shrunk]]

    room = RowShape(16, 160, 24)
    arrays = make_batch(rows(arch), room, arch, 2, all_scales=True).arrays
    plain = make_batch(rows(arch), room, arch, 2).arrays
    assert all(np.array_equal(arrays[name], plain[name]) for name in plain)
    assert len(arrays) == len(plain) + len(ARRAYS) * len(arch.other_scales)
    for number, other in enumerate(arch.other_scales):
        found = {name: arrays[at_scale(number, name)] for name in ARRAYS}
        shape = dataclasses.replace(room, visual=found["visual_positions"].shape[1])
        expected = make_batch(rows(other), shape, other, 2).arrays
        for name in ARRAYS:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
