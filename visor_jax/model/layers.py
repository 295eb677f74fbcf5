"""Layers of the tower and the decoder: NNX modules declare the parameters, pure functions do the arithmetic.

`visor_jax.model.visor.init_params` builds the modules and takes their parameters as a nested dict of arrays
(`params["q_proj"]["kernel"]`, ...). The functions below take this dict and plain arrays and hold no state. Shapes: B
batch, T tokens, D hidden size, H heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from visor_jax.architecture import TextArchitecture, VisionArchitecture
from visor_jax.kernels import AttentionMask, attention
from visor_jax.kernels.precision import widened

Params = dict[str, Any]
Rotary = tuple[Float[Array, "B T 1 E"], Float[Array, "B T 1 E"]]


def in_dtype(params: Params, dtype: Any) -> Params:
    """The parameters cast to `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


# --- declarations -----------------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    """`kernel` [in, out], normal with standard deviation gain / sqrt(in); `bias` [out], zero, if `bias`."""

    def __init__(self, size_in: int, size_out: int, *, rngs: nnx.Rngs, bias: bool = False, gain: float = 1.0):
        random = jax.random.normal(rngs.params(), (size_in, size_out), jnp.float32)
        self.kernel = nnx.Param(random * (gain / size_in**0.5))
        if bias:
            self.bias = nnx.Param(jnp.zeros(size_out, jnp.float32))


class Embedding(nnx.Module):
    """`embedding` [count, size]."""

    def __init__(self, count: int, size: int, *, rngs: nnx.Rngs, std: float):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (count, size), jnp.float32) * std)


class RMSNorm(nnx.Module):
    """`scale` [size]."""

    def __init__(self, size: int, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full(size, scale, jnp.float32))


class LayerNorm(nnx.Module):
    """`scale` and `bias` [size]."""

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))


UNROLLED = 4  # layers


def inside(block: Params, path: str) -> Params:
    """The part of a super-block's parameters, stacked or not, at a path of the whole tree ("blocks/self")."""
    for name in path.split("/")[1:]:
        block = block[name]
    return block


def scan_layers(body: Callable[[Any, Any], tuple[Any, Any]], state: Any, stacked: Any) -> tuple[Any, Any]:
    """`lax.scan` over stacked layers, unrolled for up to `UNROLLED` of them.

    A scan slices weights out of stacks and activations into them; in a model of few layers that is a quarter of a step.
    """
    count = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.scan(body, state, stacked, unroll=count <= UNROLLED)


def orthonormal(key: PRNGKeyArray, rows: int, columns: int) -> Float[Array, "rows columns"]:
    """Random orthonormal columns, uniform up to signs: a product of Householder reflections (Stewart, 1980).

    Not `jnp.linalg.qr`: on CPU a batched factorization waits in JAX's thread pool for work that it gives to the same
    pool, so that two at once on two cores wait forever.
    """
    corner = jnp.arange(rows)[None] >= jnp.arange(columns)[:, None]  # reflection i does not change the first i rows
    vectors = jnp.where(corner, jax.random.normal(key, (columns, rows), jnp.float32), 0.0)
    vectors = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)

    def reflect(columns_so_far, vector):
        return columns_so_far - 2 * jnp.outer(vector, vector @ columns_so_far), None

    return jax.lax.scan(reflect, jnp.eye(rows, columns, dtype=vectors.dtype), vectors, reverse=True)[0]


def copying_pair(
    key: PRNGKeyArray, size: int, num_kv_heads: int, num_heads: int, head_dim: int
) -> tuple[Float[Array, "D C"], Float[Array, "H D"]]:
    """Random value and output kernels with which attention copies the tokens that it attends to.

    The output is the transpose of orthonormal values (Trockman and Kolter, "Mimetic initialization", ICML 2023). With
    independent random kernels a small model needs hundreds of steps before its first look-up works.
    """
    width = num_kv_heads * head_dim
    values = orthonormal(key, max(size, width), min(size, width))
    values = values if width <= size else values.T
    groups = num_heads // num_kv_heads
    per_query_head = jnp.repeat(values.reshape(size, num_kv_heads, head_dim), groups, axis=1).reshape(size, -1)
    return values, per_query_head.T / groups


RECENCY_REACH = 20.0  # tokens; faster frequencies, which turn once around within this, get no bias


def recency_bias(arch: TextArchitecture) -> Float[np.ndarray, " E"]:
    """A bias for the queries and keys of one head that makes untrained attention prefer near tokens.

    Rotated by positions n tokens apart, its product with itself is proportional to the sum of cos(n * frequency) over
    the slower frequencies: `arch.recency_init` at n = 0, about zero beyond `RECENCY_REACH`. It lets a random text-only
    layer find the question that it must answer among several.
    """
    slow = rope_frequencies(arch) * RECENCY_REACH < 2 * np.pi
    strength = (arch.recency_init * arch.head_dim**0.5 / max(slow.sum(), 1)) ** 0.5
    return strength * np.concatenate([slow, np.zeros_like(slow)]).astype(np.float32)


class Qwen2Attention(nnx.Module):
    """Grouped-query projections with bias on q, k and v (`transformers.Qwen2Attention`)."""

    def __init__(self, arch: TextArchitecture, *, rngs: nnx.Rngs):
        heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q_proj = Linear(arch.hidden_size, heads, bias=True, rngs=rngs)
        self.k_proj = Linear(arch.hidden_size, kv, bias=True, rngs=rngs)
        self.v_proj = Linear(arch.hidden_size, kv, bias=True, rngs=rngs)
        self.o_proj = Linear(heads, arch.hidden_size, rngs=rngs)
        kernels = copying_pair(rngs.params(), arch.hidden_size, arch.num_kv_heads, arch.num_heads, arch.head_dim)
        self.v_proj.kernel[...], self.o_proj.kernel[...] = kernels


class Qwen2MLP(nnx.Module):
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


class SiglipAttention(nnx.Module):
    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.q_proj = Linear(size, size, bias=True, rngs=rngs)
        self.k_proj = Linear(size, size, bias=True, rngs=rngs)
        self.v_proj = Linear(size, size, bias=True, rngs=rngs)
        self.out_proj = Linear(size, size, bias=True, rngs=rngs)


class GeluMLP(nnx.Module):
    """`fc1`, `fc2` with bias, the tanh GELU between them."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(size, hidden, bias=True, rngs=rngs)
        self.fc2 = Linear(hidden, size, bias=True, rngs=rngs)


class SiglipLayer(nnx.Module):
    """One encoder layer (`transformers.SiglipEncoderLayer`); a patch-local one has no attention."""

    def __init__(self, arch: VisionArchitecture, *, rngs: nnx.Rngs):
        if not arch.patch_local:
            self.layer_norm1 = LayerNorm(arch.hidden_size)
            self.self_attn = SiglipAttention(arch.hidden_size, rngs=rngs)
        self.layer_norm2 = LayerNorm(arch.hidden_size)
        self.mlp = GeluMLP(arch.hidden_size, arch.intermediate_size, rngs=rngs)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def linear(params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    y = x @ params["kernel"]
    return y + for_each(y, params["bias"]) if "bias" in params else y


def for_each(x: Float[Array, "... D"], vector: Float[Array | np.ndarray, " D"]) -> Float[Array, "... D"]:
    """`vector` with leading axes of size 1, so that it broadcasts over the rows of `x`."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def rms_norm(params: Params, x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Normalized in float32, as `transformers.Qwen2RMSNorm`."""
    wide = widened(x)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return for_each(x, params["scale"]) * normal.astype(x.dtype)


def layer_norm(params: Params, x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    wide = widened(x)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean((wide - mean) ** 2, axis=-1, keepdims=True)
    scale, bias = (for_each(x, params[name]) for name in ("scale", "bias"))
    return ((wide - mean) * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale + bias


def gelu_mlp(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return linear(params["fc2"], jax.nn.gelu(linear(params["fc1"], x), approximate=True))


def split_heads(x: Float[Array, "B T C"], head_dim: int) -> Float[Array, "B T H E"]:
    return x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def merge_heads(x: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


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
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + turned * sin).astype(x.dtype)


def project_qkv(
    params: Params, x: Float[Array, "B T D"], rope: Rotary, arch: TextArchitecture, first: int = 0
) -> tuple[Array, ...]:
    """Rotated queries [B, T - first, H, E] and keys, and values [B, T, K, E], of one Qwen2 layer's normalized input."""
    x = rms_norm(params["input_layernorm"], x, arch.rms_norm_eps)
    inputs = zip(QKV, (x[:, first:], x, x), strict=True)
    query, key, value = (split_heads(linear(params["self_attn"][n], y), arch.head_dim) for n, y in inputs)
    return rotate(query, jax.tree.map(lambda turn: turn[:, first:], rope)), rotate(key, rope), value


QKV = ("q_proj", "k_proj", "v_proj")


def finish_layer(
    params: Params, x: Float[Array, "B T D"], attended: Float[Array, "B T H E"], arch: TextArchitecture
) -> Float[Array, "B T D"]:
    """The part of a Qwen2 layer after attention: output projection, residual, MLP."""
    x = x + linear(params["self_attn"]["o_proj"], merge_heads(attended))
    y = rms_norm(params["post_attention_layernorm"], x, arch.rms_norm_eps)
    mlp = params["mlp"]
    return x + linear(mlp["down_proj"], jax.nn.silu(linear(mlp["gate_proj"], y)) * linear(mlp["up_proj"], y))


def qwen2_layer(
    params: Params, x: Float[Array, "B T D"], rope: Rotary, mask: AttentionMask, arch: TextArchitecture, first: int = 0
) -> tuple[Float[Array, "B Tq D"], tuple[Array, Array]]:
    """One decoder layer over the tokens of `x`; also its keys and values [B, T, K, E], which a cache may keep.

    Tokens before `first` serve as keys and values only: the output and the queries of `mask` leave them out.
    """
    query, key, value = project_qkv(params, x, rope, arch, first)
    return finish_layer(params, x[:, first:], attention(query, key, value, mask=mask), arch), (key, value)


def whole_mask(batch: int, length: int) -> AttentionMask:
    """Every token sees every token of its row."""
    zeros, ones = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), jnp.int32)
    return AttentionMask(zeros, zeros, ones, ones, None, False)


def siglip_layer(params: Params, x: Float[Array, "N P D"], arch: VisionArchitecture) -> Float[Array, "N P D"]:
    """One encoder layer over the patches of each tile."""
    if "self_attn" in params:
        y = layer_norm(params["layer_norm1"], x, arch.layer_norm_eps)
        query, key, value = (split_heads(linear(params["self_attn"][n], y), arch.head_dim) for n in QKV)
        attended = attention(query, key, value, mask=whole_mask(*x.shape[:2]))
        x = x + linear(params["self_attn"]["out_proj"], merge_heads(attended))
    return x + gelu_mlp(params["mlp"], layer_norm(params["layer_norm2"], x, arch.layer_norm_eps))
