"""What the backward pass recomputes under each policy of `train.remat`, counted in its program."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax.kernels import AttentionMask, attention
from visor_jax.model.remat import Remat, layer_input, recomputed

BATCH, LENGTH, HEADS, HEAD_DIM = 1, 40, 2, 8
SIZE = HEADS * HEAD_DIM
POSITIONS = jnp.arange(LENGTH, dtype=jnp.int32)[None]
MASK = AttentionMask(POSITIONS, POSITIONS, jnp.ones_like(POSITIONS), jnp.ones_like(POSITIONS), None, True)


def loss(kernels: Any, x: Any, remat: Remat, implementation: Any) -> jax.Array:
    """Layers of attention and a product, scanned."""

    def layer(x: Any, kernel: Any) -> tuple[Any, None]:
        x = layer_input(x)
        query = (x @ kernel).reshape(BATCH, LENGTH, HEADS, HEAD_DIM)
        attended = attention(query, query, query, mask=MASK, implementation=implementation)
        return x + jnp.sin(attended.reshape(BATCH, LENGTH, SIZE) @ kernel), None

    return jnp.sum(jax.lax.scan(recomputed(layer, remat), x, kernels)[0])


def count(jaxpr: Any, name: str) -> int:
    """Returns how often a primitive occurs in a program, including the functions that it calls."""
    inner = [leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves([*eqn.params.values()], is_leaf=is_program)]
    programs = [getattr(leaf, "jaxpr", leaf) for leaf in inner if is_program(leaf)]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(count(program, name) for program in programs)


def is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("implementation", ["xla", "xla_chunked"])
def test_policies_recompute_what_they_say_and_agree(implementation: str) -> None:
    random = np.random.default_rng(0)
    kernels = jnp.asarray(random.normal(size=(2, SIZE, SIZE)) * 0.3, jnp.float32)
    x = jnp.asarray(random.normal(size=(BATCH, LENGTH, SIZE)), jnp.float32)
    gradients, exps = {}, {}
    for remat in get_args(Remat):
        gradient = jax.grad(partial(loss, remat=remat, implementation=implementation))
        program = jax.make_jaxpr(gradient)(kernels, x).jaxpr
        exps[remat] = count(program, "exp")
        gradients[remat] = jax.jit(gradient)(kernels, x)
        np.testing.assert_allclose(gradients[remat], gradients["none"], rtol=1e-5, atol=1e-6)
    assert exps["full"] == exps["offload"] > exps["none"], "softmax runs again"
    kernel_runs_once = implementation != "xla"  # the reference keeps no weights, so they are computed again
    assert (exps["attention"] == exps["none"]) == kernel_runs_once


def test_offloaded_inputs_lie_in_the_hosts_memory() -> None:
    x = jnp.ones((BATCH, LENGTH, SIZE))
    program = str(
        jax.make_jaxpr(jax.grad(partial(loss, remat="offload", implementation="xla")))(jnp.ones((2, 16, 16)), x)
    )
    assert "pinned_host" in program or "<host>" in program


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_policy_is_named() -> None:
    unknown: Any = "some"
    with pytest.raises(
        ValueError, match="remat='some': expected 'none', 'full', 'attention', 'mlp', 'products' or 'offload'"
    ):
        recomputed(lambda x: x, unknown)
