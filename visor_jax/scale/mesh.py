"""The device mesh: axes `replica`, `fsdp` and `tensor`, sized by `config.mesh`.

In: the three sizes, one of which may be -1 (the remaining devices). Out: a `jax.sharding.Mesh` over all devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from visor_jax.architecture import FSDP, MESH_AXES, REPLICA, TENSOR
from visor_jax.config import ConfigLike, as_config
from visor_jax.errors import RequestError


def configured_mesh(config: ConfigLike) -> Mesh:
    """Builds the mesh of a configuration."""
    mesh = as_config(config).mesh
    return build_mesh(mesh.replica, mesh.fsdp, mesh.tensor)


def row_shards(mesh: Mesh) -> int:
    """Returns the number of parts that the rows of a batch are split into: replicas times FSDP shards."""
    return mesh.shape[REPLICA] * mesh.shape[FSDP]


def check_rows(name: str, rows: int, mesh: Mesh, pool_rows: int = 1) -> None:
    """Checks that replicas and FSDP shards get equally many rows, in whole pools of `pool_rows`.

    Raises:
      RequestError: the number of rows is not divisible, or processes would share rows.
    """
    ways = row_shards(mesh)
    if ways % jax.process_count():
        raise RequestError(
            f"mesh.tensor={mesh.shape[TENSOR]}: expected at most the {jax.local_device_count()} devices of a process,"
            f" because each of the {jax.process_count()} processes prepares rows of its own"
        )
    if rows % (ways * pool_rows):
        pools = f", in pools of data.pool_rows={pool_rows}" if pool_rows > 1 else ""
        raise RequestError(
            f"{name}={rows}: expected a multiple of {ways * pool_rows}, because these {mesh.size} devices split the"
            f" rows {ways} ways{pools}; change it, or mesh.replica, mesh.fsdp and mesh.tensor"
        )


def scoring_mesh(config: ConfigLike) -> Mesh:
    """Builds the mesh for evaluation: the configured one, or this process's devices if there are several processes."""
    if jax.process_count() == 1:
        return configured_mesh(config)
    return build_mesh(1, -1, 1, devices=jax.local_devices())


def build_mesh(replica: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh of all `devices` (default: every device of every process).

    Raises:
      RequestError: the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = [replica, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // max(known, 1), 1)
    if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
        settings = ", ".join(
            f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, (replica, fsdp, tensor), strict=True)
        )
        raise RequestError(f"{settings}: the product must be the number of devices, {len(devices)} (one may be -1)")
    return Mesh(mesh_utils.create_device_mesh(sizes, devices=devices), MESH_AXES)
