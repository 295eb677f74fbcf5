"""Splits kernels over the ambient mesh (`jax.set_mesh`): which axes split samples, and which heads or the vocabulary.

XLA does not partition kernels and loops; under a mesh they run inside `jax.shard_map` on each device's part. An axis
splits a dimension only if its size divides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Shaped

from visor_jax.architecture import FSDP, REPLICA, TENSOR

SAMPLE_AXES, SPLIT_AXIS = (REPLICA, FSDP), TENSOR


def free_axes() -> dict[str, int]:
    """Sizes of the ambient mesh's axes that no enclosing `shard_map` has taken.

    Raises:
      ValueError: an axis is explicit.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if explicit := [name for name, kind in kinds.items() if kind == AxisType.Explicit and mesh.shape[name] > 1]:
        raise ValueError(
            f"axes {', '.join(explicit)} of the mesh are explicit; expected automatic ones, as of jax.sharding.Mesh or"
            " jax.make_mesh(..., axis_types=(AxisType.Auto,) * axes)"
        )
    return {name: mesh.shape[name] for name, kind in kinds.items() if kind != AxisType.Manual}


def is_split() -> bool:
    """Whether the free axes hold more than one device."""
    return any(size > 1 for size in free_axes().values())


def sample_axes(count: int) -> tuple[str, ...]:
    """The axes that split `count` samples or rows."""
    axes, num_parts = [], 1
    for name, size in free_axes().items():
        if name in SAMPLE_AXES and size > 1 and count % (num_parts * size) == 0:
            axes, num_parts = [*axes, name], num_parts * size
    return tuple(axes)


def split_axis(count: int) -> str | None:
    """The axis that splits `count` heads or token ids, or None."""
    size = free_axes().get(SPLIT_AXIS, 1)
    return SPLIT_AXIS if size > 1 and count % size == 0 else None


def by_rows(x: Shaped[Array, "rows ..."]) -> Shaped[Array, "rows ..."]:
    """`x`, each device with its own rows and the other dimensions whole; unchanged where no axis splits the rows.

    Layers say it of what they read. Otherwise a parameter that the same axis splits by hidden size, such as the
    embedding table, passes its division on to the activations, and each layer gathers the rows of all devices instead
    of its weights.
    """
    axes = sample_axes(x.shape[0])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def by_rows_from_table(x: Shaped[Array, "rows ... width"]) -> Shaped[Array, "rows ... width"]:
    """`by_rows` of what was looked up in a table whose width `fsdp` splits and that every replica has.

    A device looks up its part of the width for all rows of its replica, and devices of a replica then exchange rows for
    widths; gradients take the same way back. Without the first step the compiler finds no way from the table's division
    to the rows', and every device holds the rows of all.
    """
    axes = sample_axes(x.shape[0])
    if axes == SAMPLE_AXES and x.shape[-1] % free_axes()[FSDP] == 0:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(REPLICA, *[None] * (x.ndim - 2), FSDP))
    return by_rows(x)


def on_each_device(part: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`part` run on each device's arrays by `jax.shard_map`; `part` itself on a single device."""
    if not is_split():
        return part
    return jax.shard_map(part, in_specs=in_specs, out_specs=out_specs, axis_names=set(free_axes()), check_vma=False)
