"""Parameter trees by path: nested dicts of arrays, each leaf addressed as "blocks/self/mlp/up_proj/kernel"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.tree_util import KeyPath


def flatten(tree: Any) -> dict[str, Any]:
    """Maps the path of every leaf to the leaf, in the order of `jax.tree.leaves`.

    Args:
      tree: nested dicts of leaves; tuples, lists and named tuples in it give their positions and field names.

    Raises:
      ValueError: two leaves have the same path.
    """
    leaves = jax.tree.leaves_with_path(tree)
    flat = {path_name(path): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of a mapping from paths to leaves: the inverse of `flatten` for nested dicts."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def path_name(path: KeyPath) -> str:
    """The path of a leaf, "blocks/self/mlp/up_proj/kernel", from its key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
