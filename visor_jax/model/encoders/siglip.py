"""The SigLIP tower (`transformers.SiglipVisionModel` without head and last norm): parameters and arithmetic.

In: tiles of uint8 pixels [B, n, S, S, 3]. Out: features [B, n, P, Dv] of their patches. Shapes: B rows, n tiles of a
row, S pixels per side, P patches of a tile, Dv or D hidden size, N tiles of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from visor_jax.architecture import AnyResArchitecture, VisionArchitecture
from visor_jax.kernels import AttentionMask, attention
from visor_jax.kernels.mesh import by_rows
from visor_jax.kernels.precision import widened
from visor_jax.model.initializers import sines_of_grid
from visor_jax.model.layers import (
    QKV,
    Embedding,
    GeluMLP,
    LayerNorm,
    Linear,
    Params,
    for_each,
    gelu_mlp,
    layer_norm,
    linear,
    merge_heads,
    scan_layers,
    split_heads,
    stacked,
)
from visor_jax.model.remat import Remat, layer_input, mlp_values, recomputed


class SiglipAttention(nnx.Module):
    """Projections of one layer's attention, with biases (`transformers.SiglipAttention`)."""

    def __init__(self, size: int, *, rngs: nnx.Rngs, residual_gain: float):
        self.q_proj = Linear(size, size, bias=True, rngs=rngs)
        self.k_proj = Linear(size, size, bias=True, rngs=rngs)
        self.v_proj = Linear(size, size, bias=True, rngs=rngs)
        self.out_proj = Linear(size, size, bias=True, rngs=rngs, gain=residual_gain)


class SiglipLayer(nnx.Module):
    """One encoder layer (`transformers.SiglipEncoderLayer`)."""

    def __init__(self, arch: VisionArchitecture, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(arch.hidden_size)
        self.self_attn = SiglipAttention(arch.hidden_size, rngs=rngs, residual_gain=arch.residual_init)
        self.layer_norm2 = LayerNorm(arch.hidden_size)
        self.mlp = GeluMLP(arch.hidden_size, arch.intermediate_size, rngs=rngs, residual_gain=arch.residual_init)


class VisionTower(nnx.Module):
    """Parameters of the tower (`transformers.SiglipVisionModel` without its head and last norm); layers are stacked."""

    def __init__(self, arch: VisionArchitecture, *, rngs: nnx.Rngs):
        self.patch_embedding = Linear(3 * arch.patch_size**2, arch.hidden_size, bias=True, rngs=rngs)
        self.position_embedding = Embedding(arch.patches_per_tile, arch.hidden_size, std=0.3, rngs=rngs)
        if arch.position_init == "sines":
            table = sines_of_grid(arch.patches_per_side, arch.hidden_size)
            self.position_embedding.embedding = nnx.Param(jnp.asarray(table))
        if arch.num_layers:
            self.layers = stacked(lambda r: SiglipLayer(arch, rngs=r), arch.num_layers, rngs)


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
    params: Params,
    batch: Mapping[str, Any],
    arch: VisionArchitecture,
    anyres: AnyResArchitecture,
    *,
    remat: Remat = "none",
) -> Float[Array, "B n P Dv"]:
    """Features of every patch of every tile, before `post_layernorm`, in the parameters' dtype.

    Args:
      params: of the tower.
      batch: its arrays of tiles (`visor_jax.data.tiles`): `tiles`, uint8 [B, n, S, S, 3]; of small pictures
        `tile_positions` and `tile_segments`, int32 [B, n, P], so that patches have the position embeddings of their
        windows and see those of their own picture; of standardized ones `tile_means` and `tile_scales`, float32
        [B, n, P].
      arch, anyres: the shape of the tower, and how pixels are normalized.
      remat: what the backward pass recomputes of each layer (`visor_jax.model.remat`).
    """
    x = embedded_patches(params, batch, arch, anyres)
    shape = x.shape
    x = by_rows(x.reshape(-1, *shape[2:]))  # one row per tile: [B * n, P, Dv]
    if "layers" in params:
        segments = jnp.asarray(batch["tile_segments"]).reshape(x.shape[:2]) if anyres.small_pictures else None
        x = run_layers(params["layers"], x, arch, segments, remat)
    return x.reshape(shape)


class TowerAttention(NamedTuple):
    """How much attention patches receive, and their keys, without gradients.

    `last`, `first`: attention that a patch receives in the last and the first layer, the mean over heads and queries.
    `keys`: the last layer's keys, the mean over heads. `first` is None if it was not asked for.
    """

    last: Float[Array, "B n P"]
    keys: Float[Array, "B n P E"]
    first: Float[Array, "B n P"] | None = None


def tower_with_attention(
    params: Params,
    batch: Mapping[str, Any],
    arch: VisionArchitecture,
    anyres: AnyResArchitecture,
    *,
    remat: Remat = "none",
    with_first: bool = False,
) -> tuple[Float[Array, "B n P Dv"], TowerAttention]:
    """The result of `tower`, and the attention in its last layer, `with_first` also in its first; the rest as there.

    Attention kernels do not return their weights, so these are computed once more, and of the first layer also queries
    and keys. Pictures fill whole tiles.
    """
    x = embedded_patches(params, batch, arch, anyres)
    shape = x.shape
    x = by_rows(x.reshape(-1, *shape[2:]))
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in (0, -1))
    before = jax.tree.map(lambda leaf: leaf[:-1], params["layers"])
    y = run_layers(before, x, arch, None, remat) if arch.num_layers > 1 else x
    of_last = recomputed(lambda layer, z: layer_with_attention(layer, z, arch), remat)
    features, received, keys = of_last(last, layer_input(y))
    found = [features, received, keys]
    if with_first:
        found.append(received_attention(*projected(first, x, arch, QKV[:2])))
    features, *seen = (z.reshape(*shape[:2], *z.shape[1:]) for z in found)
    return features, TowerAttention(*seen)


def layer_with_attention(
    params: Params, x: Float[Array, "N P D"], arch: VisionArchitecture
) -> tuple[Float[Array, "N P D"], Float[Array, "N P"], Float[Array, "N P E"]]:
    """The result of `siglip_layer`, the attention that each patch receives, and its key, mean over heads."""
    query, key, value = projected(params, x, arch, QKV)
    attended = attention(query, key, value, mask=whole_mask(*x.shape[:2]))
    keys = jnp.mean(widened(jax.lax.stop_gradient(key)), axis=2)
    return finish_layer(params, x, attended, arch), received_attention(query, key), keys


def received_attention(query: Float[Array, "N P H E"], key: Float[Array, "N P H E"]) -> Float[Array, "N P"]:
    """The attention that each patch receives, mean over heads and queries, without gradients."""

    def add_head(total: Float[Array, "N P"], head: tuple[Array, Array]) -> tuple[Float[Array, "N P"], None]:
        logits = jnp.einsum("NQE,NKE->NQK", head[0], head[1]) * head[0].shape[-1] ** -0.5
        return total + jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1), None

    # One head at a time, so that there is one array [N, P, P] and not one for each head.
    queries, keys = (jnp.moveaxis(widened(jax.lax.stop_gradient(x)), 2, 0) for x in (query, key))
    total, _ = jax.lax.scan(add_head, jnp.zeros(query.shape[:2], queries.dtype), (queries, keys))
    return total / query.shape[2]


def run_layers(
    layers: Params,
    x: Float[Array, "N P Dv"],
    arch: VisionArchitecture,
    segments: Int[Array, "N P"] | None,
    remat: Remat,
) -> Float[Array, "N P Dv"]:
    """Runs stacked layers; what the backward pass recomputes of each is `remat`."""

    def body(y: Float[Array, "N P Dv"], layer: Params) -> tuple[Float[Array, "N P Dv"], None]:
        return siglip_layer(layer, layer_input(y), arch, segments), None

    return scan_layers(recomputed(body, remat), x, layers)[0]


def embedded_patches(
    params: Params, batch: Mapping[str, Any], arch: VisionArchitecture, anyres: AnyResArchitecture
) -> Float[Array, "B n P Dv"]:
    """What the first layer reads: projected patches plus their position embeddings."""
    patches = normalized_patches(batch, arch, anyres).astype(params["patch_embedding"]["kernel"].dtype)
    table = jnp.asarray(params["position_embedding"]["embedding"])
    positions = table[batch["tile_positions"]] if anyres.small_pictures else table[None, None]
    return linear(params["patch_embedding"], patches) + positions


def normalized_patches(
    batch: Mapping[str, Any], arch: VisionArchitecture, anyres: AnyResArchitecture
) -> Float[Array, "B n P C"]:
    """The pixels of every patch as the tower reads them: normalized per channel, or standardized per picture."""
    if not anyres.standardize:
        return patchify(normalize(batch["tiles"], anyres), arch.patch_size)
    patches = patchify(jnp.asarray(batch["tiles"]).astype(float), arch.patch_size)
    means, scales = (jnp.asarray(batch[name])[..., None] for name in ("tile_means", "tile_scales"))
    return (patches - means) * scales


def whole_mask(batch: int, length: int) -> AttentionMask:
    """Every token sees every token of its row."""
    zeros, ones = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), jnp.int32)
    return AttentionMask(zeros, zeros, ones, ones, None, False)


def segment_mask(segments: Int[Array, "N P"]) -> AttentionMask:
    """Every token sees the tokens of its segment; segment 0 is padding."""
    zeros = jnp.zeros_like(segments)
    return AttentionMask(zeros, zeros, segments, segments, None, False)


def siglip_layer(
    params: Params, x: Float[Array, "N P D"], arch: VisionArchitecture, segments: Int[Array, "N P"] | None = None
) -> Float[Array, "N P D"]:
    """One encoder layer over the patches of each tile, or of each of its `segments`."""
    mask = whole_mask(*x.shape[:2]) if segments is None else segment_mask(segments)
    return finish_layer(params, x, attention(*projected(params, x, arch, QKV), mask=mask), arch)


def projected(
    params: Params, x: Float[Array, "N P D"], arch: VisionArchitecture, names: Sequence[str]
) -> tuple[Float[Array, "N P H E"], ...]:
    """Those of queries, keys and values of one layer that `names` (of `QKV`) name."""
    y = layer_norm(params["layer_norm1"], x, arch.layer_norm_eps)
    return tuple(split_heads(linear(params["self_attn"][n], y), arch.head_dim) for n in names)


def finish_layer(
    params: Params, x: Float[Array, "N P D"], attended: Float[Array, "N P H E"], arch: VisionArchitecture
) -> Float[Array, "N P D"]:
    """What follows a layer's attention: its output projection and the MLP."""
    x = mlp_values(x + linear(params["self_attn"]["out_proj"], merge_heads(attended)))
    return x + gelu_mlp(params["mlp"], layer_norm(params["layer_norm2"], x, arch.layer_norm_eps))
