"""The sharding table: parameter name -> logical axes -> mesh axes, in one place.

A parameter's path ("blocks/self/mlp/up_proj/kernel") ends in a module name and a leaf name; `LOGICAL_AXES` gives the
logical axes of its last dimensions, and leading (stacked) dimensions are never sharded. `RULES` maps logical axes to
mesh axes. A dimension that is not divisible by its mesh axis is not sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from visor_jax.architecture import FSDP, REPLICA, TENSOR
from visor_jax.tree import path_name

RULES: dict[str, str | None] = {
    "embed": FSDP,  # hidden size of tower, connector and decoder
    "heads": TENSOR,
    "mlp": TENSOR,
    "vocab": TENSOR,
    "whole": None,
}

LOGICAL_AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("q_proj", "kernel"): ("embed", "heads"),
    ("k_proj", "kernel"): ("embed", "heads"),
    ("v_proj", "kernel"): ("embed", "heads"),
    ("q_proj", "bias"): ("heads",),
    ("k_proj", "bias"): ("heads",),
    ("v_proj", "bias"): ("heads",),
    ("o_proj", "kernel"): ("heads", "embed"),
    ("out_proj", "kernel"): ("heads", "embed"),
    ("out_proj", "bias"): ("whole",),
    ("gate_proj", "kernel"): ("embed", "mlp"),
    ("up_proj", "kernel"): ("embed", "mlp"),
    ("down_proj", "kernel"): ("mlp", "embed"),
    ("fc1", "kernel"): ("embed", "mlp"),
    ("fc1", "bias"): ("mlp",),
    ("fc2", "kernel"): ("mlp", "embed"),
    ("fc2", "bias"): ("whole",),
    ("linear_1", "kernel"): ("embed", "mlp"),
    ("linear_1", "bias"): ("mlp",),
    ("linear_2", "kernel"): ("mlp", "embed"),
    ("linear_2", "bias"): ("whole",),
    ("patch_embedding", "kernel"): ("whole", "embed"),
    ("patch_embedding", "bias"): ("whole",),
    ("position_embedding", "embedding"): ("whole", "embed"),
    ("embed_tokens", "embedding"): ("vocab", "embed"),
    ("lm_head", "kernel"): ("embed", "vocab"),
    ("conditional_position", "kernel"): ("whole", "embed"),
    ("*", "scale"): ("whole",),
    ("*norm*", "bias"): ("whole",),
    ("*", "gate"): (),
    ("*", "token"): ("whole",),
    ("*", "image_newline"): ("whole",),
}


def logical_axes(path: str) -> tuple[str, ...]:
    """Returns the logical axes of the last dimensions of a parameter; KeyError for a name that is not in the table."""
    *_, parent, leaf = ("", *path.split("/"))
    for key in ((parent, leaf), ("*norm*", leaf) if "norm" in parent else None, ("*", leaf)):
        if key in LOGICAL_AXES:
            return LOGICAL_AXES[key]
    raise KeyError(f"no logical axes for parameter {path!r}: add ({parent!r}, {leaf!r}) to visor_jax/scale/sharding.py")


def partition_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Mapping[str, str | None] = RULES
) -> PartitionSpec:
    """Returns the mesh axis of each dimension of one parameter.

    Raises:
      ValueError: two dimensions of the parameter map to the same mesh axis.
    """
    axes = logical_axes(path)
    targets = [rules[axis] for axis in axes]
    used = [target for target in targets if target is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"{path}: logical axes {axes} put two dimensions on one mesh axis: {targets}")
    stacked = len(shape) - len(axes)
    fits = [t is not None and size % mesh.shape[t] == 0 for size, t in zip(shape[stacked:], targets, strict=True)]
    return PartitionSpec(*[None] * stacked, *(t if fit else None for t, fit in zip(targets, fits, strict=True)))


def param_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the sharding of every parameter (arrays or shapes) of a nested dict."""

    def place(path, leaf):
        return NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over `replica` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((REPLICA, FSDP)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def place_whole(values: Sequence[Any], mesh: Mesh) -> list[jax.Array]:
    """Gives every device small values that all processes know; returns arrays."""
    return [jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x), np.shape(x)) for x in values]


def place_batch(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Builds global arrays from this process's rows of a batch, with rows sharded over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in arrays.items()}
