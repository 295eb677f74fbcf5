"""In bfloat16 the model computes in bfloat16: activations and caches, with logits and scores in float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.model.incremental import decode_step, prefill_prefix, prefill_rest
from visor_jax.model.layers import in_dtype
from visor_jax.model.visor import abstract_params, encode, hidden_states, logits

ARCH = testing.tiny_architecture(3)
BITS = (True,)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_every_activation_and_cache_has_the_parameters_dtype() -> None:
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract_params(ARCH))
    batch = shapes(testing.random_prompts(ARCH).arrays)
    visual = jax.eval_shape(partial(encode, arch=ARCH), params, batch)
    on = jnp.array(BITS)
    hidden = jax.eval_shape(lambda p, v, b: hidden_states(p, v, b, on, ARCH), params, visual, batch)
    prefix, scores = jax.eval_shape(
        lambda p, v, b: prefill_prefix(p, v, b, 2, ARCH, routed=True), params, visual, batch
    )
    rest = partial(prefill_rest, bits=BITS, capacity=16, arch=ARCH)
    first, cache = jax.eval_shape(rest, params, prefix, batch)
    token = jax.ShapeDtypeStruct(first.shape[:1], jnp.int32)
    following, later = jax.eval_shape(partial(decode_step, bits=BITS, arch=ARCH), params, token, cache)

    assert {x.dtype for x in jax.tree.leaves((visual, hidden, prefix))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((cache.layers, cache.cross))} == {jnp.dtype(jnp.bfloat16)}
    assert scores is not None and {x.dtype for x in (first, following, scores)} == {jnp.dtype(jnp.float32)}
    assert shapes(later) == shapes(cache), "a step returns a cache of the same shapes, so that it compiles once"


@pytest.mark.parametrize("num_layers", [7, 24])
def test_bfloat16_stays_near_float32(num_layers: int) -> None:
    """Logits within a sixth of their standard deviation, 2 % on average; nine of ten greedy tokens the same."""
    arch = testing.tiny_architecture(num_layers)
    params, batch = testing.random_params(arch), testing.random_batch(arch).arrays
    run = testing.quick_jit(partial(logits, arch=arch))
    half, every_slot = in_dtype(params, jnp.bfloat16), np.ones(arch.num_slots, bool)
    exact, rough = (np.asarray(run(p, batch, every_slot))[batch["text_segments"] > 0] for p in (params, half))
    error = np.abs(rough - exact) / exact.std()
    assert 1e-3 < error.mean() < 0.02, "bfloat16 is seen, and no more than it"
    assert error.max() < 1 / 6
    assert (rough.argmax(-1) == exact.argmax(-1)).mean() >= 0.9
