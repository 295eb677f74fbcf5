"""How kernels meet a mesh: which axes of the ambient one (`jax.set_mesh`) may split samples, and which heads or words.

XLA's partitioner does not look into kernels and loops; under a mesh they run inside `jax.shard_map` on each device's
part. Out: names of axes, whose sizes divide what they split.
"""

from __future__ import annotations

import jax
from jax.sharding import AxisType

# The mesh of this project (docs/architecture.md): samples lie over the first two, heads and vocabulary over the last.
SAMPLE_AXES, SPLIT_AXIS = ("replica", "fsdp"), "tensor"


def free_axes() -> dict[str, int]:
    """Sizes of the ambient mesh's axes that no enclosing `shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: mesh.shape[name] for name, kind in kinds.items() if kind != AxisType.Manual}


def sample_axes(count: int) -> tuple[str, ...]:
    """The axes over which `count` samples or rows lie; those that do not divide them are left out."""
    taken, parts = [], 1
    for name, size in free_axes().items():
        if name in SAMPLE_AXES and count % (parts * size) == 0:
            taken, parts = [*taken, name], parts * size
    return tuple(taken)


def split_axis(count: int) -> str | None:
    """The axis over which `count` heads or words lie, or None where it does not divide them."""
    return SPLIT_AXIS if count % free_axes().get(SPLIT_AXIS, count + 1) == 0 else None
