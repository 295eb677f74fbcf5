"""Sorting the stream by position gives the same results, and attention visits fewer blocks."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from visor_jax import testing
from visor_jax.kernels import AttentionMask
from visor_jax.kernels.attention.blocks import NOTHING, SOME, block_kinds, pad_mask
from visor_jax.model import stream as module
from visor_jax.model.decoder import forward, run_layers
from visor_jax.model.stream import TokenStream, rearranged, sort_by_position, unsort, with_order

ROWS = (((3, 4), (2, 3)), ((2, 2, 3),))  # a packed row and a row with two pictures


def one_sample(visual: int, before: int, after: int, padding: int = 0) -> TokenStream:
    """[V; padding; T] with text before and after V."""
    positions = np.r_[
        before : before + visual, np.zeros(padding, int), :before, before + visual : before + visual + after
    ]
    segments = np.r_[np.ones(visual, int), np.zeros(padding, int), np.ones(before + after, int)]
    positions, segments = (jnp.asarray(x, jnp.int32)[None] for x in (positions, segments))
    seen = visual + padding
    return TokenStream(
        positions[:, :seen], segments[:, :seen], positions[:, seen:], segments[:, seen:], segments[:, seen:]
    )


def whole(stream: TokenStream) -> tuple[jax.Array, jax.Array]:
    positions = jnp.concatenate([stream.visual_positions, stream.text_positions], axis=1)
    return positions, jnp.concatenate([stream.visual_segments, stream.text_segments], axis=1)


tokens = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=24, max_size=24)


@given(tokens, tokens)
def test_segments_then_positions_and_padding_last(first, second):
    ids = jnp.array([first, second], jnp.int32)
    segments, positions = ids[:, :, 0], ids[:, :, 1]
    halves = positions[:, :15], segments[:, :15], positions[:, 15:], segments[:, 15:], segments[:, 15:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PLAIN_LOGITS", 0)
        order = with_order(TokenStream(*halves)).order
    assert order is not None
    for row, found in zip((first, second), np.asarray(order.tokens), strict=True):
        assert found.tolist() == sorted(range(24), key=lambda i: (row[i][0] == 0, *row[i]))
    np.testing.assert_array_equal(unsort(sort_by_position(ids, order), order), ids)


def test_a_short_stream_stays_as_it_came():
    assert with_order(one_sample(500, 6, 6)).order is None
    assert with_order(one_sample(501, 6, 6)).order is not None


@pytest.mark.parametrize(
    ("budget", "both_ways"), [([True], False), ([[True], [False]], True)], ids=["all", "per sample, both ways"]
)
def test_the_decoder_gives_the_same_with_gradients(budget, both_ways, monkeypatch):
    arch = testing.tiny_architecture(3, bidirectional_vision=both_ways)
    params, *inputs = testing.random_params(arch), *testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))
    weights = [np.random.default_rng(0).standard_normal(x.shape, np.float32) for x in inputs[:2]]
    on = np.array(budget)

    def run() -> Any:
        def loss(params, visual, text, stream):
            out = forward(params, visual, text, stream, on, arch, remat="full")
            return sum(jnp.vdot(x, y) for x, y in zip(out, weights, strict=True)), out

        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        return testing.quick_jit(gradient)({"blocks": params["blocks"]}, *inputs)

    expected = run()
    monkeypatch.setattr(module, "PLAIN_LOGITS", 0)
    for x, y in zip(jax.tree.leaves(run()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(np.max(np.abs(y)))), rtol=0)


def test_what_a_cache_keeps_is_as_it_came(monkeypatch):
    arch = testing.tiny_architecture(3)
    inputs = testing.random_params(arch), *testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))

    def kept() -> Any:
        def run(*inputs):
            found: list[Any] = []
            return run_layers(*inputs, (True,), arch, record=lambda _, keys_values: found.append(keys_values)), found

        return testing.quick_jit(run)(*inputs)

    expected = kept()
    monkeypatch.setattr(module, "PLAIN_LOGITS", 0)
    assert "sort[" in str(jax.make_jaxpr(lambda *x: run_layers(*x, (True,), arch))(*inputs))
    for x, y in zip(jax.tree.leaves(kept()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_fewer_blocks_are_visited():
    """Text from both sides of V makes every block of V's queries visit its own block; in order none does."""
    stream = one_sample(visual=1000, before=6, after=18)

    def visited(positions, segments) -> tuple[int, int]:
        kinds = np.asarray(
            block_kinds(pad_mask(AttentionMask(positions, positions, segments, segments), 64, 64), 64, 64)
        )
        return int(np.sum(kinds != NOTHING)), int(np.sum(kinds == SOME))

    order = with_order(stream).order
    assert order is not None
    assert visited(*(sort_by_position(x, order) for x in whole(stream))) == (16 * 17 // 2, 16), (
        "the lower triangle alone"
    )
    assert visited(*whole(stream))[0] == 16 * 17 // 2 + 15


def test_the_gradient_is_a_gather():
    order = with_order(one_sample(600, 6, 6)).order
    assert order is not None
    x = jnp.arange(612.0 * 2).reshape(1, 612, 2)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.vdot(rearranged(x, *order), x)))(x)
    assert "gather" in str(jaxpr) and "scatter" not in str(jaxpr)
