"""The device mesh: axes `replica`, `fsdp` and `tensor`, sized by `config.mesh`.

In: the three sizes within a slice and the two over slices, of each group one may be -1 (the remaining devices, the
remaining slices). Out: a `jax.sharding.Mesh` over all devices. Several TPU slices are joined by the data center's
network (DCN); an axis then has DCN size times its size within a slice, and neighbors on it lie in one slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from visor_jax.architecture import FSDP, MESH_AXES, REPLICA, TENSOR
from visor_jax.config import ConfigLike, as_config
from visor_jax.errors import RequestError
from visor_jax.scale.mesh_sizes import filled


def configured_mesh(config: ConfigLike, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of a configuration over all `devices` (default: every device of every process)."""
    mesh = as_config(config).mesh
    return build_mesh(mesh.replica, mesh.fsdp, mesh.tensor, devices, dcn=(mesh.dcn_replica, mesh.dcn_fsdp))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts that the rows of a batch are split into: replicas times FSDP shards."""
    return mesh.shape[REPLICA] * mesh.shape[FSDP]


def check_rows(name: str, rows: int, mesh: Mesh | AbstractMesh, pool_rows: int = 1, parts: int = 1) -> None:
    """Checks that replicas and FSDP shards get equally many rows, in whole pools of `pool_rows`, in each of `parts`.

    Raises:
      RequestError: the number of rows is not divisible, or processes would share rows.
    """
    ways = row_shards(mesh)
    if ways % jax.process_count():
        raise RequestError(
            f"mesh.tensor={mesh.shape[TENSOR]}: expected at most the {jax.local_device_count()} devices of a process,"
            f" because each of the {jax.process_count()} processes prepares rows of its own"
        )
    if rows % (ways * pool_rows * parts):
        pools = f", in pools of data.pool_rows={pool_rows}" if pool_rows > 1 else ""
        parts_text = f", and train.accumulate={parts} splits each share again" if parts > 1 else ""
        raise RequestError(
            f"{name}={rows}: expected a multiple of {ways * pool_rows * parts}, because these {mesh.size} devices split"
            f" the rows {ways} ways{pools}{parts_text}; change it, or mesh.replica, mesh.fsdp and mesh.tensor"
        )


def scoring_mesh(config: ConfigLike) -> Mesh:
    """Builds the mesh for evaluation: the configured one, or this process's devices if there are several processes."""
    if jax.process_count() == 1:
        return configured_mesh(config)
    return build_mesh(1, -1, 1, devices=jax.local_devices())


def build_mesh(
    replica: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None, *, dcn: tuple[int, int] = (1, 1)
) -> Mesh:
    """Builds a mesh of all `devices` (default: every device of every process).

    Args:
      replica, fsdp, tensor: sizes within a slice, or over all devices if `dcn` is (1, 1).
      devices: of one slice or several (`slice_of`).
      dcn: sizes of `replica` and `fsdp` over slices; several TPU slices need them, hosts of GPUs may do without.

    Raises:
      RequestError: a product of sizes is not the number of devices, or of slices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes: dict[str, int] = dict(zip(MESH_AXES, (replica, fsdp, tensor), strict=True))
    slices = {slice_of(device) for device in devices}
    if dcn == (1, 1) and (len(slices) == 1 or devices[0].platform != "tpu"):
        shape = filled(sizes, len(devices), "devices")
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES)
    over = filled({"dcn_replica": dcn[0], "dcn_fsdp": dcn[1]}, len(slices), "slices")
    within = filled(sizes, len(devices) // len(slices), "devices of a slice")
    by_process = not hasattr(devices[0], "slice_index")
    grid = mesh_utils.create_hybrid_device_mesh(within, (*over, 1), devices=devices, process_is_granule=by_process)
    return Mesh(grid, MESH_AXES)


def slice_of(device: Any) -> int:
    """Returns the number of a device's slice: devices that a faster network joins; of CPUs, those of one process.

    TPUs without a number are those of a topology that programs are compiled for, which is one slice.
    """
    return getattr(device, "slice_index", 0 if device.platform == "tpu" else device.process_index)
