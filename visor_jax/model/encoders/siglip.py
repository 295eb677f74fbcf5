"""The SigLIP tower: tiles of uint8 pixels in, patch features out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from visor_jax.architecture import AnyResArchitecture, VisionArchitecture
from visor_jax.model.layers import Embedding, Linear, Params, SiglipLayer, for_each, linear, scan_layers, siglip_layer

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


class VisionTower(nnx.Module):
    """Parameters of the tower (`transformers.SiglipVisionModel` without its head and last norm); layers are stacked."""

    def __init__(self, arch: VisionArchitecture, *, rngs: nnx.Rngs):
        self.patch_embedding = Linear(3 * arch.patch_size**2, arch.hidden_size, bias=True, rngs=rngs)
        self.position_embedding = Embedding(arch.patches_per_tile, arch.hidden_size, std=0.3, rngs=rngs)
        if arch.num_layers:
            self.layers = stacked(lambda r: SiglipLayer(arch, rngs=r), arch.num_layers, rngs)


def stacked(make: Callable[[nnx.Rngs], ModuleT], count: int, rngs: nnx.Rngs) -> ModuleT:
    """`count` modules of one kind as a single module whose parameters carry a leading axis."""
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def normalize(tiles: UInt8[Array, "B n S S 3"], anyres: AnyResArchitecture) -> Float[Array, "B n S S 3"]:
    """Pixels to (value / 255 - mean) / std, per channel."""
    mean, std = (jnp.asarray(x, float) for x in (anyres.image_mean, anyres.image_std))  # float32, or as JAX computes
    x = tiles.astype(float) / 255.0
    return (x - for_each(x, mean)) / for_each(x, std)


def patchify(tiles: Float[Array, "B n S S 3"], patch_size: int) -> Float[Array, "B n P C"]:
    """Cut each tile into its patches, row by row; a patch's values run over row, column, channel.

    Pixels behind the last whole patch (6 of 384 at patches of 14) are left out, as SigLIP's convolution does.
    """
    batch, count, side = tiles.shape[:3]
    n = side // patch_size
    whole = tiles[:, :, : n * patch_size, : n * patch_size]
    x = whole.reshape(batch, count, n, patch_size, n, patch_size, 3)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, count, n * n, 3 * patch_size**2)


def tower(
    params: Params, tiles: UInt8[Array, "B n S S 3"], arch: VisionArchitecture, anyres: AnyResArchitecture
) -> Float[Array, "B n P Dv"]:
    """Features of every patch of every tile, before `post_layernorm`, in the parameters' dtype."""
    patches = patchify(normalize(tiles, anyres), arch.patch_size)
    patches = patches.astype(params["patch_embedding"]["kernel"].dtype)
    x = linear(params["patch_embedding"], patches) + params["position_embedding"]["embedding"][None, None]
    shape = x.shape
    x = x.reshape(-1, *shape[2:])  # one row per tile: [B * n, P, Dv]
    if "layers" in params:
        x, _ = scan_layers(lambda y, layer: (siglip_layer(layer, y, arch), None), x, params["layers"])
    return x.reshape(shape)
