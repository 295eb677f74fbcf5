"""The mesh's sizes: -1 takes the remaining devices, and impossible sizes are wrong requests."""

from __future__ import annotations

import jax
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
