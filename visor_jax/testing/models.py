"""A tiny architecture that compiles in about a second, and parameters for it as nested dicts of float32 arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from visor_jax.architecture import (
    AnyResArchitecture,
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params, init_params
from visor_jax.scale import compiler_options as compiling

TINY = Architecture(
    text=TextArchitecture(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=8
    ),
    vision=VisionArchitecture(
        tile_size=8, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2
    ),
    cross=CrossAttentionArchitecture(num_kv_heads=2),
    policy=PolicyArchitecture(hidden_size=16, max_budgets=8),
    anyres=AnyResArchitecture(pinpoints=((8, 8), (8, 16), (16, 8), (16, 16)), max_tiles=2),
)


def tiny_architecture(num_layers: int = 7, **changes: Any) -> Architecture:
    """Returns an architecture with hidden size 32, 4 heads, 2 key/value heads, vocabulary 64, and 2 x 2 patches a tile.

    Args:
      num_layers: decoder layers; 6 gives two super-blocks, 7 and 8 add one or two text-only layers.
      **changes: fields of `Architecture` to replace (`plan="dense"`, `bidirectional_vision=True`, `vision=...`).

    Raises:
      TypeError: a name is not a field of `Architecture`.
    """
    text = dataclasses.replace(TINY.text, num_layers=num_layers)
    return dataclasses.replace(TINY, **{"text": text, **changes})


def other_plan(**changes: Any) -> Architecture:
    """Returns a tiny architecture whose pattern is not the paper's.

    It has two text-only layers, two super-blocks of four, and one more layer. In a super-block, cross-attention comes
    after the slot, and two layers are text-only.
    """
    return tiny_architecture(11, **{"pattern": ("text", "self", "text", "cross"), "head_layers": 2, **changes})


def fresh_params(arch: Architecture, seed: int = 0) -> Params:
    """Returns the parameters that training starts from: `visor_jax.model.visor.init_params`, compiled."""
    return _INIT(arch, jax.random.key(seed))


def random_params(arch: Architecture, seed: int = 0) -> Params:
    """Returns random parameters, float32 NumPy arrays in the tree of `init_params`.

    A fresh initialization has biases and conditional positions of 0, norms of 1, and cross-attention equal to its
    layer's own attention, which would hide mistakes. Activations stay of the order of 1.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf) -> np.ndarray:
        name, noise = path[-1].key, rng.standard_normal(leaf.shape).astype(np.float32)
        if name in ("scale", "gate"):
            return np.float32(1) + np.float32(0.2) * noise
        if name == "kernel" and path[-2].key != "conditional_position":
            return noise / np.float32(np.sqrt(leaf.shape[-2]))
        return np.float32(0.3) * noise

    return jax.tree_util.tree_map_with_path(draw, abstract_params(arch))


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles like `jax.jit`, but several times faster and into a slower program, for tests.

    Args:
      function: the function to compile.
      **options: further arguments of `jax.jit` (`static_argnames`, ...).
    """
    return jax.jit(function, compiler_options=dict(compiling.QUICK), **options)


_INIT = quick_jit(init_params, static_argnums=0)
