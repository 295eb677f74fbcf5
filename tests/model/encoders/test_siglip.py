"""From pixels to visual tokens: normalization, patches, the tower, and stitching."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture, VisionArchitecture
from visor_jax.data.sample import Sample, Sheet, Turn
from visor_jax.data.sheets import encode_record
from visor_jax.data.tiles import cells, make_tiles, tile_shapes
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.model.connector import stitch
from visor_jax.model.encoders.siglip import normalize, normalized_patches, patchify, tower
from visor_jax.model.remat import Remat

ARCH = testing.tiny_architecture(3)


def random_tiles(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_are_normalized_per_channel() -> None:
    anyres = AnyResArchitecture(image_mean=(0.1, 0.5, 0.9), image_std=(0.5, 0.25, 1.0))
    tiles = random_tiles((2, 3, 8, 8, 3))
    expected = (tiles / 255 - np.array(anyres.image_mean)) / np.array(anyres.image_std)
    np.testing.assert_allclose(normalize(jnp.asarray(tiles), anyres), expected, atol=1e-6)


def test_patches_run_row_by_row_over_row_column_channel() -> None:
    tiles = random_tiles((2, 2, 8, 8, 3)).astype(np.float32)
    found = np.asarray(patchify(jnp.asarray(tiles), 4))
    assert found.shape == (2, 2, 4, 48)
    for index, (top, left) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        np.testing.assert_array_equal(found[:, :, index], tiles[:, :, top : top + 4, left : left + 4].reshape(2, 2, 48))


def test_pixels_behind_the_last_whole_patch_are_left_out() -> None:
    tiles = jnp.asarray(random_tiles((1, 2, 11, 11, 3)), jnp.float32)
    np.testing.assert_array_equal(patchify(tiles, 4), patchify(tiles[:, :, :8, :8], 4))


def test_the_tower_mixes_the_patches_of_a_tile_and_no_tiles() -> None:
    tiles = random_tiles((1, 2, 8, 8, 3))
    changed = tiles.copy()
    changed[0, 0, :4, :4] = 255 - changed[0, 0, :4, :4]  # the first patch of the first tile
    params = testing.random_params(ARCH)["vision"]
    run = jax.jit(lambda p, x: tower(p, {"tiles": x}, ARCH.vision, ARCH.anyres))
    before, after = np.asarray(run(params, tiles)), np.asarray(run(params, changed))
    assert before.shape == (1, 2, 4, ARCH.vision.hidden_size)
    differs = np.abs(after - before).max(axis=-1)[0] > 0
    assert differs.tolist() == [[True] * 4, [False] * 4]


def test_a_tower_without_layers_is_its_embedding() -> None:
    arch = dataclasses.replace(ARCH, vision=dataclasses.replace(ARCH.vision, num_layers=0))
    params, tiles = testing.random_params(arch)["vision"], jnp.asarray(random_tiles((1, 1, 8, 8, 3)))
    patches = np.asarray(patchify(normalize(tiles, arch.anyres), 4))
    expected = patches @ params["patch_embedding"]["kernel"] + params["patch_embedding"]["bias"]
    found = tower(params, {"tiles": tiles}, arch.vision, arch.anyres)
    np.testing.assert_allclose(found, expected + params["position_embedding"]["embedding"], atol=1e-5)


def test_stitching_mixes_the_named_features() -> None:
    rng = np.random.default_rng(1)
    features, newline = rng.standard_normal((2, 3, 4, 5), np.float32), rng.standard_normal(5, np.float32)
    gather = rng.integers(0, 13, (2, 6, 4)).astype(np.int32)  # 12 is the newline
    gather[:, 0] = 12
    weights = rng.uniform(size=(2, 6, 4)).astype(np.float32)
    weights[:, 5] = 0  # padding
    found = np.asarray(stitch(*map(jnp.asarray, (features, newline, gather, weights))))
    for row in range(2):
        source = np.concatenate([features[row].reshape(12, 5), newline[None]])
        for slot in range(6):
            expected = sum(weights[row, slot, k] * source[gather[row, slot, k]] for k in range(4))
            np.testing.assert_allclose(found[row, slot], expected, atol=1e-6)
    assert not found[:, 5].any()


def test_recomputed_layers_give_the_same_gradients() -> None:
    params, tiles = testing.random_params(ARCH)["vision"], jnp.asarray(random_tiles((1, 2, 8, 8, 3)))

    def loss(params, remat: Remat) -> jax.Array:
        return jnp.sum(jnp.sin(tower(params, {"tiles": tiles}, ARCH.vision, ARCH.anyres, remat=remat)))

    gradients = {}
    policies: tuple[Remat, ...] = ("none", "full", "mlp")
    for remat in policies:
        assert ("remat" in str(jax.make_jaxpr(lambda p, r=remat: loss(p, r))(params))) == (remat != "none")
        gradients[remat] = testing.quick_jit(jax.grad(loss), static_argnames="remat")(params, remat=remat)
    for remat in policies[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients["none"], gradients[remat]
        )


def test_the_policy_mlp_runs_no_product_of_mlps_or_of_what_feeds_them_again() -> None:
    params, tiles = testing.random_params(ARCH)["vision"], jnp.asarray(random_tiles((1, 2, 8, 8, 3)))

    def products(remat: Remat) -> int:
        def loss(params) -> jax.Array:
            return jnp.sum(jnp.sin(tower(params, {"tiles": tiles}, ARCH.vision, ARCH.anyres, remat=remat)))

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("attention") - products("mlp") == 2, "the output of attention and the first product of the MLP"
    assert products("mlp") - products("none") >= 3, "queries, keys and values"


# --- small pictures and standardization -------------------------------------------------------------------------------

SHARED = dataclasses.replace(
    ARCH,
    vision=VisionArchitecture(16, 4, 16, 24, 2, 2),
    anyres=AnyResArchitecture(small_pictures=True, standardize=True),
)


def shared_tile() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Returns the arrays of one tile with three small pictures, and those of each picture alone in a tile."""
    rng, samples = np.random.default_rng(3), []
    for number, (size, origin) in enumerate([((8, 8), (0, 1)), ((4, 16), (2, 0)), ((12, 4), (1, 3))]):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        turns = (Turn("Which digit?", str(number)),)
        samples.append(Sample(f"s{number}", (image,), turns, "test", origin=origin))
    tokenizer = load_tokenizer("almanac")
    sheet, alone = encode_record(Sheet(tuple(samples)), tokenizer, SHARED), []
    for sample in samples:
        example = encode_record(sample, tokenizer, SHARED)
        alone.append({name: getattr(example, name)[None] for name in tile_shapes(1, SHARED)})
    return {name: getattr(sheet, name)[None] for name in tile_shapes(1, SHARED)}, alone


def test_a_pictures_features_and_gradients_in_a_shared_tile_are_those_of_it_alone() -> None:
    params = testing.random_params(SHARED)["vision"]
    together, alone = shared_tile()
    assert together["tiles"].shape[1] == 1 and together["tile_segments"].max() == 3

    def loss(params, batch) -> tuple[jax.Array, jax.Array]:
        features = tower(params, batch, SHARED.vision, SHARED.anyres)
        used = batch["tile_segments"][..., None] > 0
        return jnp.sum(jnp.where(used, jnp.sin(features), 0)), features

    of = testing.quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, features), gradients = of(params, together)
    start, sums = 0, []
    for number, batch in enumerate(alone, start=1):
        (_, expected), of_picture = of(params, batch)
        places = together["tile_segments"][0, 0] == number
        count = int(places.sum())
        np.testing.assert_allclose(features[0, 0][places], expected[0, 0, :count], rtol=1e-5, atol=1e-6)
        sums.append(of_picture)
        start += count
    assert start == 11
    total = jax.tree.map(lambda *parts: sum(parts), *sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, total)


def test_unused_places_reach_no_feature_of_a_picture() -> None:
    params = testing.random_params(SHARED)["vision"]
    together, _ = shared_tile()
    used = together["tile_segments"] > 0
    run = jax.jit(lambda batch: tower(params, batch, SHARED.vision, SHARED.anyres))
    expected = run(together)
    changed = {name: x.copy() for name, x in together.items()}
    cells(changed["tiles"][0, 0], SHARED)[3, 3] = 255
    changed["tile_positions"][~used], changed["tile_means"][~used], changed["tile_scales"][~used] = 5, 3.0, np.nan
    np.testing.assert_array_equal(run(changed)[used], expected[used])


def test_a_whole_picture_is_read_as_without_small_pictures() -> None:
    params, image = testing.random_params(SHARED)["vision"], random_tiles((20, 12, 3))
    arrays = {}
    for small in (True, False):
        arch = dataclasses.replace(SHARED, anyres=dataclasses.replace(SHARED.anyres, small_pictures=small))
        batch = {name: x[None] for name, x in make_tiles([image], arch).items()}
        arrays[small] = tower(params, batch, arch.vision, arch.anyres)
    np.testing.assert_allclose(arrays[True], arrays[False], rtol=1e-6, atol=1e-6)


def test_standardized_pixels_have_mean_zero_and_deviation_one() -> None:
    arch = dataclasses.replace(SHARED, anyres=AnyResArchitecture(standardize=True))
    batch = {name: x[None] for name, x in make_tiles([random_tiles((16, 16, 3))], arch).items()}
    patches = np.asarray(normalized_patches(batch, arch.vision, arch.anyres))
    assert patches.dtype == np.float32
    assert patches.mean() == pytest.approx(0, abs=1e-5) and patches.std() == pytest.approx(1, rel=1e-5)


def test_positions_start_as_sines_and_residual_projections_with_their_gain() -> None:
    vision = dataclasses.replace(SHARED.vision, position_init="sines", residual_init=0.25)
    arch = dataclasses.replace(SHARED, vision=vision)
    params, plain = (testing.fresh_params(a)["vision"] for a in (arch, SHARED))
    table = np.asarray(params["position_embedding"]["embedding"]).reshape(4, 4, 16)
    np.testing.assert_allclose(
        table[2, 3, ::4], 0.5 * np.array([np.sin(2), np.cos(2), np.sin(3), np.cos(3)]), rtol=1e-6
    )
    for path in (("self_attn", "out_proj"), ("mlp", "fc2")):
        ours, theirs = (p["layers"][path[0]][path[1]]["kernel"] for p in (params, plain))
        np.testing.assert_allclose(ours, 0.25 * theirs, rtol=1e-6)
    np.testing.assert_array_equal(params["layers"]["mlp"]["fc1"]["kernel"], plain["layers"]["mlp"]["fc1"]["kernel"])
