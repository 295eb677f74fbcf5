"""A tiny architecture, parameters for it, and a compiler that is quick about both.

In: nothing but small numbers. Out: an `Architecture` whose programs compile in about a second, and nested dicts of
float32 arrays under the names that checkpoints keep.
"""

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
    """Hidden size 32, 4 heads over 2 key/value heads, vocabulary 64; tiles of 8 pixels in 2 x 2 patches.

    Args:
      num_layers: decoder layers; 6 is two super-blocks, 7 and 8 leave one or two layers over.
      **changes: fields of `Architecture` to replace (`plan="dense"`, `bidirectional_vision=True`, `vision=...`).

    Raises:
      TypeError: for a name that is no field of `Architecture`.
    """
    text = dataclasses.replace(TINY.text, num_layers=num_layers)
    return dataclasses.replace(TINY, **{"text": text, **changes})


def other_plan(**changes: Any) -> Architecture:
    """A tiny model of another pattern than the paper's: two text-only layers, two super-blocks of four, one layer over.

    Cross-attention is every fourth layer and comes after the slot, and a super-block has two text-only layers.
    """
    return tiny_architecture(11, **{"pattern": ("text", "self", "text", "cross"), "head_layers": 2, **changes})


def fresh_params(arch: Architecture, seed: int = 0) -> Params:
    """The parameters that training starts from: `visor_jax.model.visor.init_params`, compiled."""
    return _INIT(arch, jax.random.key(seed))


def random_params(arch: Architecture, seed: int = 0) -> Params:
    """Parameters none of which is at a special value: float32 NumPy arrays in the tree of `init_params`.

    A fresh initialization has biases and conditional positions of 0, norms of 1 and cross-attention equal to its
    layer's own attention, which would hide mistakes; here each is random. Activations stay of the order of 1.
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
    """`jax.jit` for tests: compiles several times faster, into a program that runs slower.

    Args:
      function: the function to compile.
      **options: further arguments of `jax.jit` (`static_argnames`, ...).
    """
    return jax.jit(function, compiler_options=dict(compiling.QUICK), **options)


_INIT = quick_jit(init_params, static_argnums=0)
