"""Attention share of visual tokens per layer (VISOR paper, figure 2; FastV's observation).

Of the attention that the tokens which predict the answer pay in a layer, the part that falls on visual tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from visor_jax.analysis.base import LayerAnalysis
from visor_jax.analysis.drawing import Curve, layer_curves
from visor_jax.analysis.passes import LayerView
from visor_jax.model.dropping.base import Raters, ratings


def attention_share(view: LayerView) -> Float[Array, " B"]:
    """Returns the share of each answer's attention on visual tokens, mean over heads and predictions."""
    places, valid = view.answers.places, view.answers.valid
    rows = jnp.arange(len(places))[:, None]
    predicts = jnp.zeros(view.text.shape[:2], jnp.float32).at[rows, places].add(valid)
    predicts /= jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    return jnp.sum(ratings(view.params, view.visual, view.text, view.stream, Raters(predicts), view.arch), axis=1)


CURVES = [Curve("attention_share", "Where the answer attends", "% of attention on visual tokens", 100)]
ANALYSIS = LayerAnalysis(
    name="attention_share",
    columns={"attention_share": "share of the answer's attention on visual tokens"},
    observers={"attention_share": attention_share},
    draw=lambda table: layer_curves(table, CURVES),
)
