"""From patch features to visual tokens: the MLP connector, and the gather that stitches AnyRes tiles.

`visor_jax.data.anyres` computes which patch, mixture of four patches (if the stitched map was shrunk) or newline is at
each visual position; this module applies it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from visor_jax.model.layers import Linear, Params, linear


class Connector(nnx.Module):
    """`linear_1`, exact GELU, `linear_2` (`transformers.LlavaOnevisionMultiModalProjector`)."""

    def __init__(self, size_in: int, size_out: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(size_in, size_out, bias=True, rngs=rngs)
        self.linear_2 = Linear(size_out, size_out, bias=True, rngs=rngs)


def connector(params: Params, features: Float[Array, "B n P Dv"]) -> Float[Array, "B n P D"]:
    """Patch features in the decoder's hidden size, before AnyRes tiles are stitched."""
    return linear(params["linear_2"], jax.nn.gelu(linear(params["linear_1"], features), approximate=False))


def stitch(
    features: Float[Array, "G n P D"],
    newline: Float[Array, " D"],
    gather: Int[Array, "B Nv K"],
    weights: Float[Array, "B Nv K"],
) -> Float[Array, "B Nv D"]:
    """Position i is the sum over k of weights[i, k] * source[gather[i, k]]; source: all patches, then the newline.

    Each B / G neighboring rows share a pool of n tiles; `gather` counts the patches of the row's pool.
    """
    pools, _, _, size = features.shape
    source = features.reshape(pools, -1, size)
    source = jnp.concatenate([source, jnp.broadcast_to(newline, (pools, 1, size)).astype(source.dtype)], axis=1)
    index = gather.reshape(pools, -1, 1, 1)
    patches = jnp.take_along_axis(source[:, :, None], index, axis=1)  # [G, B / G * Nv * K, 1, D]
    patches = patches.reshape(*gather.shape, size)
    return jnp.einsum("BVKD,BVK->BVD", patches, weights.astype(patches.dtype))
