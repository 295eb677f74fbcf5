"""How kernels meet a mesh: which axes of the ambient one (`jax.set_mesh`) may split samples, and which heads or words.

XLA's partitioner does not look into kernels and loops; under a mesh they run inside `jax.shard_map` on each device's
part. An axis whose size does not divide what it would split leaves it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

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
    """Whether there is more than one device to split work over."""
    return any(size > 1 for size in free_axes().values())


def sample_axes(count: int) -> tuple[str, ...]:
    """The axes over which `count` samples or rows lie."""
    taken, parts = [], 1
    for name, size in free_axes().items():
        if name in SAMPLE_AXES and size > 1 and count % (parts * size) == 0:
            taken, parts = [*taken, name], parts * size
    return tuple(taken)


def split_axis(count: int) -> str | None:
    """The axis over which `count` heads or words lie, or None."""
    size = free_axes().get(SPLIT_AXIS, 1)
    return SPLIT_AXIS if size > 1 and count % size == 0 else None


def on_each_device(part: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`part` on what each device holds; itself where there is nothing to split."""
    if not is_split():
        return part
    return jax.shard_map(part, in_specs=in_specs, out_specs=out_specs, axis_names=set(free_axes()), check_vma=False)
