"""How the new cross-attention layers start (METHOD.md section 3): as a copy, behind a closed gate, or as a match.

In: freshly initialised or imported parameters. Out: the same tree with `blocks/cross_attention` filled in.

* `copy`: the base layer's own attention weights; key and value heads are repeated where cross-attention has more.
* `zero`: random weights behind a gate of tanh(0), so that the model begins as its base.
* `match`: for a base whose own attention layers know nothing yet, but whose tower is aligned with the token embeddings:
  keys begin as the queries and the output as the transpose of the values, so that from the first step on a text token
  reads the visual tokens that resemble it, as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from visor_jax.architecture import Architecture
from visor_jax.model.layers import Params

MATCH_SHARPNESS = 8.0  # of the first softmax, against plain similarity


def start_cross_attention(params: Params, arch: Architecture, key: Array) -> Params:
    """`params` with cross-attention as `arch.cross.init` wants it; the gate has its value already."""
    starts = {"copy": copied, "match": matched}
    if arch.cross.init not in starts:
        return params
    new = {**params["blocks"]["cross_attention"], **starts[arch.cross.init](params, arch, key)}
    return {**params, "blocks": {**params["blocks"], "cross_attention": new}}


def copied(params: Params, arch: Architecture, key: Array) -> Params:
    """The projections of the layer that cross-attention stands before."""
    del key
    own = params["blocks"]["cross"]["self_attn"]
    repeats = arch.cross.num_kv_heads // arch.text.num_kv_heads

    def widen(x):
        heads = x.reshape(*x.shape[:-1], arch.text.num_kv_heads, arch.text.head_dim)
        return jnp.repeat(heads, repeats, axis=-2).reshape(*x.shape[:-1], x.shape[-1] * repeats)

    copies = {name: jax.tree.map(jnp.array, own[name]) for name in ("q_proj", "o_proj")}
    return {**copies, **{name: jax.tree.map(widen, own[name]) for name in ("k_proj", "v_proj")}}


def matched(params: Params, arch: Architecture, key: Array) -> Params:
    """Orthonormal maps: keys as the first query head of their group, output as the transposed values."""
    del params
    text, groups = arch.text, arch.text.num_heads // arch.cross.num_kv_heads
    kv = arch.cross.num_kv_heads * text.head_dim
    match, read = (orthonormal(k, (arch.num_blocks, text.hidden_size, kv)) for k in jax.random.split(key))
    match = match * MATCH_SHARPNESS**0.5

    def per_query_head(x):
        heads = x.reshape(*x.shape[:-1], arch.cross.num_kv_heads, text.head_dim)
        return jnp.repeat(heads, groups, axis=-2).reshape(*x.shape[:-1], kv * groups)

    def projection(kernel):
        return {"kernel": kernel, "bias": jnp.zeros((arch.num_blocks, kernel.shape[-1]))}

    return {
        "q_proj": projection(per_query_head(match)),
        "k_proj": projection(match),
        "v_proj": projection(read),
        "o_proj": {"kernel": per_query_head(read).swapaxes(-1, -2) / groups},
    }


def orthonormal(key: Array, shape: tuple[int, int, int]) -> Float[Array, "n D C"]:
    """Random maps whose columns are orthonormal (rows, where there are fewer of them)."""
    wide = shape[1] < shape[2]
    normal = jax.random.normal(key, (shape[0], max(shape[1:]), min(shape[1:])))
    q = jnp.linalg.qr(normal)[0]
    return q.swapaxes(-1, -2) if wide else q
