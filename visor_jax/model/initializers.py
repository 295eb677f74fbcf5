"""How parameters start: positions of the tower, and the new cross-attention layers.

The last are those of method.md section 3; `cross.init` chooses how they start.

In: freshly initialized or imported parameters. Out: the same tree with new values in `blocks/cross_attention`.

* `copy`: the attention weights of the layer itself; key and value heads are repeated if cross-attention has more.
* `zero`: random weights behind a gate of tanh(0), so that the model starts as its base.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from visor_jax.architecture import Architecture
from visor_jax.model.layers import Params, inside
from visor_jax.tree import flatten, unflatten

SINES_SCALE, SINES_PERIOD = 0.5, 20.0  # amplitude, and the ratio of the longest to the shortest period


def sines_of_grid(side: int, size: int) -> Float[np.ndarray, "P D"]:
    """Position embeddings of a grid of side x side patches: sines and cosines of their rows and columns, float32.

    `size` is a multiple of 4: a quarter each for sine and cosine of the row and of the column.
    """
    if size % 4:
        raise ValueError(f"size={size}: sines of rows and columns need a multiple of 4")
    row, column = np.divmod(np.arange(side**2), side)
    frequencies = SINES_PERIOD ** -(np.arange(size // 4) / (size // 4))
    angles = [place[:, None] * frequencies for place in (row, column)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return (SINES_SCALE * np.concatenate(waves, axis=1)).astype(np.float32)


def start_cross_attention(params: Params, arch: Architecture) -> Params:
    """`params` with cross-attention initialized by `arch.cross.init`; the gate keeps its value."""
    if arch.cross.init != "copy":
        return params
    flat = flatten(params)
    for place in (place for place in arch.block if place.cross):
        new = copied(inside(params["blocks"], place.path), arch)
        flat.update({f"{place.cross}/{path}": leaf for path, leaf in flatten(new).items()})
    return unflatten(flat)


def copied(layer: Params, arch: Architecture) -> Params:
    """The attention projections of `layer`, which cross-attention precedes; stacked over super-blocks."""
    attention = layer["self_attn"]
    repeats = arch.cross.num_kv_heads // arch.text.num_kv_heads

    def widen(x):
        heads = x.reshape(*x.shape[:-1], arch.text.num_kv_heads, arch.text.head_dim)
        return jnp.repeat(heads, repeats, axis=-2).reshape(*x.shape[:-1], x.shape[-1] * repeats)

    copies = {name: jax.tree.map(jnp.array, attention[name]) for name in ("q_proj", "o_proj")}
    return {**copies, **{name: jax.tree.map(widen, attention[name]) for name in ("k_proj", "v_proj")}}
