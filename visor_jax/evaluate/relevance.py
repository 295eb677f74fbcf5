"""Shows on which patches of a picture an answer depends, and which ones cross-attention reads.

In: a model and a batch of one question with its answer. Out: maps over the patches of the picture's first tile.

`patch_relevance` is gradient times input at the visual tokens (Shrikumar et al., 2016), an approximation to first
order: how much the answer's log-likelihood would change if a visual token were zero, through all layers that run under
the budget. `cross_attention_maps` is what the softmax of each cross-attention layer gives to the patches. A layer may
attend to a patch and do nothing with it, so the two differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, Plan
from visor_jax.data.collate import Batch
from visor_jax.model.decoder import cross_params, run_layers
from visor_jax.model.dropping.base import received_attention
from visor_jax.model.layers import Params
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.super_block import cross_keys_values, cross_queries
from visor_jax.model.visor import embed, encode, stream_of

MAX_VISUAL = 1024  # visual positions of a row; the backward pass of more needs much memory


def patch_relevance(params: Params, batch: Batch, bits: Bits, arch: Architecture) -> Float[np.ndarray, "S S"] | None:
    """Returns the relevance of each patch of the first tile to the answer, the largest 1; None if it is not computed.

    Args:
      batch: one row with one question; a picture whose parts are tiles (not one of several in a tile).

    Returns:
      None if there is no picture, if it has more than `MAX_VISUAL` positions, if a reduction chooses tokens, or if
      nothing depends on it.
    """
    if not has_map(batch, arch) or batch.arrays["visual_segments"].shape[1] > MAX_VISUAL:
        return None
    of_tokens = np.asarray(_relevance_program(arch)(params, batch.arrays, jnp.asarray(bits, bool)), np.float32)[0]
    patches = on_first_tile(batch, of_tokens, arch)
    largest = patches.max()
    return patches / largest if largest > 0 and np.isfinite(largest) else None


class LayerMap(NamedTuple):
    """What one cross-attention layer reads.

    Attributes:
      layer: its index in the decoder, from 0.
      on_tile: the share of its attention that falls on the first tile; the rest is on other tiles and line ends.
      patches: the attention of each patch of that tile, the largest 1.
    """

    layer: int
    on_tile: float
    patches: Float[np.ndarray, "S S"]


def cross_attention_maps(params: Params, batch: Batch, bits: Bits, arch: Architecture) -> list[LayerMap]:
    """Returns the attention of each cross-attention layer: of the predictions of the answer, mean over them and heads.

    Args:
      batch: one row with one question; a picture whose parts are tiles (not one of several in a tile).

    Returns:
      [] if there is no such layer, no picture, no answer, or if a reduction chooses tokens.
    """
    layers = Plan.of(arch).cross
    if not layers or not has_map(batch, arch):
        return []
    visual, maps = _encode_program(arch)(params, batch.arrays), []
    received = _attention_program(arch, bits)(params, visual, batch.arrays)
    for layer, of_tokens in zip(layers, received, strict=True):
        patches = on_first_tile(batch, np.asarray(of_tokens, np.float32)[0], arch)
        largest = patches.max()
        if not largest > 0 or not np.isfinite(largest):
            return []
        maps.append(LayerMap(layer, min(float(patches.sum()), 1.0), patches / largest))
    return maps


def has_map(batch: Batch, arch: Architecture) -> bool:
    """Returns whether visual tokens of the batch have places on a tile that is part of one picture."""
    arrays = batch.arrays
    return not arch.reduction.selects and "tile_positions" not in arrays and arrays["visual_segments"].shape[1] > 0


def on_first_tile(batch: Batch, of_tokens: Float[np.ndarray, " V"], arch: Architecture) -> Float[np.ndarray, "S S"]:
    """Returns values of visual tokens, divided among the patches of the first tile that the tokens are made of."""
    side, arrays = arch.vision.patches_per_side, batch.arrays
    gather, weights = arrays["visual_gather"][0], arrays["visual_weights"][0]
    shares = np.where((gather < side**2) & (arrays["visual_segments"][0] > 0)[:, None], weights, 0) * of_tokens[:, None]
    patches = np.zeros(side**2, np.float32)
    np.add.at(patches, np.where(shares > 0, gather, 0), shares)
    return patches.reshape(side, side)


@lru_cache(maxsize=8)
def _relevance_program(arch: Architecture) -> Callable[[Params, dict, Array], Float[Array, "B V"]]:
    return jax.jit(partial(_token_relevance, arch=arch))


def _token_relevance(params: Params, batch: dict[str, Array], budget: Array, *, arch: Architecture):
    visual = encode(params, batch, arch)

    def loss(visual):
        losses, _, _ = answer_tokens(params, visual, batch, budget, arch)
        return jnp.sum(losses)

    return jnp.abs(jnp.sum(jax.grad(loss)(visual) * visual, axis=-1))


@lru_cache(maxsize=8)
def _encode_program(arch: Architecture) -> Callable[[Params, dict], Float[Array, "B V D"]]:
    return jax.jit(partial(encode, arch=arch))


@lru_cache(maxsize=32)
def _attention_program(arch: Architecture, bits: Bits) -> Callable[[Params, Array, dict], list[Float[Array, "B V"]]]:
    return jax.jit(partial(_token_attention, bits=bits, arch=arch))


def _token_attention(params: Params, visual: Array, batch: dict[str, Array], *, bits: Bits, arch: Architecture):
    """The attention that visual tokens receive in each cross-attention layer, mean over predictions of the answer."""
    text, stream = embed(params, batch["text_tokens"]), stream_of(batch)
    targets = batch["loss_mask"][:, 1:] & (stream.text_segments[:, 1:] == stream.text_segments[:, :-1])
    predicts = jnp.pad(targets.astype(jnp.float32), ((0, 0), (0, 1)))  # the token before a target predicts it
    predicts /= jnp.maximum(jnp.sum(predicts, axis=1, keepdims=True), 1)
    received, start = [], 0
    for layer in Plan.of(arch).cross:
        visual, text = run_layers(params, visual, text, stream, bits, arch, layers=range(start, layer))
        cross = cross_params(params, arch.layers[layer])
        query, mask = cross_queries(cross, text, stream.text_segments, stream.visual_segments, arch.text)
        key, _ = cross_keys_values(cross, visual, stream.visual_segments, arch.text)
        received.append(received_attention(query, key, mask, predicts))
        start = layer
    return received
