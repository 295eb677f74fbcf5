"""From pixels to visual tokens: normalization, patches, the tower's locality, and stitching."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture
from visor_jax.model.connector import stitch
from visor_jax.model.encoders.siglip import normalize, patchify, tower
from visor_jax.model.remat import Remat

ARCH = testing.tiny_architecture(3)
LOCAL = dataclasses.replace(ARCH, vision=dataclasses.replace(ARCH.vision, patch_local=True))


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


def test_a_patch_local_tower_lets_no_patch_see_another_and_no_tower_mixes_tiles() -> None:
    tiles = random_tiles((1, 2, 8, 8, 3))
    changed = tiles.copy()
    changed[0, 0, :4, :4] = 255 - changed[0, 0, :4, :4]  # the first patch of the first tile
    for arch, others_change in ((LOCAL, False), (ARCH, True)):
        params = testing.random_params(arch)["vision"]
        assert ("self_attn" in params["layers"]) == others_change
        run = jax.jit(lambda p, x, a=arch: tower(p, x, a.vision, a.anyres))
        before, after = np.asarray(run(params, tiles)), np.asarray(run(params, changed))
        assert before.shape == (1, 2, 4, arch.vision.hidden_size)
        differs = np.abs(after - before).max(axis=-1)[0] > 0
        assert differs.tolist() == [[True, *[others_change] * 3], [False] * 4]


def test_a_tower_without_layers_is_its_embedding() -> None:
    arch = dataclasses.replace(ARCH, vision=dataclasses.replace(ARCH.vision, num_layers=0))
    params, tiles = testing.random_params(arch)["vision"], jnp.asarray(random_tiles((1, 1, 8, 8, 3)))
    patches = np.asarray(patchify(normalize(tiles, arch.anyres), 4))
    expected = patches @ params["patch_embedding"]["kernel"] + params["patch_embedding"]["bias"]
    found = tower(params, tiles, arch.vision, arch.anyres)
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
        return jnp.sum(jnp.sin(tower(params, tiles, ARCH.vision, ARCH.anyres, remat=remat)))

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
            return jnp.sum(jnp.sin(tower(params, tiles, ARCH.vision, ARCH.anyres, remat=remat)))

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    assert products("attention") - products("mlp") == 2, "the output of attention and the first product of the MLP"
    assert products("mlp") - products("none") >= 3, "queries, keys and values"
