"""Every method that chooses tokens, compiled and for several groups, against the published algorithm in NumPy."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.reduction import reference
from visor_jax.architecture import ReductionArchitecture
from visor_jax.model.reduction import divprune, hired, visionzip, vispruner
from visor_jax.model.reduction.base import members_of, rank_within

SIZE, PATCHES = 6, 20
SETTINGS = {
    "divprune": [ReductionArchitecture("divprune", 0.25), ReductionArchitecture("divprune", 0.098)],
    "vispruner": [
        ReductionArchitecture("vispruner", 0.25), ReductionArchitecture("vispruner", 0.3, important_share=0.2),
        ReductionArchitecture("vispruner", 0.25, important_share=1.0),
    ],
    "visionzip": [
        ReductionArchitecture("visionzip", 0.5, contextual_share=0.4), ReductionArchitecture("visionzip", 0.25),
        ReductionArchitecture("visionzip", 0.25, contextual_share=1.0),
    ],
    "hired": [
        ReductionArchitecture("hired", 0.25), ReductionArchitecture("hired", 0.4, base_share=0.0),
        ReductionArchitecture("hired", 0.2, base_share=1.0),
    ],
}  # fmt: skip


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@cache
def program(function: Any, reduction: ReductionArchitecture, **options: Any) -> Any:
    """`function` of one group, compiled for several."""
    return jax.jit(jax.vmap(lambda *arrays: function(*arrays, reduction=reduction, **options)))


def in_tiles(sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which of a tile's places are used, [n, P] in no particular order, and their places."""
    valid = np.zeros((len(sizes), PATCHES), bool)
    places = [np.sort(np.random.default_rng([seed, n]).permutation(PATCHES)[:size]) for n, size in enumerate(sizes)]
    for row, used in zip(valid, places, strict=True):
        row[used] = True
    return valid, places


GROUPS = st.tuples(*[st.integers(0, PATCHES)] * 3)


@pytest.mark.parametrize("reduction", SETTINGS["vispruner"])
@given(sizes=GROUPS, seed=st.integers(0, 99))
@settings(max_examples=15)
def test_vispruner_keeps_what_the_published_algorithm_keeps(reduction: ReductionArchitecture, sizes, seed) -> None:
    features, scores = random(seed, 3, PATCHES, SIZE), random(seed + 1, 3, PATCHES)
    valid, places = in_tiles(sizes, seed)
    kept = np.asarray(program(vispruner.choose_tile, reduction)(features, scores, valid))
    for n, used in enumerate(places):
        count = reference.share_of(len(used), reduction.ratio)
        expected = reference.vispruner(features[n, used], scores[n, used], count, reduction.important_share)
        assert np.flatnonzero(kept[n]).tolist() == used[expected].tolist()
        assert kept[n].sum() == count


@pytest.mark.parametrize("reduction", SETTINGS["visionzip"])
@given(sizes=GROUPS, seed=st.integers(0, 99))
@settings(max_examples=15)
def test_visionzip_keeps_and_merges_what_the_published_algorithm_does(
    reduction: ReductionArchitecture, sizes, seed
) -> None:
    features, keys = random(seed, 3, PATCHES, SIZE), random(seed + 2, 3, PATCHES, 4)
    scores, (valid, places) = random(seed + 1, 3, PATCHES), in_tiles(sizes, seed)
    found = program(visionzip.choose_tile, reduction)(keys, scores, valid)
    kept, is_center, target = map(np.asarray, found)
    for n, used in enumerate(places):
        count = reference.share_of(len(used), reduction.ratio)
        contextual = int(count * reduction.contextual_share + 0.5)
        top, centers, merged = reference.visionzip(
            features[n, used], keys[n, used], scores[n, used], count - contextual, contextual
        )
        assert np.flatnonzero(kept[n] & ~is_center[n]).tolist() == used[top].tolist()
        assert np.flatnonzero(is_center[n]).tolist() == used[centers].tolist()
        for token, place in zip(merged, [*used[top], *used[centers]], strict=True):
            joined = [i for i in used if target[n, i] == place and i != place]
            mean = features[n, joined].mean(axis=0) if joined else 0
            np.testing.assert_allclose(features[n, place] + mean, token, atol=1e-5)
        dropped = [i for i in used if not kept[n, i] and target[n, i] == i]
        assert not dropped or not centers


@pytest.mark.parametrize("reduction", SETTINGS["divprune"])
@given(sizes=st.tuples(*[st.integers(0, 12)] * 3), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_divprune_keeps_what_the_published_algorithm_keeps(reduction: ReductionArchitecture, sizes, seed) -> None:
    """Two rows: three pictures one after the other, and the same in another order."""
    tokens, pictures = random(seed, 2, 40, SIZE), np.zeros((2, 40), np.int32)
    for row, order in enumerate(((0, 1, 2), (2, 0, 1))):
        start = 0
        for number in order:
            pictures[row, start : start + sizes[number]] = 3 * number + 1
            start += sizes[number]
    kept = np.asarray(program(divprune.choose_row, reduction)(tokens, pictures))
    assert not kept[pictures == 0].any()
    for row in range(2):
        for number in range(3):
            used = np.flatnonzero(pictures[row] == 3 * number + 1)
            expected = reference.divprune(tokens[row, used], reference.share_of(len(used), reduction.ratio))
            assert np.flatnonzero(kept[row, used]).tolist() == expected


def test_divprune_takes_no_token_twice() -> None:
    tokens = np.repeat(random(0, 1, 2, SIZE), 4, axis=1)  # four copies each of two tokens
    reduction = ReductionArchitecture("divprune", 0.5)
    kept = np.asarray(program(divprune.choose_row, reduction)(tokens, np.ones((1, 8), np.int32)))
    assert kept.sum() == 4 and kept[0, :4].any() and kept[0, 4:].any()


@pytest.mark.parametrize("reduction", SETTINGS["hired"])
@given(crops=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_hired_keeps_what_the_published_algorithm_keeps(reduction: ReductionArchitecture, crops, seed) -> None:
    """Pictures of one base tile of nine patches and up to three crops, of which some patches are unpadded away."""
    patches, num_tiles, rng = 9, 12, np.random.default_rng(seed)
    tiles, pictures, marks, pieces, tile = [], [], [], [], 0
    for sizes in crops:
        first_tile = tile
        crop_of_patch = rng.integers(0, len(sizes), patches) if sizes else np.zeros(patches, int)
        pieces.append((first_tile, sizes, crop_of_patch))
        for number, size in enumerate((patches, *sizes)):
            tiles += [tile + 1] * size
            pictures += [first_tile + 1] * size
            marks += (crop_of_patch + first_tile + 2).tolist() if number == 0 and sizes else [0] * size
            tile += 1
    fill = 120 - len(tiles)
    tiles, pictures, marks = (np.array([*x, *[0] * fill], np.int32)[None] for x in (tiles, pictures, marks))
    last, first = random(seed, 1, 120), random(seed + 1, 1, 120)
    run = program(hired.choose_patches, reduction, num_tiles=num_tiles, patches=patches)
    kept = np.asarray(run(tiles, pictures, marks, last, first))[0]
    assert not kept[tiles[0] == 0].any()
    for first_tile, sizes, crop_of_patch in pieces:
        own = [np.flatnonzero(tiles[0] == first_tile + 1 + number) for number in range(len(sizes) + 1)]
        count = reference.share_of(sum(map(len, own)), reduction.ratio)
        expected = reference.hired(
            [last[0, x] for x in own], first[0, own[0]], crop_of_patch, count, reduction.base_share
        )
        assert [np.flatnonzero(kept[x]).tolist() for x in own] == expected
        assert sum(kept[x].sum() for x in own) == count


@given(sizes=GROUPS, seed=st.integers(0, 99))
@settings(max_examples=15)
def test_what_lies_at_padding_is_irrelevant(sizes, seed) -> None:
    """Whatever values padding has, and in whatever order: the same patches remain."""
    valid, _ = in_tiles(sizes, seed)
    arrays = random(seed, 3, PATCHES, SIZE), random(seed + 1, 3, PATCHES)
    others = random(seed + 2, 3, PATCHES, SIZE), random(seed + 3, 3, PATCHES) * 1e6
    replaced = [
        np.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, y) for x, y in zip(arrays, others, strict=True)
    ]
    for function, name in ((vispruner.choose_tile, "vispruner"), (visionzip.choose_tile, "visionzip")):
        run = program(function, SETTINGS[name][0])
        found, expected = (jax.tree.leaves(run(*x, valid)) for x in (replaced, arrays))
        assert not np.asarray(expected[0])[~valid].any()
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(one)[valid], np.asarray(other)[valid])


# --- what the methods share -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 99))
def test_members_are_the_candidates_of_each_tile_in_order(tiles: list[int], seed: int) -> None:
    flat = np.zeros(30, np.int32)
    flat[: len(tiles)] = tiles
    members = members_of(jnp.asarray(flat.reshape(2, 15)), 4, 30)
    for tile, (places, valid) in enumerate(zip(*map(np.asarray, members), strict=True), 1):
        assert places[valid].tolist() == np.flatnonzero(flat == tile).tolist()
    values = random(seed, 4, 30)
    spread = np.asarray(members.spread(jnp.asarray(values), jnp.full((2, 15), -1, jnp.float32))).reshape(-1)
    assert (spread[flat == 0] == -1).all()
    for tile in range(4):
        assert spread[flat == tile + 1].tolist() == values[tile, : (flat == tile + 1).sum()].tolist()


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5), st.booleans()), min_size=1, max_size=20))
def test_ranks_count_members_of_a_group_that_come_before(items: list[tuple[int, int, bool]]) -> None:
    groups, scores, members = (np.array(x) for x in zip(*items, strict=True))
    ranks = rank_within(jnp.asarray(groups, jnp.int32), jnp.asarray(scores, jnp.float32), jnp.asarray(members))
    for i, (group, score, is_member) in enumerate(items):
        before = [j for j, (g, s, m) in enumerate(items) if m and g == group and (s > score or (s == score and j < i))]
        assert int(ranks[i]) == (len(before) if is_member else len(items))
