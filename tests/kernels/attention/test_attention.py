"""Every implementation of attention equals a float64 definition, for one list of cases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax.kernels import AttentionMask, attention
from visor_jax.kernels.attention import dot_product_attention as library
from visor_jax.kernels.attention import pallas_tpu as tpu
from visor_jax.kernels.attention import pallas_triton as gpu
from visor_jax.kernels.attention import xla_chunked, xla_decode
from visor_jax.scale.compiler_options import QUICK

BATCH, HEADS, HEAD_DIM = 3, 4, 8
Arrays = tuple[np.ndarray, ...]


def in_the_place_of_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: AttentionMask) -> jax.Array:
    return library.with_lengths(functools.partial(library.fused, implementation="xla"), q, k, v, mask)


# Every implementation that can run here: kernels interpreted, in small blocks that divide no length.
RUNS: dict[str, Callable[..., jax.Array]] = {
    "xla": functools.partial(attention, implementation="xla"),
    "xla_chunked": functools.partial(attention, implementation="xla_chunked"),
    "xla_decode": functools.partial(attention, implementation="xla_decode"),
    "pallas_tpu": functools.partial(tpu.attention, tiles=tpu.Tiles(8, 8), interpret=True),
    "pallas_gpu": functools.partial(gpu.attention, tiles=gpu.Tiles(8, 8, 4, 8), interpret=True),
    "pallas_gpu, keys split": functools.partial(gpu.attention, tiles=gpu.Tiles(128, 4, 4, 8, split=8), interpret=True),
    "cudnn": in_the_place_of_cudnn,
}
# The others run every case at one shape, which needs fewer programs.
OWN_SHAPES = ("xla", "xla_chunked", "xla_decode", "cudnn")
ONE_SHAPE = (19, 21)


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    grad: np.ndarray  # cotangent of the output


@pytest.fixture(params=list(RUNS))
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes chunks small, so that short cases have several, the last one partly filled."""
    monkeypatch.setattr(xla_chunked, "CHUNK", 8)
    monkeypatch.setattr(xla_chunked, "ROWS", 5 * HEADS)
    monkeypatch.setattr(xla_decode, "CHUNK", 8)
    monkeypatch.setattr(xla_decode, "MAX_QUERIES", 19)


# --- the definition, in float64 ---------------------------------------------------------------------------------------


def may_see(mask: AttentionMask, b: int, i: int, j: int) -> bool:
    """Returns the mask by its definition in DESIGN."""
    active = mask.active is None or bool(mask.active[b])
    shared = mask.q_segments if mask.q_shared_segments is None else mask.q_shared_segments
    same = mask.kv_segments[b, j] in (mask.q_segments[b, i], shared[b, i]) and mask.kv_segments[b, j] != 0
    earlier = not mask.causal or mask.kv_positions[b, j] <= mask.q_positions[b, i]
    return bool(active and same and earlier)


def written_out(mask: AttentionMask) -> np.ndarray:
    (batch, q_length), kv_length = mask.q_segments.shape, mask.kv_segments.shape[1]
    mask = jax.tree.map(np.asarray, mask)  # reading single numbers from device arrays is slow
    pairs = np.ndindex(batch, q_length, kv_length)
    return np.array([may_see(mask, *pair) for pair in pairs], bool).reshape(batch, q_length, kv_length)


def expected(inputs: Inputs, mask: AttentionMask) -> Arrays:
    """Returns output and gradients (dq, dk, dv) in float64; inactive rows are 0 in each."""
    q, k, v, grad = inputs
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    allowed = written_out(mask)
    query_valid, key_used = np.any(allowed, axis=2)[..., None, None], np.any(allowed, axis=1)[..., None, None]
    q, grad = (np.where(query_valid, x, 0).astype(np.float64) for x in (q, grad))
    k, v = (np.repeat(np.where(key_used, x, 0).astype(np.float64), group, axis=2) for x in (k, v))
    logits = np.where(allowed[:, None], np.einsum("bihd,bjhd->bhij", q, k) * scale, -1e300)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-1e300)) * allowed[:, None]
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    dweights = np.einsum("bihd,bjhd->bhij", grad, v)
    dlogits = weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True)) * scale
    out, dq = np.einsum("bhij,bjhd->bihd", weights, v), np.einsum("bhij,bjhd->bihd", dlogits, k)
    dk, dv = np.einsum("bhij,bihd->bjhd", dlogits, q), np.einsum("bhij,bihd->bjhd", weights, grad)
    return out, dq, *(x.reshape(*inputs.k.shape[:3], group, q.shape[3]).sum(axis=3) for x in (dk, dv))


def output_and_gradients(inputs: Inputs, mask: AttentionMask, implementation: str, chunk: int):
    del chunk  # part of the compilation cache's key only: the tests change xla_chunked.CHUNK

    def forward(q, k, v):
        return RUNS[implementation](q, k, v, mask=mask)

    out, pull = jax.vjp(forward, inputs.q, inputs.k, inputs.v)
    return out, *pull(inputs.grad)


STATIC = ("implementation", "chunk")
COMPILED = jax.jit(output_and_gradients, static_argnames=STATIC, compiler_options=QUICK)


def compute(inputs: Inputs, mask: AttentionMask, implementation: str) -> tuple[jax.Array, ...]:
    """Returns output and gradients of the implementation."""
    if implementation in OWN_SHAPES:
        return COMPILED(inputs, mask, implementation, xla_chunked.CHUNK)
    q_length, kv_length = mask.q_segments.shape[1], mask.kv_segments.shape[1]
    found = COMPILED(*at_one_shape(inputs, mask), implementation, xla_chunked.CHUNK)
    return tuple(jnp.asarray(x)[:, :n] for x, n in zip(found, (q_length, q_length, kv_length, kv_length), strict=True))


def at_one_shape(inputs: Inputs, mask: AttentionMask) -> tuple[Inputs, AttentionMask]:
    """Pads a case to at least `ONE_SHAPE` and makes `active` an array: the same results with fewer programs."""

    def padded(x, length: int) -> jax.Array:
        return jnp.pad(x, [(0, max(length - x.shape[1], 0) * (axis == 1)) for axis in range(x.ndim)])

    q_length, kv_length = ONE_SHAPE
    active = jnp.ones(mask.q_segments.shape[0], bool) if mask.active is None else mask.active
    mask = dataclasses.replace(
        mask.map_queries(lambda x: padded(x, q_length)),
        kv_positions=padded(mask.kv_positions, kv_length),
        kv_segments=padded(mask.kv_segments, kv_length),
        active=active,
    )
    q, k, v, grad = inputs
    arrays = padded(q, q_length), padded(k, kv_length), padded(v, kv_length), padded(grad, q_length)
    return Inputs(*map(np.asarray, arrays)), mask


def computed(inputs: Inputs, mask: AttentionMask, implementation: str) -> Arrays:
    """Returns output and gradients of an implementation, in the form of `expected`."""
    return tuple(np.asarray(x, np.float64) for x in compute(inputs, mask, implementation))


def agree(found: Arrays, wanted: Arrays, tolerance: float = 2e-6) -> None:
    for name, x, y in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


# --- cases ------------------------------------------------------------------------------------------------------------


def rows(values: Iterable[int]) -> jax.Array:
    """Repeats a row for every sample."""
    return jnp.tile(jnp.array(list(values), jnp.int32), (BATCH, 1))


def self_mask(positions: Iterable[int], segments: Iterable[int]) -> AttentionMask:
    p, s = rows(positions), rows(segments)
    return AttentionMask(p, p, s, s)


def cross_mask(q_segments: Iterable[int], kv_segments: Iterable[int]) -> AttentionMask:
    q, kv = rows(q_segments), rows(kv_segments)
    return AttentionMask(jnp.zeros_like(q), jnp.zeros_like(kv), q, kv, causal=False)


def lengths(*counts: int) -> jax.Array:
    """Segments of samples of `counts` tokens in 19 places."""
    return (jnp.arange(19)[None] < jnp.array(counts)[:, None]).astype(jnp.int32)


# Shapes repeat on purpose: each new one is compiled again for every implementation.
ONE_SEGMENT = self_mask(range(19), [1] * 19)
# [V; T]: ten visual tokens at positions 3..12 come first; three text tokens stand before them and six after.
STREAM = self_mask([*range(3, 13), 0, 1, 2, *range(13, 19)], [1] * 19)
PACKED = self_mask([*range(5), *range(8), *range(6)], [1] * 5 + [2] * 8 + [3] * 6)
SOME_OFF = dataclasses.replace(STREAM, active=jnp.array([True, False, True]))
# Two samples in a row: 7 (shared) and turns 8 and 9; 10 (shared) and turn 11; then padding.
TURNS = [7] * 5 + [8] * 3 + [9] * 4 + [10] * 2 + [11] * 3 + [0] * 2
SHARED = [7] * 12 + [10] * 5 + [0] * 2
WITH_TURNS = dataclasses.replace(
    self_mask([*range(5), *range(5, 8), *range(5, 9), *range(5), 0, 0], TURNS), q_shared_segments=rows(SHARED)
)

CASES: dict[str, tuple[AttentionMask, int]] = {  # the mask and the number of KV heads
    "causal": (ONE_SEGMENT, 2),
    "one head of keys": (ONE_SEGMENT, 1),
    "as many heads of keys": (ONE_SEGMENT, HEADS),
    "text before and after the visual tokens": (STREAM, 2),
    "equal positions": (self_mask([0, 1, 1, 1, 2, 2, 5, 5, 5] + [7] * 10, [1] * 19), 2),
    "padding at the end": (self_mask(range(19), [1] * 7 + [0] * 12), 2),
    "padding in the middle": (self_mask(range(19), [1] * 4 + [0] * 10 + [1] * 5), 2),
    "packed samples": (PACKED, 2),
    "segments interleaved": (self_mask(range(19), [1, 2, 0] * 6 + [1]), 2),
    "samples of other lengths": (
        dataclasses.replace(ONE_SEGMENT, q_segments=lengths(3, 0, 19), kv_segments=lengths(3, 9, 19)),
        2,
    ),
    "both ways": (dataclasses.replace(ONE_SEGMENT, causal=False), 2),
    "packed both ways": (dataclasses.replace(PACKED, causal=False), 2),
    "one sample off": (SOME_OFF, 2),
    "all samples off": (dataclasses.replace(STREAM, active=jnp.zeros(BATCH, bool)), 2),
    "text over visual keys": (cross_mask([1] * 5 + [2] * 3 + [0], [1] * 11 + [2] * 6 + [0] * 4), 2),
    "queries without a partner": (cross_mask([1, 3, 3, 0, 2] + [1] * 4, [1] * 8 + [2] * 13), 2),
    "nothing visible at all": (cross_mask([1] * 9, [0] * 21), 2),
    "every key in the future": (dataclasses.replace(ONE_SEGMENT, kv_positions=rows(range(19, 38))), 2),
    "one query against a cache": (AttentionMask(rows([9]), rows(range(16)), rows([1]), rows([1] * 10 + [0] * 6)), 2),
    "more queries than keys": (cross_mask([1] * 15, [1]), 2),
    "no key": (cross_mask([1] * 4, []), 2),
    "independent turns": (WITH_TURNS, 2),
    "independent turns, both ways": (dataclasses.replace(WITH_TURNS, causal=False), 2),
    "independent turns, some samples off": (dataclasses.replace(WITH_TURNS, active=SOME_OFF.active), 2),
    "only a shared segment": (dataclasses.replace(WITH_TURNS, q_segments=rows([0] * 19)), 2),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[AttentionMask, Inputs]:
    mask, kv_heads = CASES[request.param]
    return mask, random_inputs(mask, kv_heads)


def random_inputs(mask: AttentionMask, kv_heads: int = 2, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    q = (*mask.q_segments.shape, HEADS, HEAD_DIM)
    kv = (*mask.kv_segments.shape, kv_heads, HEAD_DIM)
    return Inputs(*(rng.normal(size=shape).astype(np.float32) for shape in (q, kv, kv, q)))


# --- properties of every implementation -------------------------------------------------------------------------------


def test_output_and_gradients(case, implementation):
    mask, inputs = case
    agree(computed(inputs, mask, implementation), expected(inputs, mask))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (mask, _) in CASES.items()
        if not mask.causal and mask.kv_segments.size and mask.q_shared_segments is None
    ],
)
def test_splash(name, monkeypatch):
    """Cases that its static masks can express: not causal, with at least one key."""
    monkeypatch.setitem(RUNS, "splash", functools.partial(library.splash, interpret=True))
    mask, kv_heads = CASES[name]
    check_what_takes_no_part(mask, random_inputs(mask, kv_heads), "splash", tolerance=1e-5)


def test_splash_refuses_shared_segments():
    q, k, v, _ = random_inputs(WITH_TURNS)
    with pytest.raises(ValueError, match="splash cannot serve: the mask has shared segments"):
        library.splash(q, k, v, mask=dataclasses.replace(WITH_TURNS, causal=False))


def test_splash_in_half_precision(monkeypatch):
    """It takes queries that are scaled, and so rounded, already; keys of few values show that this happens once."""
    monkeypatch.setitem(RUNS, "splash", functools.partial(library.splash, interpret=True))
    mask = dataclasses.replace(STREAM, causal=False)
    low = Inputs(*(np.asarray(x, jnp.bfloat16) for x in random_inputs(mask)))
    exact = expected(Inputs(*(np.asarray(x, np.float32) for x in low)), mask)
    agree(computed(low, mask, "splash"), exact, tolerance=2 * float(jnp.finfo(jnp.bfloat16).eps))


def test_tokamax(monkeypatch):
    pytest.importorskip("tokamax", reason="pip install tokamax")
    monkeypatch.setitem(RUNS, "tokamax", library.tokamax)
    for mask, kv_heads in CASES.values():
        check_what_takes_no_part(mask, random_inputs(mask, kv_heads), "tokamax", tolerance=1e-5)


def test_what_takes_no_part_may_hold_nan_and_is_exactly_zero(case, implementation):
    check_what_takes_no_part(*case, implementation)


def check_what_takes_no_part(mask: AttentionMask, inputs: Inputs, implementation: str, tolerance: float = 2e-6) -> None:
    allowed = written_out(mask)
    no_keys, key_unused = ~allowed.any(axis=2), ~allowed.any(axis=1)
    for x, idle in zip(inputs, (no_keys, key_unused, key_unused, no_keys), strict=True):
        x[idle] = np.nan
    found = computed(inputs, mask, implementation)
    agree(found, expected(inputs, mask), tolerance)
    for x, idle in zip(found, (no_keys, no_keys, key_unused, key_unused), strict=True):
        assert not np.any(x[idle])


def test_nan_that_is_seen_is_not_hidden(implementation):
    inputs = random_inputs(ONE_SEGMENT)
    inputs.k[:, 4] = np.nan
    assert np.isnan(computed(inputs, ONE_SEGMENT, implementation)[0][:, 4:]).all()


def test_large_logits_stay_finite(implementation):
    inputs = random_inputs(STREAM)
    inputs = inputs._replace(q=inputs.q * 100, k=inputs.k * 100)
    found = computed(inputs, STREAM, implementation)
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found[0], expected(inputs, STREAM)[0], atol=2e-2)


def test_half_precision_is_rounded_once(implementation):
    """Products and softmax in float32: the output is off by the rounding of the output alone."""
    inputs = random_inputs(STREAM)
    low = Inputs(*(np.asarray(x, jnp.bfloat16) for x in inputs))
    exact = expected(Inputs(*(np.asarray(x, np.float32) for x in low)), STREAM)
    assert all(x.dtype == jnp.bfloat16 for x in compute(low, STREAM, implementation))
    agree(computed(low, STREAM, implementation), exact, tolerance=float(jnp.finfo(jnp.bfloat16).eps))


def test_numpy_arrays_without_jit(implementation):
    """Without tracers and with numpy arrays, as in interactive use."""
    mask = jax.tree.map(np.asarray, dataclasses.replace(STREAM, active=np.array([True, False, True])))
    q, k, v, _ = inputs = random_inputs(mask)
    np.testing.assert_allclose(
        RUNS[implementation](q, k, v, mask=mask), expected(inputs, mask)[0], rtol=2e-6, atol=2e-6
    )


def test_order_of_keys_does_not_matter(implementation):
    inputs = random_inputs(STREAM)
    order = np.random.default_rng(1).permutation(19)
    mixed = dataclasses.replace(
        STREAM, kv_positions=STREAM.kv_positions[:, order], kv_segments=STREAM.kv_segments[:, order]
    )
    out, dq, dk, dv = computed(inputs, STREAM, implementation)
    shuffled = inputs._replace(k=inputs.k[:, order], v=inputs.v[:, order])
    agree(computed(shuffled, mixed, implementation), (out, dq, dk[:, order], dv[:, order]))


def test_twice_the_same_bits(implementation):
    inputs = random_inputs(SOME_OFF)
    first, second = (compute(inputs, SOME_OFF, implementation) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_causality_by_gradients(implementation):
    """The last visual token, at position 12, depends on the text before it and on nothing after it."""
    inputs = random_inputs(STREAM)
    inputs.grad[:, np.arange(19) != 9] = 0
    _, _, dk, dv = computed(inputs, STREAM, implementation)
    later = np.asarray(STREAM.kv_positions[0] > 12)
    assert not np.any(dk[:, later]) and not np.any(dv[:, later])
    assert np.all(np.abs(dv[:, ~later]).sum(axis=(0, 2, 3)) > 0)


def test_vmap_and_remat(implementation):
    samples = [random_inputs(STREAM, seed=seed) for seed in (1, 2)]

    def loss(q, k, v, grad):
        return jnp.sum(RUNS[implementation](q, k, v, mask=STREAM) * grad)

    gradients = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))), compiler_options=QUICK)
    mapped = gradients(*(np.stack(x) for x in zip(*samples, strict=True)))
    for i, inputs in enumerate(samples):
        single = computed(inputs, STREAM, implementation)
        agree((single[0], *(np.asarray(x[i]) for x in mapped)), single)


def test_default_chunk_on_a_length_that_does_not_divide(implementation, monkeypatch):
    monkeypatch.undo()
    assert xla_chunked.CHUNK == 1024
    positions = np.random.default_rng(0).permutation(1200).tolist()
    whole = self_mask(positions, [1] * 900 + [2] * 250 + [0] * 50)
    mask = dataclasses.replace(whole, q_positions=whole.q_positions[:, ::90], q_segments=whole.q_segments[:, ::90])
    inputs = random_inputs(mask)
    agree(computed(inputs, mask, implementation), expected(inputs, mask))


def masks(q_length: int = 19, kv_length: int = 19) -> st.SearchStrategy[AttentionMask]:
    """Random segments, positions and active samples, ties and blind rows among them."""

    def integers(length: int, most: int) -> st.SearchStrategy[np.ndarray]:
        elements = st.integers(0, most)
        return numpy_strategies.arrays(np.int32, (BATCH, length), elements=elements, fill=st.nothing())

    return st.builds(
        AttentionMask,
        q_positions=integers(q_length, 9),
        kv_positions=integers(kv_length, 9),
        q_segments=integers(q_length, 2),
        kv_segments=integers(kv_length, 2),
        active=numpy_strategies.arrays(bool, (BATCH,)),
        causal=st.booleans(),
        q_shared_segments=st.none() | integers(q_length, 2),
    )


@hypothesis.settings(
    max_examples=30, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(mask=masks(), seed=st.integers(0, 99))
def test_random_masks(implementation, mask, seed):
    inputs = random_inputs(mask, seed=seed)
    agree(computed(inputs, mask, implementation), expected(inputs, mask))


# --- the mask ---------------------------------------------------------------------------------------------------------


def test_as_array_is_the_definition(case):
    mask, _ = case
    found = jax.jit(AttentionMask.as_array)(mask)
    assert found.dtype == jnp.bool_
    np.testing.assert_array_equal(found, written_out(mask))


def test_mask_is_a_pytree_with_causal_static():
    leaves, tree = jax.tree.flatten(SOME_OFF)
    assert len(leaves) == 5
    assert len(jax.tree.leaves(STREAM)) == 4
    assert tree != jax.tree.structure(dataclasses.replace(SOME_OFF, causal=False))


# --- refusals ---------------------------------------------------------------------------------------------------------

Q, K = jnp.zeros((3, 19, 4, 8)), jnp.zeros((3, 19, 2, 8))
REFUSED = {
    "q: a list": ("q must be an array", [[1.0]], K, K, STREAM),
    "q: head_dim 0": ("q must have a head_dim", Q[..., :0], K[..., :0], K[..., :0], STREAM),
    "mask: an array": ("mask must be an AttentionMask", Q, K, K, np.ones((3, 19, 19), bool)),
    "mask: none": ("mask must be an AttentionMask", Q, K, K, None),
    "q_positions: a list": ("mask.q_positions must be an array", Q, K, K, AttentionMask(*[[[1]]] * 4)),
    "q_positions: wide": (
        "mask.q_positions must be int32 or narrower",
        Q,
        K,
        K,
        dataclasses.replace(STREAM, q_positions=np.zeros((3, 19), np.int64)),
    ),
    "q: axes": ("q must", Q[0], K, K, STREAM),
    "k: axes": ("k must", Q, K[..., 0], K, STREAM),
    "q: integers": ("q must", Q.astype(int), K, K, STREAM),
    "k: another dtype": ("k must", Q, K.astype(jnp.bfloat16), K, STREAM),
    "v: another dtype": ("v must", Q, K, K.astype(jnp.bfloat16), STREAM),
    "k: batch": ("k must", Q, K[:2], K[:2], STREAM),
    "k: head_dim": ("k must", Q, K[..., :4], K[..., :4], STREAM),
    "v: length": ("v must", Q, K, K[:, 1:], STREAM),
    "q: heads that do not group": ("q has 3 heads", Q[:, :, :3], K, K, STREAM),
    "k: no heads": ("q has 4 heads", Q, K[:, :, :0], K[:, :, :0], STREAM),
    "q_positions: length": ("mask.q_positions", Q[:, 1:], K, K, STREAM),
    "kv_positions: length": ("mask.kv_positions", Q, K[:, 1:], K[:, 1:], STREAM),
    "q_segments: dtype": ("mask.q_segments", Q, K, K, dataclasses.replace(STREAM, q_segments=jnp.zeros((3, 19)))),
    "kv_segments: batch": ("mask.kv_segments", Q, K, K, dataclasses.replace(STREAM, kv_segments=rows([1] * 19)[:2])),
    "q: float8": ("q must be floating point .float16, bfloat16", Q.astype(jnp.float8_e4m3fn), K, K, STREAM),
    "q_shared_segments: length": (
        "mask.q_shared_segments must have shape",
        Q,
        K,
        K,
        dataclasses.replace(WITH_TURNS, q_shared_segments=rows([1] * 18)),
    ),
    "active: a list": ("mask.active must be an array", Q, K, K, dataclasses.replace(STREAM, active=[True] * 3)),
    "active: dtype": ("mask.active", Q, K, K, dataclasses.replace(STREAM, active=jnp.ones(3))),
    "active: batch": ("mask.active", Q, K, K, dataclasses.replace(STREAM, active=jnp.ones(2, bool))),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses_by_name(name, implementation):
    message, q, k, v, mask = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        RUNS[implementation](q, k, v, mask=mask)
