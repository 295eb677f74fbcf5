"""Building blocks of tower and decoder layers: NNX modules declare parameters, pure functions do the arithmetic.

`visor_jax.model.visor.init_params` builds the modules and takes their parameters as a nested dict of arrays
(`params["q_proj"]["kernel"]`, ...). The functions below take this dict and plain arrays and hold no state. Shapes: B
batch, T tokens, D hidden size, H heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from visor_jax.kernels.precision import widened
from visor_jax.model.remat import mlp_values

Params = dict[str, Any]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)

QKV = ("q_proj", "k_proj", "v_proj")


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

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))


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


class GeluMLP(nnx.Module):
    """`fc1`, `fc2` with bias, the tanh GELU between them."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs, residual_gain: float = 1.0):
        self.fc1 = Linear(size, hidden, bias=True, rngs=rngs)
        self.fc2 = Linear(hidden, size, bias=True, rngs=rngs, gain=residual_gain)


def stacked(make: Callable[[nnx.Rngs], ModuleT], count: int, rngs: nnx.Rngs) -> ModuleT:
    """`count` modules of one kind as a single module whose parameters carry a leading axis."""
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def linear(params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """`x` times `kernel`, plus `bias` if there is one."""
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
    """Normalized in float32, then scaled and shifted in the dtype of `x`, as `torch.nn.LayerNorm`."""
    wide = widened(x)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean((wide - mean) ** 2, axis=-1, keepdims=True)
    scale, bias = (for_each(x, params[name]) for name in ("scale", "bias"))
    return ((wide - mean) * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * scale + bias


def gelu_mlp(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The output of a `GeluMLP`."""
    return linear(params["fc2"], jax.nn.gelu(mlp_values(linear(params["fc1"], x)), approximate=True))


def split_heads(x: Float[Array, "B T C"], head_dim: int) -> Float[Array, "B T H E"]:
    """The last axis divided into heads."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def merge_heads(x: Float[Array, "B T H E"]) -> Float[Array, "B T C"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
