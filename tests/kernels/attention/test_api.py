"""The choice of an implementation, and how attention is imported."""

from __future__ import annotations

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import visor_jax.kernels
from visor_jax.kernels.attention import api, base

ONES = jnp.ones((1, 3), jnp.int32)
MASK = visor_jax.kernels.AttentionMask(ONES, ONES, ONES, ONES)
Q = jnp.ones((1, 3, 2, 4))


def test_the_function_and_the_folder_of_the_same_name():
    assert jax.eval_shape(lambda: visor_jax.kernels.attention(Q, Q, Q, mask=MASK)).shape == Q.shape
    assert isinstance(base, types.ModuleType) and base.attention is not visor_jax.kernels.attention
    from visor_jax.kernels.attention import AttentionMask, attention

    assert attention is visor_jax.kernels.attention
    assert AttentionMask is visor_jax.kernels.AttentionMask


@pytest.mark.parametrize(
    ("q_length", "kv_length", "name"),
    [(150, 150, "xla"), (1, 8832, "xla"), (729, 729, "xla_chunked"), (80, 7290, "xla_chunked")],
)
def test_automatic_choice(q_length, kv_length, name):
    assert api.choose(q_length, kv_length) == name


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the implementations that run, in order."""
    names: list[str] = []
    for name in api.IMPLEMENTATIONS:
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, lambda q, *_, mask, name=name: names.append(name) or q)
    return names


def test_none_takes_the_table_and_a_name_forces(called):
    api.attention(Q, Q, Q, mask=MASK)
    api.attention(Q, Q, Q, mask=MASK, implementation="xla_chunked")
    assert called == ["xla", "xla_chunked"]


def test_an_unknown_implementation_is_refused_with_the_list(called):
    force: Callable[..., jax.Array] = api.attention
    with pytest.raises(ValueError, match="'flash' does not exist; known are xla, xla_chunked"):
        force(Q, Q, Q, mask=MASK, implementation="flash")
    assert called == []
