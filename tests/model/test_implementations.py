"""The whole model, and a training step of it, under every implementation of attention that runs here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.kernels.attention import api, base, xla_chunked
from visor_jax.kernels.attention import pallas_tpu as tpu
from visor_jax.kernels.attention import pallas_triton as gpu
from visor_jax.model.layers import Params
from visor_jax.train.objectives.answers import answer_loss

ARCH = testing.tiny_architecture(4)  # a super-block and one layer more
RUNS: dict[str, Callable[..., jax.Array]] = {
    "xla_chunked": xla_chunked.attention,
    "pallas_tpu": functools.partial(tpu.attention, tiles=tpu.Tiles(8, 8), interpret=True),
    "pallas_gpu": functools.partial(gpu.attention, tiles=gpu.Tiles(8, 8, 4, 8), interpret=True),
}
BUDGETS = {"all on": np.array([True]), "two of three rows": np.array([[True], [False], [True]])}


def loss_and_gradients(
    run: Callable[..., jax.Array], monkeypatch: pytest.MonkeyPatch, budget: np.ndarray
) -> tuple[Any, Params]:
    """Of one step on three rows of packed samples; every attention of tower and decoder goes through `run`."""
    used: list[str] = []

    def spied(*arrays: jax.Array, mask: Any) -> jax.Array:
        used.append("")
        return run(*arrays, mask=mask)

    monkeypatch.setitem(api.IMPLEMENTATIONS, "this one", api.Entry(spied))
    monkeypatch.setattr(api, "choose", lambda q, k, mask: "this one")
    batch = jax.tree.map(jnp.asarray, testing.random_batch(ARCH).arrays)

    def loss(params: Params) -> Any:
        return answer_loss(params, batch, budget, arch=ARCH, num_turns=4, remat="none", tower_remat="none")

    (value, _), gradients = testing.quick_jit(jax.value_and_grad(loss, has_aux=True))(testing.random_params(ARCH))
    assert len(used) >= 5, "tower, text-only, cross-attention and self-attention layers"
    return value, gradients


@functools.cache
def expected(name: str) -> tuple[Any, Params]:
    with pytest.MonkeyPatch.context() as patch:
        return loss_and_gradients(base.attention, patch, BUDGETS[name])


SLOW = [pytest.param(name, "two of three rows", marks=pytest.mark.slow) for name in ("pallas_tpu", "pallas_gpu")]


@pytest.mark.parametrize(
    ("implementation", "budget"), [*((name, "all on") for name in RUNS), ("xla_chunked", "two of three rows"), *SLOW]
)
@pytest.mark.slow
def test_a_training_step_is_the_same(implementation, budget, monkeypatch):
    value, gradients = loss_and_gradients(RUNS[implementation], monkeypatch, BUDGETS[budget])
    wanted, wanted_gradients = expected(budget)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted_gradients))
    assert largest > 1e-3, "gradients large enough to tell"
    for found, own in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-3, atol=1e-5 * largest)
