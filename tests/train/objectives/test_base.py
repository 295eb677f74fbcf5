"""Common to all objectives: activations with another dtype than the parameters."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from visor_jax import testing
from visor_jax.train.objectives.answers import answer_loss
from visor_jax.train.objectives.base import computed_in


def test_in_bfloat16_activations_are_cast_and_gradients_are_those_of_the_float32_parameters() -> None:
    arch = testing.tiny_architecture()
    params, batch = testing.random_params(arch), jax.tree.map(jnp.asarray, testing.random_batch(arch).arrays)
    on = jnp.ones(arch.num_slots, bool)

    def step(dtype: str):
        loss = computed_in(dtype, partial(answer_loss, arch=arch, num_turns=1, remat="none", tower_remat="none"))
        return testing.quick_jit(lambda p: jax.value_and_grad(lambda q: loss(q, batch, on)[0])(p))

    (exact, _), (rough, gradients) = step("float32")(params), step("bfloat16")(params)
    assert 0 < abs(float(exact) - float(rough)) < 0.02 * float(exact)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    products = [line for line in step("bfloat16").lower(params).as_text().splitlines() if "dot_general" in line]
    half = [line for line in products if "xbf16>, tensor" in line]
    assert len(half) > 2 / 3 * len(products), "all but logits, attention's softmax and their gradients"
