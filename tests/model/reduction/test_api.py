"""Reductions in the whole model: what is kept of V(0) and in which order, whatever shares a row or a pool."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.reduction import reference
from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture, Architecture, ReductionArchitecture, VisionArchitecture
from visor_jax.data.collate import Batch, Example, RowShape, make_batch
from visor_jax.model.connector import connector, stitch
from visor_jax.model.encoders.siglip import received_attention, tower, tower_with_attention
from visor_jax.model.reduction.api import kept_candidates
from visor_jax.model.visor import encode

PLAIN = testing.tiny_architecture(
    3,
    vision=VisionArchitecture(20, 4, 16, 24, num_layers=2, num_heads=2),
    anyres=AnyResArchitecture(((20, 20), (20, 40), (40, 40)), max_tiles=2),
)
SELECTING = ("divprune", "vispruner", "visionzip", "hired")


def arch_of(method: str, ratio: float = 0.25) -> Architecture:
    return dataclasses.replace(PLAIN, reduction=ReductionArchitecture(method, ratio))


@cache
def params() -> Any:
    return testing.random_params(PLAIN)


ENCODE = testing.quick_jit(encode, static_argnames="arch")
KEPT = testing.quick_jit(kept_candidates, static_argnames="arch")


def tokens_of_candidates(params: Any, batch: Any, arch: Architecture) -> Any:
    """V(0) of all candidates."""
    tokens = connector(params["connector"], tower(params["vision"], batch, arch.vision, arch.anyres))
    return stitch(tokens, params["image_newline"], batch["visual_gather"], batch["visual_weights"])


ALL = testing.quick_jit(tokens_of_candidates, static_argnames="arch")
READ = ("tiles", "visual_gather", "visual_weights", "visual_pictures", "visual_marks", "visual_segments")


def arrays_of(batch: Batch) -> dict[str, np.ndarray]:
    return {name: batch.arrays[name] for name in READ if name in batch.arrays}


def visual(batch: Batch, arch: Architecture) -> np.ndarray:
    return np.asarray(ENCODE(params(), arrays_of(batch), arch=arch))


def examples(arch: Architecture) -> list[Example]:
    """A wide picture in crops, a square one whose map is shrunk, two pictures, no picture."""
    one = testing.random_example(arch, (3, 4), size=(20, 33), seed=1)
    shrunk = testing.random_example(arch, (2, 3), size=(60, 52), seed=2)
    two = testing.random_example(arch, (2, 2, 3), size=(20, 20), seed=3)
    return [one, shrunk, two, testing.random_example(arch, (7,), seed=4)]


def alone(example: Example, arch: Architecture) -> tuple[np.ndarray, Batch]:
    """The visual tokens of one example in a row of its own, and its batch."""
    size = example.size
    batch = make_batch([[example]], RowShape(max(size.tiles, 1), max(size.visual, 1), size.text), arch)
    return visual(batch, arch)[0, : size.visual], batch


@pytest.mark.parametrize("method", SELECTING)
def test_rows_and_pools_that_samples_share_change_nothing(method: str) -> None:
    arch = arch_of(method)
    one, shrunk, two, none = examples(arch)
    sizes = [example.size for example in (one, shrunk, two)]
    shape = RowShape(sum(x.tiles for x in sizes) + 2, sizes[0].visual + sizes[2].visual + 3, 24)
    batch = make_batch([[two, none, one], [shrunk]], shape, arch, 2)
    found, segments = visual(batch, arch), batch.arrays["visual_segments"]
    for row, segment, example in ((0, 1, two), (0, 3, one), (1, 1, shrunk)):
        expected, _ = alone(example, arch)
        np.testing.assert_allclose(found[row][segments[row] == segment], expected, atol=1e-4)
    assert not found[segments == 0].any()


@pytest.mark.parametrize("method", ["divprune", "vispruner", "hired"])
def test_kept_tokens_are_those_of_the_plain_model_in_their_order(method: str) -> None:
    arch = arch_of(method)
    for reduced, example in zip(examples(arch)[:3], examples(PLAIN)[:3], strict=True):
        kept, _ = alone(reduced, arch)
        tokens, _ = alone(example, PLAIN)
        distance = np.abs(tokens[None] - kept[:, None]).max(axis=2)
        newline = np.abs(tokens - params()["image_newline"]).max(axis=1) < 1e-5
        assert (distance.min(axis=1) < 1e-4).all()
        places = [int(np.argmin(row)) for row in distance if not newline[np.argmin(row)]]
        assert places == sorted(set(places))
        count = int((np.abs(kept - params()["image_newline"]).max(axis=1) < 1e-5).sum())
        most = {"vispruner": 0, "hired": int(newline.sum()), "divprune": 1 + int(newline.sum()) // 2}[method]
        assert count == most if method != "divprune" else count <= most


@pytest.mark.parametrize("method", SELECTING)
def test_kept_candidates_are_as_many_as_the_layout_says_and_those_whose_tokens_remain(method: str) -> None:
    arch = arch_of(method)
    one, _, two, none = examples(arch)
    sizes = [example.size for example in (one, two)]
    shape = RowShape(sum(x.tiles for x in sizes), sum(x.visual for x in sizes) + 3, 24)
    batch = make_batch([[two, none, one]], shape, arch)
    kept = np.asarray(KEPT(params(), arrays_of(batch), arch=arch))
    assert not kept[batch.arrays["visual_pictures"] == 0].any()
    assert kept.sum() == (batch.arrays["visual_segments"] > 0).sum()
    if method == "hired":
        tokens = np.asarray(ALL(params(), arrays_of(batch), arch=arch))
        used = batch.arrays["visual_segments"] > 0
        np.testing.assert_allclose(tokens[kept], visual(batch, arch)[used], atol=1e-5)


def test_attention_is_the_mean_over_heads_and_queries() -> None:
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((3, 5, 2, 4)).astype(np.float32) for _ in range(2))
    logits = np.einsum("nqhe,nkhe->nhqk", query, key) / 2
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    found = received_attention(jnp.asarray(query), jnp.asarray(key))
    np.testing.assert_allclose(found, weights.mean(axis=(1, 2)), atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_second_output_of_the_tower_leaves_its_features_as_they_are(layers: int) -> None:
    vision = dataclasses.replace(PLAIN.vision, num_layers=layers)
    arch = dataclasses.replace(PLAIN, vision=vision)
    tree = testing.random_params(arch)["vision"]
    tiles = {"tiles": jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 3, 20, 20, 3)), jnp.uint8)}
    plain = tower(tree, tiles, vision, arch.anyres)
    for remat in ("none", "full"):
        features, seen = tower_with_attention(tree, tiles, vision, arch.anyres, remat=remat, with_first=True)
        np.testing.assert_allclose(features, plain, atol=1e-5)
        np.testing.assert_allclose(seen.last.sum(axis=-1), 1, atol=1e-5)
    shorter = {**tree, "layers": jax.tree.map(lambda x: x[:1], tree["layers"])}
    _, first = tower_with_attention(shorter, tiles, dataclasses.replace(vision, num_layers=1), arch.anyres)
    np.testing.assert_allclose(seen.first, first.last, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 33), (20, 20)])
def test_visionzip_merges_before_the_connector_and_puts_contextual_tokens_last(size: tuple[int, int]) -> None:
    """Tile by tile in NumPy: the base's dominant and contextual tokens, then those of all crops."""
    arch = arch_of("visionzip", 0.4)
    texts = (3, 4) if size == (20, 33) else (2, 2, 3)  # two pictures: one tile and one newline each
    example = testing.random_example(arch, texts, size=size, seed=5)
    kept, batch = alone(example, arch)
    vision, features = params()["vision"], None
    features, seen = tower_with_attention(
        vision, {"tiles": jnp.asarray(batch.arrays["tiles"])}, arch.vision, arch.anyres
    )
    gather, weights = batch.arrays["visual_gather"][0], batch.arrays["visual_weights"][0]
    patches, num_tiles = arch.vision.patches_per_tile, example.size.tiles

    def at(values: Any) -> np.ndarray:
        flat = np.concatenate([np.asarray(values).reshape(num_tiles * patches, -1), np.zeros((1, values.shape[-1]))])
        return (flat[gather] * weights[..., None]).sum(axis=1)

    at_features, at_keys, scores = at(features), at(seen.keys), at(seen.last[..., None])[:, 0]
    tile, expected = gather[:, 0] // patches, []
    blocks = [[0], list(range(1, num_tiles))] if len(texts) == 2 else [[0], [1]]
    for block in blocks:
        dominant, contextual = [], []
        for number in block:
            own = np.flatnonzero((tile == number) & (weights.sum(axis=1) > 0))
            count = reference.share_of(len(own), 0.4)
            merged = int(count * 0.15625 + 0.5)
            top, _, values = reference.visionzip(at_features[own], at_keys[own], scores[own], count - merged, merged)
            dominant += [(own[i], value) for i, value in zip(top, values, strict=False)]
            centers = reference.visionzip(at_features[own], at_keys[own], scores[own], count - merged, merged)[1]
            contextual += [(own[i], value) for i, value in zip(centers, values[len(top) :], strict=True)]
        expected += [value for _, value in sorted(dominant, key=lambda x: x[0])]
        expected += [value for _, value in sorted(contextual, key=lambda x: x[0])]
        expected += [None] if len(texts) == 3 else []
    projected = [
        params()["image_newline"] if value is None
        else connector(params()["connector"], jnp.asarray(value, jnp.float32)[None, None, None])[0, 0, 0]
        for value in expected
    ]  # fmt: skip
    np.testing.assert_allclose(kept, np.array(projected), atol=1e-4)


@pytest.mark.parametrize("method", SELECTING)
def test_kept_tokens_have_gradients_and_choices_have_none(method: str) -> None:
    arch = arch_of(method)
    _, batch = alone(examples(arch)[0], arch)
    arrays = {name: jnp.asarray(x) for name, x in batch.arrays.items() if name.startswith(("tiles", "visual"))}
    gradient = testing.quick_jit(jax.grad(lambda tree: jnp.sum(encode(tree, arrays, arch, remat="full") ** 2)))
    found = gradient(params())
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
    assert float(jnp.abs(found["vision"]["layers"]["mlp"]["fc1"]["kernel"]).max()) > 0
