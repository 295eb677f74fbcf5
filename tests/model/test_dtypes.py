"""In bfloat16 the model computes in bfloat16: activations and caches, with logits and scores in float32."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from visor_jax import testing
from visor_jax.model.cache import decode_step, prefill_prefix, prefill_rest
from visor_jax.model.decoder import decode
from visor_jax.model.visor import abstract_params, encode, hidden_states

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
    assert shapes(later) == shapes(cache), "a step gives back a cache of the same shapes, so that it compiles once"


def test_bfloat16_stays_near_float32() -> None:
    params, arch = testing.random_params(ARCH), ARCH
    visual, text, stream = testing.decoder_inputs(arch, testing.random_batch(arch))
    run = testing.quick_jit(lambda p, v, t: decode(p, v, t, stream, BITS, arch)[1])
    exact = np.asarray(run(params, visual, text))
    half = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), x) for x in (params, visual, text)]
    rough = run(*half)
    assert rough.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rough, np.float32) - exact).mean() < 0.03 * np.abs(exact).max()
