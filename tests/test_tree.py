"""Paths of parameter trees: one spelling for checkpoints, shardings, optimizers and imports."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.model.visor import abstract_params
from visor_jax.testing import tiny_architecture
from visor_jax.tree import flatten, path_name, unflatten

NAMES = st.text("abc_0", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@given(TREES)
def test_unflatten_undoes_flatten(tree: dict) -> None:
    flat = flatten(tree)
    assert unflatten(flat) == tree
    assert list(flat.values()) == jax.tree.leaves(tree)


def test_paths_of_a_model() -> None:
    params = abstract_params(tiny_architecture(3))
    assert {"blocks/self/mlp/up_proj/kernel", "embed_tokens/embedding"} <= flatten(params).keys()
    assert jax.tree.structure(unflatten(flatten(params))) == jax.tree.structure(params)


class Moments(NamedTuple):
    mean: dict[str, int]
    count: int


def test_positions_and_fields_are_names() -> None:
    tree = {"opt": (Moments({"a/b": 1}, 2), [3])}
    assert flatten(tree) == {"opt/0/mean/a/b": 1, "opt/0/count": 2, "opt/1/0": 3}
    assert [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)] == list(flatten(tree))


def test_two_leaves_with_one_path_are_refused() -> None:
    with pytest.raises(ValueError, match="same path"):
        flatten({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)})
