"""Properties of the TPU kernels beyond the contract: skipped blocks, no races, and compiling for TPUs."""

from __future__ import annotations

import functools
import os
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from visor_jax.kernels.attention import AttentionMask, base
from visor_jax.kernels.attention import pallas_tpu as tpu
from visor_jax.kernels.attention import pallas_tpu_kernels as tpu_kernels
from visor_jax.kernels.attention.blocks import NOTHING, block_kinds, pad_mask
from visor_jax.scale.compiler_options import QUICK

TILES = tpu.Tiles(8, 8)
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 3, 24, 4, 2, 8
ORDER = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
# Sample 0 is whole, sample 1 is off, sample 2 packs two and ends in padding.
SEGMENTS = jnp.array([[1] * 24, [1] * 24, [1] * 8 + [2] * 8 + [0] * 8])
MASK = AttentionMask(ORDER, ORDER, SEGMENTS, SEGMENTS, jnp.array([True, False, True]))


def arrays(seed: int = 0, length: int = LENGTH) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(jax.random.normal(key, (BATCH, length, h, HEAD_DIM)) for key, h in zip(keys, heads, strict=True))


def value_and_gradients(function, mask: AttentionMask):
    """A jitted (q, k, v) -> output and gradients, each element of the output weighted differently."""

    def both(q, k, v):
        out, pull = jax.vjp(lambda *x: function(*x, mask=mask), q, k, v)
        return out, *pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return jax.jit(both, compiler_options=QUICK)


def close(found, wanted) -> None:
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


def test_as_many_blocks_are_computed_as_the_mask_has(monkeypatch):
    seen: Counter[str] = Counter()

    def counting(function):
        def counted(*args, **kwargs):
            jax.debug.callback(lambda: seen.update([function.__name__]))
            return function(*args, **kwargs)

        return counted

    for name in ("masked_logits", "recomputed"):
        monkeypatch.setattr(tpu_kernels, name, counting(getattr(tpu_kernels, name)))
    run = functools.partial(tpu.attention, tiles=TILES, interpret=True)
    jax.block_until_ready(value_and_gradients(run, MASK)(*arrays()))
    jax.effects_barrier()
    blocks = int(np.sum(np.asarray(block_kinds(pad_mask(MASK, 8, 8), 8, 8)) != NOTHING))
    assert blocks == 6 + 0 + 2  # the lower triangle of 3 x 3, nothing, two segments of a block each
    assert seen["recomputed"] == 2 * KV_HEADS * blocks, "once for the gradient of q, once for those of k and v"
    assert seen["masked_logits"] == 3 * KV_HEADS * blocks, "and once in the forward pass"


def test_nan_in_a_block_that_is_skipped_reaches_nothing():
    """Keys 16..23 stand in the future of the first 16 queries; the last 8 queries are of another segment."""
    q_segments = jnp.where(ORDER < 16, 1, 2)
    mask = AttentionMask(ORDER, ORDER, q_segments, jnp.ones_like(ORDER))
    q, k, v = arrays()
    planted = [x.at[:, 16:].set(jnp.nan) for x in (q, k, v)]
    clean = [x.at[:, 16:].set(0) for x in (q, k, v)]
    run = value_and_gradients(functools.partial(tpu.attention, tiles=TILES, interpret=True), mask)
    for found, wanted in zip(run(*planted), run(*clean), strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert not np.any(found[:, 16:])


def test_twice_the_same_bits():
    run = value_and_gradients(functools.partial(tpu.attention, tiles=TILES, interpret=True), MASK)
    for first, second in zip(run(*arrays()), run(*arrays()), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_mask_for_each_mapped_sample():
    masks = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 1, axis=0)]), MASK)
    q, k, v = (jnp.stack([x, x + 1]) for x in arrays())
    run = functools.partial(tpu.attention, tiles=TILES, interpret=True)
    mapped = jax.jit(jax.vmap(lambda q, k, v, mask: run(q, k, v, mask=mask)), compiler_options=QUICK)
    found = mapped(q, k, v, masks)
    for i in range(2):
        wanted = base.attention(q[i], k[i], v[i], mask=jax.tree.map(lambda x, i=i: x[i], masks))
        close([found[i]], [wanted])


@pytest.mark.slow
def test_lowers_for_tpus_with_shared_segments():
    q, ids = jnp.zeros((1, 256, 2, 64)), jnp.ones((1, 256), jnp.int32)
    mask = AttentionMask(ids, ids, ids, ids, None, True, ids)
    gradient = jax.jit(jax.grad(lambda q: jnp.sum(tpu.attention(q, q, q, mask=mask))))
    text = gradient.trace(q).lower(lowering_platforms=("tpu",)).as_text()
    assert all(f"attention_{name}" in text for name in ("forward_kernel", "grad_q_kernel", "grad_kv_kernel"))


# On one core the simulated cores wait for each other forever: XLA has one thread per core that the process may use.
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the simulation of two cores needs two cores")
@pytest.mark.parametrize("order", ["eager", pytest.param("on_wait", marks=pytest.mark.slow)])
def test_no_race_on_a_simulated_tpu(order):
    """Simulates memory, transfers and two cores of the hardware, with NaN in uninitialized memory."""
    short = jax.tree.map(lambda x: x[:, :12] if x.ndim == 2 else x, MASK)
    params = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=order, uninitialized_memory="nan", num_cores_or_threads=2
    )
    inputs = arrays(length=12)
    run = functools.partial(tpu.attention, tiles=TILES, interpret=params)
    close(value_and_gradients(run, short)(*inputs), value_and_gradients(base.attention, short)(*inputs))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((jnp.float64, 1, 256, 2, 2, 64), "dtype"),
        ((jnp.float16, 1, 256, 2, 2, 64), "dtype float16"),
        ((jnp.bfloat16, 1, 256, 2, 2, 512), "head_dim 512"),
        ((jnp.bfloat16, 1, 256, 34, 2, 64), "17 query heads"),
        ((jnp.bfloat16, 4096, 8832, 14, 2, 64), "split the batch"),
    ],
)
def test_refuses_with_its_reason(shape, message):
    dtype, batch, length, heads, kv_heads, head_dim = shape

    def refused():
        ids = jnp.zeros((batch, length), jnp.int32)
        q, kv = (jnp.zeros((batch, length, count, head_dim), dtype) for count in (heads, kv_heads))
        return tpu.attention(q, kv, kv, mask=AttentionMask(ids, ids, ids, ids))

    with jax.enable_x64(dtype == jnp.float64), pytest.raises(ValueError, match=f"pallas_tpu cannot serve.*{message}"):
        jax.eval_shape(refused)


@pytest.mark.parametrize(
    ("q_length", "kv_length", "group", "tiles"),
    [(8832, 8832, 7, (128, 512)), (729, 729, 1, (768, 384)), (60, 8832, 7, (128, 512)), (1, 100, 7, (128, 128))],
)
def test_blocks_are_what_the_hardware_takes(q_length, kv_length, group, tiles):
    assert tpu.default_tiles(q_length, kv_length, group) == tpu.Tiles(*tiles)
