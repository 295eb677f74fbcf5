"""Qwen2's decoder layer: its parameters, how they start, and its arithmetic (`transformers.Qwen2DecoderLayer`).

In: an architecture, or a layer's parameters and the states of its tokens. Out: modules that declare parameters, and
states, keys and values. Shapes: B batch, T tokens, D hidden size, H heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from visor_jax.architecture import TextArchitecture
from visor_jax.kernels import AttentionMask, attention
from visor_jax.model.layers import QKV, Linear, Params, RMSNorm, linear, merge_heads, rms_norm, split_heads
from visor_jax.model.remat import mlp_values

Rotary = tuple[Float[Array, "B T 1 E"], Float[Array, "B T 1 E"]]


class Qwen2Attention(nnx.Module):
    """Grouped-query projections with bias on q, k and v (`transformers.Qwen2Attention`)."""

    def __init__(self, arch: TextArchitecture, *, rngs: nnx.Rngs):
        heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q_proj = Linear(arch.hidden_size, heads, bias=True, rngs=rngs)
        self.k_proj = Linear(arch.hidden_size, kv, bias=True, rngs=rngs)
        self.v_proj = Linear(arch.hidden_size, kv, bias=True, rngs=rngs)
        self.o_proj = Linear(heads, arch.hidden_size, gain=arch.residual_init, rngs=rngs)


class Qwen2MLP(nnx.Module):
    """The gated MLP, without biases (`transformers.Qwen2MLP`)."""

    def __init__(self, arch: TextArchitecture, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(arch.hidden_size, arch.intermediate_size, rngs=rngs)
        self.up_proj = Linear(arch.hidden_size, arch.intermediate_size, rngs=rngs)
        self.down_proj = Linear(arch.intermediate_size, arch.hidden_size, gain=arch.residual_init, rngs=rngs)


class Qwen2Layer(nnx.Module):
    """One pretrained decoder layer (`transformers.Qwen2DecoderLayer`)."""

    def __init__(self, arch: TextArchitecture, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(arch.hidden_size)
        self.self_attn = Qwen2Attention(arch, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size)
        self.mlp = Qwen2MLP(arch, rngs=rngs)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def rotary(positions: Int[Array, "B T"], arch: TextArchitecture) -> Rotary:
    """Cosine and sine of the rotary embedding, both halves of the head alike (`Qwen2RotaryEmbedding`)."""
    frequencies = rope_frequencies(arch)[None, None, None]
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [B, T, 1, E / 2]
    angles = angles.astype(float)  # float64 if JAX has it enabled
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def rope_frequencies(arch: TextArchitecture) -> Float[np.ndarray, " half_E"]:
    """Radians per token of each pair, rounded as torch rounds: at position 8,000 one unit in the last place is 1e-3."""
    powers = (arch.rope_theta ** (np.arange(0, arch.head_dim, 2) / arch.head_dim)).astype(np.float32)
    return np.float32(1) / powers


def rotate(x: Float[Array, "B T H E"], rope: Rotary) -> Float[Array, "B T H E"]:
    """Rotates each pair (i, i + E / 2) of a head by the angle of its token."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)


def project_qkv(
    params: Params, x: Float[Array, "B T D"], rope: Rotary, arch: TextArchitecture, first: int = 0
) -> tuple[Float[Array, "B Tq H E"], Float[Array, "B T K E"], Float[Array, "B T K E"]]:
    """Rotated queries [B, T - first, H, E] and keys, and values [B, T, K, E], of one Qwen2 layer's normalized input."""
    x = rms_norm(params["input_layernorm"], x, arch.rms_norm_eps)
    value = split_heads(linear(params["self_attn"]["v_proj"], x), arch.head_dim)
    return *_queries_keys(params, x, rope, arch, first), value


def project_qk(
    params: Params, x: Float[Array, "B T D"], rope: Rotary, arch: TextArchitecture, first: int = 0
) -> tuple[Float[Array, "B Tq H E"], Float[Array, "B T K E"]]:
    """The queries and keys of `project_qkv`."""
    return _queries_keys(params, rms_norm(params["input_layernorm"], x, arch.rms_norm_eps), rope, arch, first)


def _queries_keys(
    params: Params, x: Float[Array, "B T D"], rope: Rotary, arch: TextArchitecture, first: int
) -> tuple[Float[Array, "B Tq H E"], Float[Array, "B T K E"]]:
    inputs = zip(QKV[:2], (x[:, first:], x), strict=True)
    query, key = (split_heads(linear(params["self_attn"][n], y), arch.head_dim) for n, y in inputs)
    return rotate(query, jax.tree.map(lambda turn: turn[:, first:], rope)), rotate(key, rope)


def finish_layer(
    params: Params, x: Float[Array, "B T D"], attended: Float[Array, "B T H E"], arch: TextArchitecture
) -> Float[Array, "B T D"]:
    """The part of a Qwen2 layer after attention: output projection, residual, MLP."""
    x = mlp_values(x + linear(params["self_attn"]["o_proj"], merge_heads(attended)))
    y = rms_norm(params["post_attention_layernorm"], x, arch.rms_norm_eps)
    mlp = params["mlp"]
    gate, up = mlp_values((linear(mlp["gate_proj"], y), linear(mlp["up_proj"], y)))
    return x + linear(mlp["down_proj"], jax.nn.silu(gate) * up)


def qwen2_layer(
    params: Params, x: Float[Array, "B T D"], rope: Rotary, mask: AttentionMask, arch: TextArchitecture, first: int = 0
) -> tuple[Float[Array, "B Tq D"], tuple[Float[Array, "B T K E"], Float[Array, "B T K E"]]]:
    """One decoder layer over the tokens of `x`; also its keys and values [B, T, K, E], which a cache may keep.

    Tokens before `first` serve as keys and values only: the output and the queries of `mask` leave them out.
    """
    query, key, value = project_qkv(params, x, rope, arch, first)
    return finish_layer(params, x[:, first:], attention(query, key, value, mask=mask), arch), (key, value)
