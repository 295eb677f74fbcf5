"""Checks of a training run before its first step and after it, on the devices it really has.

In: the state, its shardings, the mesh. Out: nothing, or an error that names the largest parameters concerned and what
to change: parameters that devices hold whole although the mesh could share them, and a state that the step copied
instead of overwriting. `dispatching` refuses transfers between host and devices while a step is dispatched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from visor_jax.architecture import FSDP, TENSOR
from visor_jax.errors import RequestError, RunError
from visor_jax.tree import path_name

SMALL_BYTES = 64 * 2**20  # held too much on each device: no reason to refuse a run
_SHOWN = 3


class Sharding(NamedTuple):
    """How a state lies on the devices.

    Attributes:
      total: bytes of all parameters and moments.
      per_device: bytes that one device holds.
      ways: devices that could share them: the mesh's `fsdp` times `tensor`.
      whole: bytes of the arrays that no axis shares, by path, largest first.
    """

    total: int
    per_device: int
    ways: int
    whole: dict[str, int]

    @property
    def excess(self) -> float:
        """Bytes per device above an equal share, as a fraction of the share."""
        return self.per_device * self.ways / self.total - 1 if self.total else 0.0


def sharding_of(state: Any, shardings: Any, mesh: Mesh | AbstractMesh) -> Sharding:
    """Measures a state (arrays or shapes) under its shardings."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    places = jax.tree.leaves(shardings)
    total = per_device = 0
    whole: dict[str, int] = {}
    for (path, leaf), place in zip(leaves, places, strict=True):
        size = leaf.dtype.itemsize
        bytes_here = math.prod(place.shard_shape(tuple(leaf.shape))) * size
        total, per_device = total + leaf.size * size, per_device + bytes_here
        if bytes_here == leaf.size * size:
            whole[path_name(path)] = bytes_here
    largest = dict(sorted(whole.items(), key=lambda item: -item[1]))
    return Sharding(total, per_device, mesh.shape[FSDP] * mesh.shape[TENSOR], largest)


def check_sharded(state: Any, shardings: Any, mesh: Mesh | AbstractMesh, tolerance: float) -> None:
    """Checks that devices share parameters and optimizer state, up to `tolerance` of an equal share.

    A state that holds less than `SMALL_BYTES` too much on each device is accepted.

    Raises:
      RequestError: devices hold more; the message names the largest arrays and the fields to change.
    """
    found = sharding_of(state, shardings, mesh)
    share = found.total // found.ways
    if found.ways == 1 or found.per_device - share <= SMALL_BYTES or found.excess <= tolerance:
        return
    names = ", ".join(f"{path} ({_size(size)})" for path, size in [*found.whole.items()][:_SHOWN])
    raise RequestError(
        f"mesh.fsdp={mesh.shape[FSDP]}, mesh.tensor={mesh.shape[TENSOR]}: each device would hold"
        f" {_size(found.per_device)} of parameters and optimizer state, {found.excess:.0%} more than its share of"
        f" {_size(share)}; held whole: {names or 'none, but some are not shared by both axes'}; expected sizes of the"
        " mesh that divide the model's hidden sizes, or mesh.max_unsharded above this"
    )


def check_donated(before: Any) -> None:
    """Checks that the first step has overwritten the state it was given, so that no device holds two.

    Args:
      before: the state that was passed to the step.

    Raises:
      RunError: some of its arrays are still there.
    """
    kept = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(before) if not _freed(leaf)}
    if kept:
        largest = sorted(kept.items(), key=lambda item: -item[1].size)[:_SHOWN]
        names = ", ".join(f"{path} {leaf.dtype}{list(leaf.shape)}" for path, leaf in largest)
        raise RunError(
            f"the step copied {len(kept)} arrays of the state instead of overwriting them, so that devices hold them"
            f" twice; the largest: {names}; expected that every array of the state keeps its shape, dtype and sharding"
        )


def check_aliased(compiled: Any, state: Any) -> None:
    """Checks that a compiled step writes its new state over the old one, by the bytes that the compiler reports.

    Args:
      compiled: the step (`jax.stages.Compiled`). A program that reports no aliased bytes at all is not judged: backends
        and programs from a cache may not count them; `check_donated` then judges the arrays.
      state: the state, as arrays or as shapes with shardings.

    Raises:
      RunError: the program aliases fewer bytes than a device holds of the state.
    """
    memory = compiled.memory_analysis()
    aliased = getattr(memory, "alias_size_in_bytes", 0)
    leaves = jax.tree.leaves(state)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    if 0 < aliased < held:
        raise RunError(
            f"the compiled step overwrites {_size(aliased)} of the {_size(held)} of the state that each device holds,"
            " so that the rest is held twice; expected that every array of the state keeps its shape, dtype and"
            " sharding"
        )


@contextlib.contextmanager
def dispatching(mesh: Mesh) -> Iterator[None]:
    """For the dispatch of a step: kernels split their work over the mesh, and nothing moves to or from the host."""
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        yield


def _freed(leaf: Any) -> bool:
    return leaf.is_deleted() or leaf.size == 0


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
