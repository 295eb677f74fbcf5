"""The mesh's sizes: -1 takes the remaining devices, and impossible sizes are wrong requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from visor_jax.architecture import MESH_AXES
from visor_jax.errors import RequestError
from visor_jax.scale.mesh import build_mesh, check_rows


def test_the_remaining_devices_go_to_minus_one() -> None:
    assert dict(build_mesh(1, -1, 1).shape) == {"replica": 1, "fsdp": jax.device_count(), "tensor": 1}
    assert build_mesh(-1, 1, 1).axis_names == MESH_AXES


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, jax.device_count() + 1),  # too many
        (3, -1, 1),  # not a multiple of the known sizes
        (-1, -1, 1),  # only one size may be -1
        (0, -1, 1),
        (0, 1, 1),
        (-2, 1, 1),
        (-1, 1, -1),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes: tuple[int, int, int]) -> None:
    requested = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    with pytest.raises(RequestError) as error:
        build_mesh(*sizes)
    assert requested in str(error.value) and str(jax.device_count()) in str(error.value)


def test_rows_that_the_devices_cannot_share_are_refused() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4, 1), MESH_AXES)
    check_rows("batch_size", 16, mesh)
    with pytest.raises(RequestError, match="batch_size=14: expected a multiple of 8"):
        check_rows("batch_size", 14, mesh)


@dataclass(frozen=True)
class Device:
    """A stand-in for a device of one of several slices."""

    id: int
    slice_index: int
    process_index: int
    platform: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    device_kind: str = "stand-in"


def in_slices(count: int, per_slice: int, platform: str = "tpu") -> list[Any]:
    """Stand-ins for the devices of several slices, in the order of their ids."""
    ids = range(count * per_slice)
    return [Device(n, n // per_slice, n, platform, (n % 2, n % per_slice // 2, 0)) for n in ids]


@pytest.mark.parametrize(
    ("sizes", "dcn", "shape"),
    [
        ((1, -1, 1), (2, 1), (2, 4, 1)),  # a copy of the parameters in each slice
        ((1, -1, 1), (1, -1), (1, 8, 1)),  # sharded over both slices
        ((2, -1, 1), (-1, 1), (4, 2, 1)),
        ((1, 2, 2), (2, 1), (2, 2, 2)),
    ],
)
def test_neighbors_within_a_slice_stay_together(sizes: tuple[int, int, int], dcn: tuple[int, int], shape: Any) -> None:
    mesh = build_mesh(*sizes, devices=in_slices(2, 4), dcn=dcn)
    assert tuple(mesh.shape.values()) == shape
    halves = np.split(mesh.devices, 2, axis=0 if dcn[0] != 1 else 1)
    assert [{device.slice_index for device in half.flat} for half in halves] == [{0}, {1}]


@pytest.mark.parametrize(
    ("sizes", "dcn", "message"),
    [
        ((1, -1, 1), (3, 1), "mesh.dcn_replica=3, mesh.dcn_fsdp=1: the product must be the number of slices, 2"),
        ((1, -1, 1), (1, 1), "mesh.dcn_replica=1, mesh.dcn_fsdp=1: the product must be the number of slices, 2"),
        ((1, 8, 1), (2, 1), "mesh.replica=1, mesh.fsdp=8, mesh.tensor=1: the product must be the number of devices of"),
        ((3, -1, 1), (2, 1), "devices of a slice, 4"),
    ],
)
def test_sizes_that_do_not_fit_the_slices_are_refused(sizes: tuple[int, int, int], dcn: Any, message: str) -> None:
    with pytest.raises(RequestError) as error:
        build_mesh(*sizes, devices=in_slices(2, 4), dcn=dcn)
    assert message in str(error.value)


def test_hosts_of_gpus_may_form_one_plain_mesh() -> None:
    mesh = build_mesh(1, -1, 1, devices=in_slices(2, 4, "gpu"))
    assert [device.id for device in mesh.devices.flat] == list(range(8))


def test_rows_divide_over_parts_too() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4, 1), MESH_AXES)
    check_rows("batch_size", 32, mesh, pool_rows=2, parts=2)
    with pytest.raises(RequestError, match=r"batch_size=16: expected a multiple of 32.*train.accumulate=2"):
        check_rows("batch_size", 16, mesh, pool_rows=2, parts=2)


def test_a_topology_to_compile_for_is_one_slice() -> None:
    @dataclass(frozen=True)
    class Described:  # without a slice_index
        id: int
        process_index: int
        coords: tuple[int, int, int]
        core_on_chip: int = 0
        platform: str = "tpu"
        device_kind: str = "stand-in"

    mesh = build_mesh(1, -1, 1, devices=[Described(n, n // 2, (n % 2, n // 2, 0)) for n in range(4)])
    assert mesh.shape["fsdp"] == 4
