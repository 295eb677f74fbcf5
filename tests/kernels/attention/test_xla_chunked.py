"""What the chunked implementation promises beyond the contract: memory."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from visor_jax.kernels.attention import AttentionMask, base, xla_chunked

QUERIES, KEYS, HEAD_DIM = 96, 1030, 4


def sizes(program) -> Iterator[int]:
    """Elements of every array that a jaxpr makes, those of inner programs included."""
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
