"""A property of the chunked implementation beyond the contract: its memory."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from visor_jax.kernels.attention import AttentionMask, base, xla_chunked

QUERIES, KEYS, HEAD_DIM = 96, 1030, 4


def sizes(program) -> Iterator[int]:
    """Yields the sizes of all arrays in a jaxpr and its inner programs."""
    for equation in program.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(parameter, "eqns"):
                yield from sizes(parameter)


@pytest.mark.parametrize("implementation", [base.attention, xla_chunked.attention])
def test_no_array_of_queries_by_keys(implementation, monkeypatch):
    monkeypatch.setattr(xla_chunked, "CHUNK", 32)
    q_ids, kv_ids = jnp.ones((1, QUERIES), jnp.int32), jnp.ones((1, KEYS), jnp.int32)
    mask = AttentionMask(q_ids, kv_ids, q_ids, kv_ids)

    def loss(q, k, v):
        return jnp.sum(implementation(q, k, v, mask=mask) ** 2)

    q, kv = jnp.ones((1, QUERIES, 1, HEAD_DIM)), jnp.ones((1, KEYS, 1, HEAD_DIM))
    largest = max(sizes(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(q, kv, kv).jaxpr))
    if implementation is base.attention:
        assert largest >= QUERIES * KEYS  # the reference keeps one, so the count can see it
    else:
        assert largest <= 2 * max(KEYS * HEAD_DIM, QUERIES * 32)


@pytest.mark.parametrize("gradients", [False, True])
def test_only_blocks_in_which_something_is_seen_are_computed(monkeypatch, gradients):
    """Counted while it runs: a sample that is off, padding, other segments and what comes later cost no step."""
    monkeypatch.setattr(xla_chunked, "CHUNK", 8)
    monkeypatch.setattr(xla_chunked, "ROWS", 8)  # of one head: blocks of 8 queries
    positions = jnp.tile(jnp.arange(40), (3, 1))
    segments = jnp.stack(
        [jnp.ones(40, int), jnp.ones(40, int), jnp.where(jnp.arange(40) < 24, 1 + positions[2] // 8, 0)]
    )
    mask = AttentionMask(positions, positions, segments, segments, jnp.array([True, False, True]))
    blocks = mask.as_array().reshape(3, 5, 8, 5, 8).any(axis=(2, 4))
    assert blocks.sum(axis=(1, 2)).tolist() == [15, 0, 3]
    steps = []

    def counted(logits):
        def run(rows, keys, allowed):
            jax.debug.callback(lambda: steps.append(allowed is None))
            return logits(rows, keys, allowed)

        return run

    for name in ("_logits", "_transposed_logits"):  # of the forward and the backward pass
        monkeypatch.setattr(xla_chunked, name, counted(getattr(xla_chunked, name)))
    q = jnp.ones((3, 40, 1, HEAD_DIM))
    run = (
        jax.grad(lambda q: jnp.sum(xla_chunked.attention(q, q, q, mask=mask)))
        if gradients
        else (lambda q: xla_chunked.attention(q, q, q, mask=mask))
    )
    jax.block_until_ready(jax.jit(run)(q))
    jax.effects_barrier()
    assert len(steps) == (2 if gradients else 1) * blocks.sum()
    assert sum(steps) == (2 if gradients else 1) * 10, "below the diagonal no mask is made"
