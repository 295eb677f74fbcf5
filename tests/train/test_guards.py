"""What a training run refuses at its start: parameters that devices do not share, copies, transfers, broadcasts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from visor_jax.architecture import MESH_AXES
from visor_jax.config import architecture, as_config, load_config, stage_config
from visor_jax.errors import RequestError, RunError
from visor_jax.scale.mesh import build_mesh
from visor_jax.scale.sharding import place_whole
from visor_jax.testing import tiny_config
from visor_jax.train import loop
from visor_jax.train.guards import check_aliased, check_donated, check_sharded, dispatching, sharding_of
from visor_jax.train.optimizer import build_optimizer
from visor_jax.train.state import abstract_state, state_places
from visor_jax.workdir.folder import Workdir

CONFIGS = Path(__file__).parents[2] / "configs"


def state_of(config: Any, stage: str, mesh: AbstractMesh | Mesh) -> tuple[Any, Any]:
    settings = stage_config(config, stage)
    state = abstract_state(architecture(config, stage), settings, build_optimizer(settings))
    return state, state_places(state, mesh)


@pytest.fixture(scope="module")
def half_billion() -> Any:
    return load_config(CONFIGS / "llava_ov_0p5b.py")


@pytest.mark.parametrize("sizes", [(1, 16, 1), (2, 32, 1), (1, 4, 4), (2, 128, 1), (1, 1, 1)], ids=str)
def test_meshes_that_divide_the_model_are_accepted(half_billion: Any, sizes: tuple[int, int, int]) -> None:
    mesh = AbstractMesh(sizes, MESH_AXES)
    state, places = state_of(half_billion, "full", mesh)
    check_sharded(state, places, mesh, tolerance=0.02)
    ways = sizes[1] * sizes[2]
    assert sharding_of(state, places, mesh).per_device < 1.07 * sharding_of(state, places, mesh).total / ways


def test_parameters_that_every_device_would_hold_are_named(half_billion: Any) -> None:
    mesh = AbstractMesh((1, 256, 1), MESH_AXES)  # 896 and 1152 are no multiples of 256
    state, places = state_of(half_billion, "full", mesh)
    with pytest.raises(RequestError) as error:
        check_sharded(state, places, mesh, tolerance=0.02)
    message = str(error.value)
    assert message.startswith("mesh.fsdp=256, mesh.tensor=1: each device would hold 10.15 GiB")
    assert "trainable/embed_tokens/embedding (519.5 MiB)" in message and "mesh.max_unsharded" in message
    check_sharded(state, places, mesh, tolerance=300.0)


def test_small_models_may_be_held_whole() -> None:
    config, mesh = as_config(tiny_config()), AbstractMesh((1, 7, 1), MESH_AXES)
    state, places = state_of(config, "full", mesh)
    assert sharding_of(state, places, mesh).excess > 1
    check_sharded(state, places, mesh, tolerance=0.02)


def test_a_state_that_was_copied_is_an_error() -> None:
    state = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    jax.jit(partial(jax.tree.map, lambda x: x + 1), donate_argnums=0)(state)
    check_donated(state)
    kept = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    jax.jit(partial(jax.tree.map, lambda x: x + 1))(kept)
    with pytest.raises(RunError, match=r"copied 2 arrays .* the largest: w float32\[4, 4\], b float32\[4\]"):
        check_donated(kept)


@pytest.mark.parametrize("donated", [("w", "b"), ("w",), ()], ids=str)
def test_a_program_that_does_not_alias_the_state_is_an_error(donated: tuple[str, ...]) -> None:
    state = {"w": jnp.ones((512, 512)), "b": jnp.ones((512, 256))}

    def step(w: Any, b: Any) -> Any:
        return w + 1, b + 1

    compiled = jax.jit(step, donate_argnames=donated).lower(**state).compile()
    reported = compiled.memory_analysis().alias_size_in_bytes
    assert reported == sum(state[name].nbytes for name in donated)
    if donated == ("w",):
        with pytest.raises(RunError, match=r"the compiled step overwrites 1.0 MiB of the 1.5 MiB of the state"):
            check_aliased(compiled, state)
    else:
        check_aliased(compiled, state)  # without any, the arrays themselves are judged


def test_a_dispatch_moves_nothing() -> None:
    mesh = build_mesh(1, 1, 1, devices=jax.devices()[:1])
    double = jax.jit(lambda x: x * 2)
    (here,) = place_whole([np.float32(1.5)], mesh)
    with dispatching(mesh):
        assert double(here).is_fully_replicated
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            double(np.float32(1.5))


def test_training_refuses_to_broadcast_ranks_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcasts(*arguments: Any) -> None:
        jax.jit(lambda x: x + jnp.ones((2, 3)))(jnp.ones(3))

    monkeypatch.setattr(loop, "train_stage", broadcasts)
    with jax.numpy_rank_promotion("allow"):
        broadcasts()
        with pytest.raises(ValueError, match="rank_promotion"):
            loop.train(tiny_config(), "full", Workdir(tmp_path))
