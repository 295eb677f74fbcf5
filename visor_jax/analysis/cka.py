"""Change of the visual tokens through the layers, as linear CKA (VISOR paper, figure 3; Kornblith et al., 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from visor_jax.analysis.base import LayerAnalysis
from visor_jax.analysis.drawing import Curve, layer_curves
from visor_jax.analysis.passes import LayerView


def cka_before(view: LayerView) -> Float[Array, " B"]:
    """Returns CKA of V after the layer with V before it."""
    return linear_cka(view.visual, view.changed, view.kept)


def cka_first(view: LayerView) -> Float[Array, " B"]:
    """Returns CKA of V after the layer with V(0)."""
    return linear_cka(view.first, view.changed, view.kept)


def linear_cka(
    first: Float[Array, "B N D"], second: Float[Array, "B N D"], kept: Bool[Array, "B N"]
) -> Float[Array, " B"]:
    """Returns linear CKA of two representations of the same tokens, for each sample over its own tokens `kept`.

    1 if one is the other turned, moved and scaled; NaN if either is constant or no token is kept.
    """

    def of_sample(arguments: tuple[Array, Array, Array]) -> Array:
        one, other, mine = arguments
        x, y = (centered(z.astype(jnp.float32), mine) for z in (one, other))
        if x.shape[0] <= x.shape[1]:  # products of tokens are smaller than those of channels
            of_x, of_y = x @ x.T, y @ y.T
            cross = jnp.sum(of_x * of_y)
        else:
            of_x, of_y = x.T @ x, y.T @ y
            cross = jnp.sum(jnp.square(x.T @ y))
        return cross / (jnp.linalg.norm(of_x) * jnp.linalg.norm(of_y))

    return jax.lax.map(of_sample, (first, second, kept))  # one at a time: the products are large


def centered(x: Float[Array, "N D"], kept: Bool[Array, " N"]) -> Float[Array, "N D"]:
    """Returns `x` minus its mean over the tokens kept; 0 for the others."""
    chosen = kept[:, None]
    mean = jnp.sum(jnp.where(chosen, x, 0), axis=0, keepdims=True) / jnp.sum(kept)
    return jnp.where(chosen, x - mean, 0)


CURVES = [
    Curve("cka_before", "A layer's change of visual tokens", "CKA with V before the layer"),
    Curve("cka_first", "Change since the first layer", "CKA with V(0)"),
]
ANALYSIS = LayerAnalysis(
    name="cka",
    columns={"cka_before": "CKA of V with V before the layer", "cka_first": "CKA of V with V(0)"},
    observers={"cka_before": cka_before, "cka_first": cka_first},
    draw=lambda table: layer_curves(table, CURVES),
)
