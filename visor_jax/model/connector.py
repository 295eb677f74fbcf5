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
    return jnp.einsum("BVKD,BVK->BVD", *_gathered(features, newline, gather, weights))


def _gathered(
    features: Float[Array, "G n P D"], newline: Float[Array, " D"], gather: Int[Array, "B Nv K"], weights: Array
) -> tuple[Float[Array, "B Nv K D"], Float[Array, "B Nv K"]]:
    """The features at `gather`, and `weights` in their dtype."""
    pools, _, _, size = features.shape
    source = features.reshape(pools, -1, size)
    source = jnp.concatenate([source, jnp.broadcast_to(newline, (pools, 1, size)).astype(source.dtype)], axis=1)
    index = gather.reshape(pools, -1, 1, 1)
    patches = jnp.take_along_axis(source[:, :, None], index, axis=1)  # [G, B / G * Nv * K, 1, D]
    patches = patches.reshape(*gather.shape, size)
    return patches, weights.astype(patches.dtype)


def shuffled(
    params: Params,
    features: Float[Array, "G n P Dv"],
    gather: Int[Array, "B Nv K"],
    weights: Float[Array, "B Nv K"],
    packing: int,
) -> Float[Array, "B Nv D"]:
    """V(0) with neighbors side by side: the connector over the features of `packing` patches, and newlines.

    Args:
      params: the model's.
      features: of the tower; neighbor j is `packing` times the weighted sum of those at k = j modulo `packing`.
    """
    nothing = jnp.zeros(features.shape[-1], features.dtype)
    taps, shares = _gathered(features, nothing, gather, weights)
    batch, positions, count, size = taps.shape
    taps = taps.reshape(batch, positions, count // packing, packing, size)
    shares = packing * shares.reshape(batch, positions, count // packing, packing)
    neighbors = jnp.einsum("BVKND,BVKN->BVND", taps, shares).reshape(batch, 1, positions, packing * size)
    tokens = connector(params["connector"], neighbors)[:, 0]
    is_newline = (gather[..., 0] == features.shape[1] * features.shape[2]) & (weights[..., 0] > 0)
    tokens = jnp.where(is_newline[..., None], params["image_newline"].astype(tokens.dtype)[None, None], tokens)
    return jnp.where((jnp.sum(weights, axis=-1) > 0)[..., None], tokens, 0)


def widened_connector(kernel: Float[Array, "Dv D"], packing: int) -> Float[Array, "packed_Dv D"]:
    """The first kernel of a connector for `packing` neighbors that starts by reading their mean."""
    return jnp.concatenate([kernel / packing] * packing)
