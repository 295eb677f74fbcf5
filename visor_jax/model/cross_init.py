"""How the new cross-attention layers start (method.md section 3): as a copy, behind a closed gate, or as a match.

In: freshly initialized or imported parameters. Out: the same tree with `blocks/cross_attention` filled in.

* `copy`: the base layer's own attention weights; key and value heads are repeated where cross-attention has more.
* `zero`: random weights behind a gate of tanh(0), so that the model begins as its base.
* `match`: for a base made here, whose own attention layers have never seen a picture, but whose tower is aligned with
  the token embeddings: keys begin as the queries and the output as the transpose of the values, so that from the first
  step on a text token reads the visual tokens that resemble it, as they are; and, from the second super-block on, those
  that resemble what it is asked about (`asked_rotation`), which `base` has taught it to keep.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from visor_jax.architecture import Architecture
from visor_jax.model.keys import frozen_key
from visor_jax.model.layers import Params, copying_pair, inside, orthonormal
from visor_jax.tree import flatten, unflatten

MATCH_SHARPNESS = 8.0  # of the first softmax, against plain similarity
ASKED_SEED = 97
ASKED_SHARPNESS = 2.0  # relative to the token's own embedding


def asked_rotation(size: int) -> Array:
    """[D, D], orthogonal: maps the subspace in which text keeps the object of the question to token embeddings.

    A separate subspace keeps it from being decoded as the next token.
    """
    return orthonormal(frozen_key(ASKED_SEED), size, size)


def start_cross_attention(params: Params, arch: Architecture, key: PRNGKeyArray) -> Params:
    """`params` with cross-attention initialized by `arch.cross.init`; the gate keeps its value."""
    starts = {"copy": copied, "match": matched}
    if arch.cross.init not in starts:
        return params
    flat = flatten(params)
    for number, place in enumerate(place for place in arch.block if place.cross):
        own = key if number == 0 else jax.random.fold_in(key, number)
        new = starts[arch.cross.init](inside(params["blocks"], place.path), arch, own)
        flat.update({f"{place.cross}/{path}": leaf for path, leaf in flatten(new).items()})
    return unflatten(flat)


def copied(layer: Params, arch: Architecture, key: PRNGKeyArray) -> Params:
    """The projections of the layer `layer` that cross-attention stands before, stacked over super-blocks."""
    del key
    own = layer["self_attn"]
    repeats = arch.cross.num_kv_heads // arch.text.num_kv_heads

    def widen(x):
        heads = x.reshape(*x.shape[:-1], arch.text.num_kv_heads, arch.text.head_dim)
        return jnp.repeat(heads, repeats, axis=-2).reshape(*x.shape[:-1], x.shape[-1] * repeats)

    copies = {name: jax.tree.map(jnp.array, own[name]) for name in ("q_proj", "o_proj")}
    return {**copies, **{name: jax.tree.map(widen, own[name]) for name in ("k_proj", "v_proj")}}


def matched(layer: Params, arch: Architecture, key: PRNGKeyArray) -> Params:
    """Keys equal the first query head of their group; the output projection inverts the value projection."""
    del layer
    text, kv_heads = arch.text, arch.cross.num_kv_heads
    sizes = (text.hidden_size, kv_heads, text.num_heads, text.head_dim)
    keys = jax.random.split(key, (2, arch.num_blocks))
    match, same = jax.vmap(lambda k: copying_pair(k, *sizes))(keys[0])
    read, give = jax.vmap(lambda k: copying_pair(k, *sizes))(keys[1])
    groups, sharp = text.num_heads // kv_heads, MATCH_SHARPNESS**0.5
    queries = same.swapaxes(-1, -2)
    queries = queries.at[1:].add(ASKED_SHARPNESS * asked_rotation(text.hidden_size) @ queries[1:])

    def projection(kernel: Array) -> Params:
        return {"kernel": kernel, "bias": jnp.zeros((arch.num_blocks, kernel.shape[-1]), kernel.dtype)}

    return {
        "q_proj": projection(sharp * groups * queries),
        "k_proj": projection(sharp * match),
        "v_proj": projection(read),
        "o_proj": {"kernel": give},
    }
