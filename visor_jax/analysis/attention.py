"""Attention share of visual tokens per layer (VISOR paper, figure 2; FastV's observation).

Of the attention that the tokens which predict the answer pay in a layer, the part that falls on visual tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from visor_jax.analysis.base import LayerAnalysis
from visor_jax.analysis.drawing import Curve, layer_curves
from visor_jax.analysis.passes import LayerView, mean_where
from visor_jax.model.decoders.qwen2 import project_qkv, rotary
from visor_jax.model.super_block import joint_mask

MASKED = -1e30


def attention_share(view: LayerView) -> Float[Array, " B"]:
    """Returns the share of each answer's attention on visual tokens, mean over heads and predictions."""
    arch, places, count = view.arch, view.answers.places, view.visual.shape[1]
    both, mask = jnp.concatenate([view.visual, view.text], axis=1), joint_mask(view.stream, arch, None)
    query, key, _ = project_qkv(view.params, both, rotary(mask.kv_positions, arch.text), arch.text, count)
    query = jnp.take_along_axis(query, places[:, :, None, None], axis=1)  # [B, A, H, E]
    of_answers = mask.map_queries(lambda x: jnp.take_along_axis(x[:, count:], places, axis=1))
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])  # [B, A, K, G, E]
    logits = jnp.einsum("BAKGE,BSKE->BAKGS", query.astype(jnp.float32), key.astype(jnp.float32))
    logits *= query.shape[-1] ** -0.5
    seen = of_answers.as_array()[:, :, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1), 0)
    return mean_where(jnp.mean(jnp.sum(weights[..., :count], axis=-1), axis=(2, 3)), view.answers.valid)


CURVES = [Curve("attention_share", "Where the answer attends", "% of attention on visual tokens", 100)]
ANALYSIS = LayerAnalysis(
    name="attention_share",
    columns={"attention_share": "share of the answer's attention on visual tokens"},
    observers={"attention_share": attention_share},
    draw=lambda table: layer_curves(table, CURVES),
)
