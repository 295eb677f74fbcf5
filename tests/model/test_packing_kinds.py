"""Visual tokens whose neighbors go side by side into the connector."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture, VisionArchitecture
from visor_jax.commands.recipe import run_stages
from visor_jax.config import architecture
from visor_jax.cost import tower_flops, visual_flops
from visor_jax.data.collate import make_batch
from visor_jax.errors import RequestError
from visor_jax.loading import load
from visor_jax.model.connector import connector, widened_connector
from visor_jax.model.encoders.siglip import tower
from visor_jax.model.visor import encode
from visor_jax.workdir.metrics_log import read_rows

GRIDS = ((20, 20), (20, 40), (40, 40))


def arch_of(packing: int, kind: str = "shuffle") -> Any:
    vision = VisionArchitecture(20, 4, 16, 24, num_layers=1, num_heads=2)
    anyres = AnyResArchitecture(GRIDS, max_tiles=2, packing=packing, packing_kind=kind)
    return testing.tiny_architecture(3, vision=vision, anyres=anyres)


@pytest.mark.parametrize("packing", [2, 4])
@pytest.mark.parametrize("size", [(20, 33), (60, 52)], ids=["crops", "shrunk crops"])
def test_neighbors_go_side_by_side_into_the_connector(packing: int, size: tuple[int, int]) -> None:
    arch = arch_of(packing)
    params = testing.random_params(arch)
    assert params["connector"]["linear_1"]["kernel"].shape[0] == packing * arch.vision.hidden_size
    example = testing.random_example(arch, (3, 4), size=size, seed=1)
    batch = make_batch([[example]], testing.row_shape_of([[example]], 2), arch)
    found = np.asarray(testing.quick_jit(partial(encode, arch=arch))(params, batch.arrays))[0]

    plain = arch_of(1)  # the same picture without packing: base tile, then rows that end in a newline
    layout = make_batch(
        [[alone := testing.random_example(plain, (3, 4), size=size, seed=1)]],
        testing.row_shape_of([[alone]], 0),
        plain,
    )
    patches = np.asarray(
        tower(params["vision"], {"tiles": jnp.asarray(batch.arrays["tiles"])}, arch.vision, arch.anyres)
    )[0]
    newline = len(layout.arrays["tiles"][0]) * 25
    source = np.concatenate([patches.reshape(-1, 16)[: alone.size.tiles * 25], np.zeros((1, 16))])
    gather, weights = layout.arrays["visual_gather"][0], layout.arrays["visual_weights"][0]
    is_newline = gather[:, 0] == newline
    gather = np.where(gather == newline, len(source) - 1, gather)
    features = (source[gather] * weights[..., None]).sum(axis=1)[: alone.size.visual]
    ends = np.flatnonzero(is_newline[: alone.size.visual])
    width = ends[1] - ends[0] - 1 if len(ends) > 1 else ends[0] - 25
    maps = [features[:25].reshape(5, 5, 16), np.delete(features[25:], ends - 25, axis=0).reshape(-1, width, 16)]
    expected = []
    for number, one in enumerate(maps):
        rows, columns = {2: (1, 2), 4: (2, 2)}[packing]
        height, length = -(-one.shape[0] // rows), -(-one.shape[1] // columns)
        side = np.zeros((height * rows, length * columns, 16))
        side[: one.shape[0], : one.shape[1]] = one
        folded = (
            side.reshape(height, rows, length, columns, 16).transpose(0, 2, 1, 3, 4).reshape(1, 1, -1, packing * 16)
        )
        tokens = np.asarray(connector(params["connector"], jnp.asarray(folded, jnp.float32))).reshape(
            height, length, -1
        )
        if number:
            last = np.broadcast_to(params["image_newline"], (height, 1, tokens.shape[-1]))
            tokens = np.concatenate([tokens, last], axis=1)
        expected.append(tokens.reshape(-1, tokens.shape[-1]))
    expected = np.concatenate(expected)
    assert example.size.visual == len(expected)
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)
    assert not found[len(expected) :].any()


def test_a_widened_connector_starts_with_the_mean_of_its_neighbors() -> None:
    rng = np.random.default_rng(0)
    kernel, neighbors = rng.normal(size=(16, 8)), rng.normal(size=(5, 4, 16))
    wide = np.asarray(widened_connector(jnp.asarray(kernel, jnp.float32), 4))
    np.testing.assert_allclose(neighbors.reshape(5, 64) @ wide, neighbors.mean(axis=1) @ kernel, atol=1e-5)


def test_costs_count_a_connector_per_position() -> None:
    plain, arch = arch_of(1), arch_of(4)
    size = arch.text.hidden_size
    tower = tower_flops(plain, 3) - 3 * 25 * 2 * (16 + size) * size
    assert visual_flops(arch, 3, 21) == pytest.approx(tower + 21 * 2 * (64 + size) * size)


@pytest.mark.slow
def test_it_trains_from_a_model_without_packing_and_answers(tmp_path: Path, quick: None) -> None:
    first = testing.tiny_config({"stages": ("full",), "stage_overrides.full.init_from": ""}, steps=1)
    run_stages(first, str(tmp_path / "plain"), ["full"])
    changes = {
        "model.anyres.packing": 4,
        "model.anyres.packing_kind": "shuffle",
        "data.visual_length": 12,
        "stages": ("full",),
        "stage_overrides.full.init_from": str(tmp_path / "plain" / "full"),
    }
    config = testing.tiny_config(changes, steps=2)
    run_stages(config, str(tmp_path / "packed"), ["full"])
    rows = read_rows(tmp_path / "packed" / "full" / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in rows)
    model = load(tmp_path / "packed")
    assert model.arch == architecture(config, "full")
    prompt = model._prompt(testing.random_picture(96, 96), "Which color?")
    assert prompt.size.visual == 10
    assert model.answer(testing.random_picture(96, 96), "Which color?", budget="full", max_new_tokens=1).budget

    other = {**changes, "model.anyres.packing": 2, "data.visual_length": 20}
    other["stage_overrides.full.init_from"] = str(tmp_path / "packed" / "full")
    with pytest.raises(RequestError, match="its connector reads 128 features, and 64 here"):
        run_stages(testing.tiny_config(other, steps=1), str(tmp_path / "other"), ["full"])
