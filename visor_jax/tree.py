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
      tree: nested dicts of leaves; tuples and lists contribute positions to paths, named tuples field names.

    Raises:
      ValueError: two leaves have the same path.
    """
    leaves = jax.tree.leaves_with_path(tree)
    flat = {path_name(path): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Builds nested dicts from a mapping of paths to leaves; inverts `flatten` for nested dicts."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def path_name(path: KeyPath) -> str:
    """Converts a key path to a leaf's path, "blocks/self/mlp/up_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
