"""Computes the visual tokens V(0) of a batch of single questions: the vision tower reads the tiles that they have.

In: parameters on the devices, and a batch with one sample per row and pools for the largest pictures. Out: V(0) on the
devices, sharded by rows. Search, label, evaluate and `visor analyze` share it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import jax
from jax.sharding import Mesh
from jaxtyping import Float

from visor_jax.architecture import Architecture
from visor_jax.data.tile_pools import Arrays, in_pools
from visor_jax.model.layers import Params
from visor_jax.model.visor import encode
from visor_jax.scale.mesh import row_shards
from visor_jax.scale.sharding import place_batch


@lru_cache(maxsize=8)
def encoder(arch: Architecture) -> Callable[..., jax.Array]:
    """Returns the compiled `model.visor.encode`, cached for later passes."""
    return jax.jit(partial(encode, arch=arch))


def visual_tokens(params: Params, arrays: Arrays, arch: Architecture, mesh: Mesh) -> Float[jax.Array, "B Nv D"]:
    """Returns V(0) of every row.

    Args:
      params: in the dtype of activations, on the devices of `mesh`.
      arrays: of a batch with one pool of tiles per row, whose rows the mesh divides.
      arch: of the model.
      mesh: over which rows are sharded.
    """
    placed = place_batch(in_pools(arrays, row_shards(mesh), arch), mesh)
    with jax.set_mesh(mesh):  # kernels split their work over it
        return encoder(arch)(params, placed)
